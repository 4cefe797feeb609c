/* SPDX-License-Identifier: Apache-2.0
 *
 * commplane_car: all-reduce and barrier between processes of one Linux host over POSIX shared memory. C99.
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

#define COMMPLANE_CAR_ABI_MAJOR 1u
#define COMMPLANE_CAR_ABI_MINOR 0u
#define COMMPLANE_CAR_MAX_WORLD 64
#define COMMPLANE_CAR_MAX_REGIONS 256
#define COMMPLANE_CAR_DEFAULT_CHUNK 65536u

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
    COMMPLANE_CAR_ELIMIT = -16       /* a fixed table is full */
};

enum commplane_car_dtype {
    COMMPLANE_CAR_FLOAT32 = 1,
    COMMPLANE_CAR_FLOAT16 = 2,
    COMMPLANE_CAR_BFLOAT16 = 3
};

enum commplane_car_op {
    COMMPLANE_CAR_SUM = 1,
    COMMPLANE_CAR_MIN = 2,
    COMMPLANE_CAR_MAX = 3,
    COMMPLANE_CAR_AVG = 4
};

enum commplane_car_kind {
    COMMPLANE_CAR_KIND_NONE = 0,
    COMMPLANE_CAR_KIND_ALL_REDUCE = 1,
    COMMPLANE_CAR_KIND_BARRIER = 2
};

typedef struct commplane_car_segment commplane_car_segment;
typedef struct commplane_car_comm commplane_car_comm;

typedef struct commplane_car_options {
    uint32_t size;
    uint32_t rank;
    uint32_t world_size;     /* 2..64 */
    uint32_t oversubscribed; /* 1: more ranks than cores, so a wait yields at once; 0: it spins some tens of us first */
    uint64_t staging_bytes;  /* per rank, split into 4 ring slots; at least 256 */
    uint64_t chunk_bytes;    /* a multiple of 64, 0 for 64 KiB; a slot is min(chunk_bytes, staging_bytes / 4) */
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
    uint32_t op;        /* 0 for a barrier */
    uint32_t symmetric; /* 0 staged, 1 the input lies in a registered region */
    uint32_t in_place;  /* symmetric calls only */
    uint32_t region;    /* symmetric calls only: the registration's id */
    uint64_t count;
    uint64_t offset; /* symmetric calls only: bytes from the start of the rank's part */
} commplane_car_call;

typedef struct commplane_car_detail {
    uint32_t size;
    int32_t status;         /* of the call that poisoned the communicator; 0 if none did */
    uint64_t sequence;      /* calls begun on this communicator, the failed one included */
    uint64_t missing_mask;  /* bit r: rank r had not arrived */
    uint64_t mismatch_mask; /* bit r: rank r made another call than this rank, see peers[r] */
    uint64_t abort_mask;    /* bit r: rank r has aborted */
    commplane_car_call mine;
    commplane_car_call peers[COMMPLANE_CAR_MAX_WORLD]; /* filled for the ranks in mismatch_mask */
} commplane_car_detail;

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

/* Collective. in == out is in place, otherwise they must not overlap. Any alignment, any count up to 2^48 - 1; 0 still
 * meets and compares. Reduces in rank order 0..N-1 on every rank, so the result is bitwise equal everywhere, whichever
 * path and vector code runs; a NaN result is always the positive quiet NaN. float16 and bfloat16 accumulate in float32
 * and round once, to nearest even. avg is (sum in float32) / world_size. */
COMMPLANE_CAR_API int commplane_car_all_reduce(commplane_car_comm* comm, const void* in, void* out, uint64_t count,
                                               int dtype, int op);
/* Collective. */
COMMPLANE_CAR_API int commplane_car_barrier(commplane_car_comm* comm);
/* Local, any thread: every rank that waits or arrives later gets EABORTED. */
COMMPLANE_CAR_API int commplane_car_abort(commplane_car_comm* comm);
/* Local. What is known about the failure that poisoned the communicator. */
COMMPLANE_CAR_API int commplane_car_status_detail(const commplane_car_comm* comm, commplane_car_detail* out);

#ifdef __cplusplus
}
#endif
#endif
