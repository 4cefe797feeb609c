/* SPDX-License-Identifier: Apache-2.0
 *
 * commplane_car: collectives between processes of one Linux host over POSIX shared memory. C99.
 *
 * Conventions
 *   - Every function that returns `int` returns 0 (COMMPLANE_CAR_OK) or a negative COMMPLANE_CAR_E* code; nothing throws.
 *   - The text behind the last failure of the calling thread is commplane_car_last_error().
 *   - Every struct begins with `uint32_t size`: set it to sizeof before a call. A caller built against an older, shorter
 *     struct stays valid; a field it does not know is taken as zero.
 *   - A communicator is used by one thread at a time (a second one gets EBUSY); abort and set_timeout may come from any
 *     thread. "Collective" means that every rank has to make the same call in the same order.
 *   - Byte order is little endian, counts are elements, sizes are bytes, times are nanoseconds.
 */
#ifndef COMMPLANE_CAR_H
#define COMMPLANE_CAR_H

#include <stdint.h>

#if defined(__GNUC__)
#define COMMPLANE_CAR_API __attribute__((visibility("default")))
#else
#define COMMPLANE_CAR_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define COMMPLANE_CAR_ABI_MAJOR 2u
#define COMMPLANE_CAR_ABI_MINOR 0u
#define COMMPLANE_CAR_MAX_WORLD 64
#define COMMPLANE_CAR_MAX_REGIONS 256
#define COMMPLANE_CAR_DEFAULT_CHUNK 65536u
#define COMMPLANE_CAR_FLIGHT_RECORDS 512

enum commplane_car_status {
    COMMPLANE_CAR_OK = 0,
    COMMPLANE_CAR_EINVAL = -1,       /* an argument is out of its range */
    COMMPLANE_CAR_ENOMEM = -2,       /* the process is out of memory */
    COMMPLANE_CAR_ESYS = -3,         /* a system call failed: the text has errno's words */
    COMMPLANE_CAR_ENOSPC = -4,       /* shared memory is full (or its cgroup is) */
    COMMPLANE_CAR_EEXIST = -5,       /* a segment of that name exists */
    COMMPLANE_CAR_ENOENT = -6,       /* no segment, or no registration, of that name */
    COMMPLANE_CAR_ESIZE = -7,        /* the segment's size is not the one expected */
    COMMPLANE_CAR_EPERM = -8,        /* the segment belongs to another user */
    COMMPLANE_CAR_ETIMEDOUT = -9,    /* a peer did not arrive: status_detail names it */
    COMMPLANE_CAR_EABORTED = -10,    /* a rank called abort, or timed out itself */
    COMMPLANE_CAR_EMISMATCH = -11,   /* the ranks made different calls: status_detail has them */
    COMMPLANE_CAR_EPOISONED = -12,   /* an earlier call of this communicator failed */
    COMMPLANE_CAR_ECLOSED = -13,     /* the communicator is closed */
    COMMPLANE_CAR_EBUSY = -14,       /* in use: by another thread, or a segment by a communicator */
    COMMPLANE_CAR_EUNSUPPORTED = -15,/* this CPU, dtype or op is not served */
    COMMPLANE_CAR_ELIMIT = -16,      /* a fixed table is full */
    COMMPLANE_CAR_EPEERDEAD = -17,   /* a peer's process has ended: status_detail names it */
    COMMPLANE_CAR_EINTERRUPTED = -18 /* the interrupt check asked to stop waiting */
};

enum commplane_car_dtype {
    COMMPLANE_CAR_FLOAT32 = 1,
    COMMPLANE_CAR_FLOAT16 = 2,
    COMMPLANE_CAR_BFLOAT16 = 3,
    COMMPLANE_CAR_FLOAT64 = 4,
    COMMPLANE_CAR_INT32 = 5,
    COMMPLANE_CAR_INT64 = 6,
    COMMPLANE_CAR_INT8 = 7,
    COMMPLANE_CAR_UINT8 = 8
};

enum commplane_car_op {
    COMMPLANE_CAR_SUM = 1,
    COMMPLANE_CAR_MIN = 2,
    COMMPLANE_CAR_MAX = 3,
    COMMPLANE_CAR_AVG = 4 /* floating point only */
};

enum commplane_car_kind {
    COMMPLANE_CAR_KIND_NONE = 0,
    COMMPLANE_CAR_KIND_ALL_REDUCE = 1,
    COMMPLANE_CAR_KIND_BARRIER = 2,
    COMMPLANE_CAR_KIND_ALL_GATHER = 3,
    COMMPLANE_CAR_KIND_REDUCE_SCATTER = 4,
    COMMPLANE_CAR_KIND_BROADCAST = 5,
    COMMPLANE_CAR_KIND_ALL_REDUCE_RMS_NORM = 6
};

typedef struct commplane_car_segment commplane_car_segment;
typedef struct commplane_car_comm commplane_car_comm;

typedef struct commplane_car_options {
    uint32_t size;
    uint32_t rank;
    uint32_t world_size;     /* 2..64 */
    uint32_t oversubscribed; /* 1: more ranks than cores, so a wait yields at once; 0: it spins some tens of us first */
    uint64_t staging_bytes;  /* per rank, split into 4 ring slots; at least 256 */
    uint64_t chunk_bytes;    /* a multiple of 64, 0 for 64 KiB; a slot is min(chunk_bytes, staging_bytes / 4), at least
                                8 * world_size */
    uint64_t timeout_ns;     /* the most that one wait for peers may take; 0 is refused */
    uint64_t token;          /* any value, equal on all ranks: tells two generations of one group apart */
} commplane_car_options;

typedef struct commplane_car_layout_info {
    uint32_t size;
    uint32_t reserved;
    uint64_t total_bytes; /* of the segment */
    uint64_t part_offset; /* of options->rank's own part, a multiple of 4096 */
    uint64_t part_bytes;  /* the same for every rank */
} commplane_car_layout_info;

typedef struct commplane_car_call { /* one rank's view of one call */
    uint32_t kind;      /* enum commplane_car_kind */
    uint32_t dtype;     /* 0 for a barrier */
    uint32_t op;        /* 0 where nothing is reduced */
    uint32_t symmetric; /* 0 staged, 1 the input lies in a registered region */
    uint32_t in_place;
    uint32_t region;    /* symmetric calls only: the registration's id */
    uint64_t count;     /* elements, as the function was given them */
    uint64_t offset;    /* symmetric calls only: bytes from the start of the rank's part */
    uint64_t hidden;    /* all_reduce_rms_norm: elements of a row */
    uint32_t root;      /* broadcast */
    float eps;          /* all_reduce_rms_norm */
    float weight_bias;  /* all_reduce_rms_norm */
    uint32_t reserved;
} commplane_car_call;

typedef struct commplane_car_detail {
    uint32_t size;
    int32_t status;         /* of the call that poisoned the communicator; 0 if none did */
    uint64_t sequence;      /* calls begun on this communicator, the failed one included */
    uint64_t missing_mask;  /* bit r: rank r had not arrived; after an abort, the ranks whose absence made a peer abort */
    uint64_t mismatch_mask; /* bit r: rank r made another call than this rank, see peers[r] */
    uint64_t abort_mask;    /* bit r: rank r has aborted */
    uint64_t dead_mask;     /* bit r: rank r is missing and its process has ended */
    commplane_car_call mine;
    commplane_car_call peers[COMMPLANE_CAR_MAX_WORLD]; /* filled for the ranks in mismatch_mask */
} commplane_car_detail;

typedef struct commplane_car_flight_record { /* one call of the flight recorder */
    uint64_t sequence;
    int32_t status;        /* 1 while it runs, else what it returned */
    uint32_t steps;        /* flag hops it took */
    uint64_t begun_ns;     /* CLOCK_MONOTONIC */
    uint64_t ended_ns;     /* 0 while it runs */
    uint64_t waiting_mask; /* bit r: the call has waited for rank r for some time already */
    commplane_car_call call;
} commplane_car_flight_record;

/* major << 16 | minor. A different major is another ABI; a larger minor only adds. */
COMMPLANE_CAR_API uint32_t commplane_car_abi_version(void);
COMMPLANE_CAR_API const char* commplane_car_last_error(void);
COMMPLANE_CAR_API const char* commplane_car_status_name(int status);

/* The vector code in use: "baseline", "avx2" or "avx512". All give the same bits. Process-wide. set_isa takes one of
 * these or "auto" and returns EUNSUPPORTED if the CPU (or the build) lacks it. */
COMMPLANE_CAR_API const char* commplane_car_isa(void);
COMMPLANE_CAR_API int commplane_car_set_isa(const char* name);

/* Segments (local calls). A name is 1..200 characters without '/', an optional leading '/' apart.
 * create: makes it exclusively, mode 0600, zero-filled, no pages allocated yet.
 * map: opens it, checks owner and size, maps all of it and allocates the pages of [reserve_offset, +reserve_bytes) now, so
 *   that they come from the caller's NUMA node and a full /dev/shm is ENOSPC here and not a SIGBUS later.
 * unmap: EBUSY while a communicator is open on it. unlink: a name that is not there is no error. */
COMMPLANE_CAR_API int commplane_car_segment_create(const char* name, uint64_t bytes);
COMMPLANE_CAR_API int commplane_car_segment_map(const char* name, uint64_t bytes, uint64_t reserve_offset,
                                                uint64_t reserve_bytes, commplane_car_segment** out);
COMMPLANE_CAR_API void* commplane_car_segment_base(const commplane_car_segment* segment);
COMMPLANE_CAR_API uint64_t commplane_car_segment_bytes(const commplane_car_segment* segment);
COMMPLANE_CAR_API int commplane_car_segment_unmap(commplane_car_segment* segment);
COMMPLANE_CAR_API int commplane_car_segment_unlink(const char* name);

/* Bytes that a group needs, and where options->rank's own part lies (local; uses rank, world_size, staging_bytes). */
COMMPLANE_CAR_API int commplane_car_layout(const commplane_car_options* options, commplane_car_layout_info* out);

/* Local. The segment has to be fresh: one communicator a rank in its whole life. Writes nothing but this rank's control
 * line; the first collective call checks that every peer opened with the same geometry and token. */
COMMPLANE_CAR_API int commplane_car_comm_open(const commplane_car_options* options, commplane_car_segment* segment,
                                              commplane_car_comm** out);
/* Local. Later calls with this handle return ECLOSED: the handle itself (about 12 KiB) is kept to the process's end, so
 * that a stale handle is an error and not a crash. EBUSY while a call runs. */
COMMPLANE_CAR_API int commplane_car_comm_close(commplane_car_comm* comm);
COMMPLANE_CAR_API int commplane_car_set_timeout(commplane_car_comm* comm, uint64_t timeout_ns);
/* The bytes that one flag hop carries: a message up to this size costs exactly one. */
COMMPLANE_CAR_API uint64_t commplane_car_chunk_bytes(const commplane_car_comm* comm);

/* Rank r's part is [base + r * stride, + bytes). Local; `id`, 1 to 65535, is the caller's name for it and the same on every
 * rank. Several processes map the same pages at base; the caller keeps them mapped until unregister. */
COMMPLANE_CAR_API int commplane_car_register_symmetric(commplane_car_comm* comm, void* base, uint64_t stride,
                                                       uint64_t bytes, uint32_t id);
COMMPLANE_CAR_API int commplane_car_unregister_symmetric(commplane_car_comm* comm, uint32_t id);

/* The collectives. Counts are elements, any up to 2^48 - 1; 0 still meets and compares. Any alignment. Every rank passes the
 * same counts, dtype, op, root, eps; if the input lies in a registered region it does so on every rank, at the same offset.
 * The output is complete, and the input the caller's again, on return.
 *
 * Reductions go in rank order 0..N-1 on every rank, so the result is bitwise equal everywhere, whichever path and vector code
 * runs; a NaN result is always the positive quiet NaN. float16 and bfloat16 accumulate in float32 and round once, to nearest
 * even. avg is (sum in float32) / world_size; integers wrap and have no avg.
 *
 * all_reduce: in == out is in place, otherwise they must not overlap.
 * all_gather: `out` has world_size * count elements, in rank order; `in` may be this rank's part of it.
 * reduce_scatter: `in` has world_size * count elements; `out` gets part `rank` of their reduction and may be that part of `in`.
 * broadcast: fills `buffer` from rank `root`'s.
 * all_reduce_rms_norm: sum the ranks' `in` [rows, hidden] and round to the dtype, add `residual`, round: `residual_out`. Then
 *   norm_out = round(v * (1 / sqrt(mean of v*v over the row + eps)) * (weight_bias + weight)) with v the rounded residual_out,
 *   in float32. float32, float16 and bfloat16. residual_out may be residual, and norm_out may be in; otherwise no output may
 *   overlap anything. `residual`, `weight` [hidden] are local and equal on all ranks, which is not checked. */
COMMPLANE_CAR_API int commplane_car_all_reduce(commplane_car_comm* comm, const void* in, void* out, uint64_t count,
                                               int dtype, int op);
COMMPLANE_CAR_API int commplane_car_all_gather(commplane_car_comm* comm, const void* in, void* out, uint64_t count, int dtype);
COMMPLANE_CAR_API int commplane_car_reduce_scatter(commplane_car_comm* comm, const void* in, void* out, uint64_t count,
                                                   int dtype, int op);
COMMPLANE_CAR_API int commplane_car_broadcast(commplane_car_comm* comm, void* buffer, uint64_t count, int dtype, uint32_t root);
COMMPLANE_CAR_API int commplane_car_all_reduce_rms_norm(commplane_car_comm* comm, const void* in, const void* residual,
                                                        const void* weight, void* norm_out, void* residual_out,
                                                        uint64_t rows, uint64_t hidden, int dtype, float eps,
                                                        float weight_bias);
COMMPLANE_CAR_API int commplane_car_barrier(commplane_car_comm* comm);

/* Single copy: large staged all-reduces read the peers' memory directly (process_vm_readv, which needs the permission to
 * ptrace them). probe is local, after every rank has opened: OK if this process can read every peer, else ESYS. enable is
 * local, the same on every rank: from `min_bytes` up to `max_bytes` a message goes that way; 0, 0 disables. range: where it was
 * measured to be faster than staging. */
COMMPLANE_CAR_API void commplane_car_single_copy_range(uint32_t world_size, uint64_t* min_bytes, uint64_t* max_bytes);
COMMPLANE_CAR_API int commplane_car_single_copy_probe(commplane_car_comm* comm);
COMMPLANE_CAR_API int commplane_car_single_copy_enable(commplane_car_comm* comm, uint64_t min_bytes, uint64_t max_bytes);

/* The flight recorder: the last calls, oldest first, COMMPLANE_CAR_FLIGHT_RECORDS at most. Local, from any thread, also while a
 * call runs. `record_bytes` is the sizeof that the caller was built with; *count is how many were written. */
COMMPLANE_CAR_API int commplane_car_flight(commplane_car_comm* comm, void* records, uint64_t record_bytes, uint64_t capacity,
                                           uint64_t* count);

/* Process-wide: `check` is called every 20 ms or so from a thread that waits for peers; not 0 ends its call with
 * EINTERRUPTED. Null takes it back. */
COMMPLANE_CAR_API void commplane_car_set_interrupt_check(int (*check)(void));

/* Local, any thread: every rank that waits or arrives later gets EABORTED. */
COMMPLANE_CAR_API int commplane_car_abort(commplane_car_comm* comm);
/* Local. What is known about the failure that poisoned the communicator. */
COMMPLANE_CAR_API int commplane_car_status_detail(const commplane_car_comm* comm, commplane_car_detail* out);

#ifdef __cplusplus
}
#endif
#endif
