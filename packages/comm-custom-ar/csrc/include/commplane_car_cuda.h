/* SPDX-License-Identifier: Apache-2.0
 *
 * commplane_car on CUDA: collectives between the GPUs of one host, over memory that each rank maps from the others (CUDA IPC). C99.
 * Part of the same library as commplane_car.h, whose conventions and numbers hold here. Where the library was built without nvcc
 * every function is there and returns EUNSUPPORTED, with the reason as its text.
 *
 *   - Calls only queue work on a stream and never wait. A fault of the device is therefore reported by the call after it, or by
 *     commplane_car_cuda_check_faults; the communicator is then poisoned, and can only be closed.
 *   - `stream` is a cudaStream_t as a number; 0 is the legacy default stream. Calls from different streams are put in the order in
 *     which they were made. Kernels of one communicator that run at the same time all the same (two graphs replayed on two
 *     streams) are a fault and no deadlock.
 *   - Every call works in a stream capture, and its replays mix with calls, as long as all ranks do the same in the same order.
 *   - Every wait of a kernel is bounded by the timeout; it then gives up, and so do the peers' kernels.
 *   - Sums are float32, added in rank order, rounded once; results are bitwise equal on all ranks, whatever the algorithm is.
 */
#ifndef COMMPLANE_CAR_CUDA_H
#define COMMPLANE_CAR_CUDA_H

#include "commplane_car.h"

#ifdef __cplusplus
extern "C" {
#endif

#define COMMPLANE_CAR_CUDA_MAX_WORLD 8
#define COMMPLANE_CAR_CUDA_HANDLE_BYTES 64
#define COMMPLANE_CAR_CUDA_CONTROL_BYTES 4096
#define COMMPLANE_CAR_CUDA_MAX_CHOICES 32

typedef struct commplane_car_cuda commplane_car_cuda;

enum commplane_car_cuda_algorithm {
    COMMPLANE_CAR_CUDA_ONE_SHOT_PUSH = 1, /* larger messages than the capacity go in pieces */
    COMMPLANE_CAR_CUDA_TWO_SHOT_PUSH = 2, /* the same; of more than 256 threads the library makes its own choice */
    COMMPLANE_CAR_CUDA_ONE_SHOT_PULL = 3, /* inputs that all ranks can read; out of place */
    COMMPLANE_CAR_CUDA_TWO_SHOT_PULL = 4  /* inputs that all ranks can read; in place */
};

/* Which algorithm serves messages of up to max_bytes. */
typedef struct commplane_car_cuda_choice {
    uint64_t max_bytes;
    uint32_t algorithm;
    uint32_t blocks;  /* most blocks of the grid; 0: the library's choice */
    uint32_t threads; /* of a block; a multiple of 64, at most 512; 0: the library's choice */
    uint32_t reserved;
} commplane_car_cuda_choice;

typedef struct commplane_car_cuda_options {
    uint32_t size;
    uint32_t rank;
    uint32_t world_size; /* 2..8 */
    int32_t device;      /* CUDA ordinal in this process */
    uint32_t multiprocessors; /* the same on all ranks: the fewest that commplane_car_cuda_device_info gives on any of them */
    uint32_t reserved;
    uint64_t timeout_ns; /* the most that one wait of a kernel may take; 0 is refused */
    void* control;       /* COMMPLANE_CAR_CUDA_CONTROL_BYTES of zeroed memory, page aligned, that all ranks map; stays until close */
} commplane_car_cuda_options;

typedef struct commplane_car_cuda_detail {
    uint32_t size;
    int32_t status;         /* of this rank: 0, ETIMEDOUT, EABORTED, EMISMATCH, EBUSY */
    uint64_t sequence;      /* calls made by this rank's host, captures included */
    uint64_t missing_mask;  /* bit r: a kernel of this rank waited for rank r in vain; after an abort, the ranks that others missed */
    uint64_t mismatch_mask; /* bit r: rank r called something else */
    uint64_t abort_mask;    /* bit r: rank r has given up, on the device or by commplane_car_cuda_abort */
    commplane_car_call mine; /* what was called: kind, dtype, count; not what else there is */
    commplane_car_call peers[COMMPLANE_CAR_CUDA_MAX_WORLD]; /* filled for the ranks in mismatch_mask */
} commplane_car_cuda_detail;

/* --- what there is; local, creates no context ------------------------------------------------------------------------------- */
/* 0 if this library has the CUDA half and the driver works; else the text says which is missing. */
COMMPLANE_CAR_API int commplane_car_cuda_check(void);
COMMPLANE_CAR_API int commplane_car_cuda_device_count(int* count);
/* Multiprocessors that this process may use (its share, under MPS), and the compute capability as 10 * major + minor. */
COMMPLANE_CAR_API int commplane_car_cuda_device_info(int device, uint32_t* multiprocessors, uint32_t* capability);

/* --- memory that other processes map; local, creates the device's context ---------------------------------------------------- */
COMMPLANE_CAR_API int commplane_car_cuda_memory_alloc(int device, uint64_t bytes, void** out, unsigned char handle[64]);
COMMPLANE_CAR_API int commplane_car_cuda_memory_open(int device, const unsigned char handle[64], void** out);
COMMPLANE_CAR_API int commplane_car_cuda_memory_close(int device, void* opened);
COMMPLANE_CAR_API int commplane_car_cuda_memory_free(int device, void* allocated);
/* Word i becomes value + i; counts the words that are not. Both wait for the device. */
COMMPLANE_CAR_API int commplane_car_cuda_memory_poke(int device, void* at, uint64_t words, uint32_t value);
COMMPLANE_CAR_API int commplane_car_cuda_memory_peek(int device, const void* at, uint64_t words, uint32_t value, uint64_t* wrong);
/* The handle of the allocation that `at` lies in (of any allocator that uses cudaMalloc), and the offset in it; EUNSUPPORTED for
 * memory that has none, such as torch's expandable segments. */
COMMPLANE_CAR_API int commplane_car_cuda_memory_handle(int device, const void* at, unsigned char handle[64], uint64_t* offset);

/* --- a communicator: open, exchange the handles, connect -------------------------------------------------------------------- */
COMMPLANE_CAR_API int commplane_car_cuda_open(const commplane_car_cuda_options* options, commplane_car_cuda** out,
                                              unsigned char handle[64]);
/* `handles`: world_size times 64 bytes in rank order. Local; after all ranks have opened, before any calls. */
COMMPLANE_CAR_API int commplane_car_cuda_connect(commplane_car_cuda* comm, const unsigned char* handles);
/* Lets go of the peers' memory, waits a little for them to do the same, frees its own. Local, idempotent. The handle stays valid to pass. */
COMMPLANE_CAR_API int commplane_car_cuda_close(commplane_car_cuda* comm);
COMMPLANE_CAR_API int commplane_car_cuda_abort(commplane_car_cuda* comm);
COMMPLANE_CAR_API int commplane_car_cuda_set_timeout(commplane_car_cuda* comm, uint64_t timeout_ns);
/* Bytes that the communicator has on the device, and the most that one kernel of one_shot_push takes. */
COMMPLANE_CAR_API int commplane_car_cuda_memory(const commplane_car_cuda* comm, uint64_t* bytes, uint64_t* capacity);
/* The algorithms of all_reduce by size, sorted; for tensors that only this rank reads (`readable` 0) or that all can (1), outside
 * (`capturing` 0) and inside of a capture. The same on all ranks. The last entry serves all that is larger, too. */
COMMPLANE_CAR_API int commplane_car_cuda_choose(commplane_car_cuda* comm, int readable, int capturing,
                                                const commplane_car_cuda_choice* choices, uint32_t count);

/* --- inputs that all ranks can read ------------------------------------------------------------------------------------------ */
/* Rank r's buffer of `bytes` bytes lies at bases[r] in this process. Local; `id` is the same on all ranks. */
COMMPLANE_CAR_API int commplane_car_cuda_register(commplane_car_cuda* comm, void* const* bases, uint64_t bytes, uint32_t id);
COMMPLANE_CAR_API int commplane_car_cuda_unregister(commplane_car_cuda* comm, uint32_t id);
/* Between these two, calls in captures remember their inputs as if all ranks could read them; what they remembered is then
 * fetched, exchanged, and filled in: until then the graphs may not be replayed. Only where every rank's allocator has handles. */
COMMPLANE_CAR_API int commplane_car_cuda_capture_begin(commplane_car_cuda* comm, int registered);
COMMPLANE_CAR_API int commplane_car_cuda_capture_end(commplane_car_cuda* comm);
COMMPLANE_CAR_API int commplane_car_cuda_captured(commplane_car_cuda* comm, uint32_t index, void** input, uint64_t* bytes);
/* How many inputs were remembered since the last fill, and the addresses of input `index` in this process, in rank order. */
COMMPLANE_CAR_API int commplane_car_cuda_captured_count(commplane_car_cuda* comm, uint32_t* count);
COMMPLANE_CAR_API int commplane_car_cuda_fill(commplane_car_cuda* comm, uint32_t index, void* const* addresses);
COMMPLANE_CAR_API int commplane_car_cuda_filled(commplane_car_cuda* comm);

/* --- collectives; on a stream ----------------------------------------------------------------------------------------------- */
COMMPLANE_CAR_API int commplane_car_cuda_all_reduce(commplane_car_cuda* comm, const void* in, void* out, uint64_t count, int dtype,
                                                    uint64_t stream);
COMMPLANE_CAR_API int commplane_car_cuda_all_reduce_rms_norm(commplane_car_cuda* comm, const void* in, const void* residual,
                                                             const void* weight, void* norm_out, void* residual_out, uint64_t rows,
                                                             uint64_t hidden, int dtype, float eps, float weight_bias,
                                                             uint64_t stream);
/* Counts as on the CPU: elements of this rank's input; for reduce_scatter of its output. Moves take any dtype of commplane_car.h. */
COMMPLANE_CAR_API int commplane_car_cuda_all_gather(commplane_car_cuda* comm, const void* in, void* out, uint64_t count, int dtype,
                                                    uint64_t stream);
COMMPLANE_CAR_API int commplane_car_cuda_reduce_scatter(commplane_car_cuda* comm, const void* in, void* out, uint64_t count,
                                                        int dtype, uint64_t stream);
COMMPLANE_CAR_API int commplane_car_cuda_broadcast(commplane_car_cuda* comm, void* data, uint64_t count, int dtype, uint32_t root,
                                                   uint64_t stream);
COMMPLANE_CAR_API int commplane_car_cuda_barrier(commplane_car_cuda* comm, uint64_t stream);

/* 0, or why the communicator is poisoned: ETIMEDOUT, EABORTED, EMISMATCH, EBUSY (two kernels at once). Does not wait for the device. */
COMMPLANE_CAR_API int commplane_car_cuda_check_faults(const commplane_car_cuda* comm);
COMMPLANE_CAR_API int commplane_car_cuda_status_detail(const commplane_car_cuda* comm, commplane_car_cuda_detail* out);
/* As commplane_car_flight: calls that were queued; `status` is of the queueing. */
COMMPLANE_CAR_API int commplane_car_cuda_flight(const commplane_car_cuda* comm, void* records, uint64_t record_bytes,
                                                uint64_t capacity, uint64_t* count);

#ifdef __cplusplus
}
#endif

#endif
