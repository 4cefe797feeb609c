// SPDX-License-Identifier: Apache-2.0
//
// What the device code needs of a machine, for CUDA and, where there is no GPU, for host threads that stand in for blocks: the
// same kernels then run under g++ in the tests (see host_machine.h). Words are moved with relaxed order and system scope, so they may cross
// GPUs; what orders them is said where it matters.
#pragma once

#include "layout.h"

#if defined(__CUDACC__)
#define CAR_FN __device__ __forceinline__
#define CAR_UNROLL _Pragma("unroll")
#else
#define CAR_FN inline
#define CAR_UNROLL
#endif

namespace car {
namespace gpu {

#if defined(__CUDACC__)

CAR_FN Vec load(const void* at) {
    Vec v;
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(at) : "memory");
    return v;
}
CAR_FN void store(void* at, const Vec& v) {
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(at), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3]) : "memory");
}
// Shared with other GPUs. A vector may arrive in pieces of 4 bytes.
CAR_FN Vec load_shared(const void* at) {
    Vec v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "l"(at)
                 : "memory");
    return v;
}
CAR_FN void store_shared(void* at, const Vec& v) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(at), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3]) : "memory");
}
CAR_FN uint32_t load_acquire(const uint32_t* at) {
    uint32_t v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}
CAR_FN void store_release(uint32_t* at, uint32_t v) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory");
}
CAR_FN uint32_t load_relaxed(const uint32_t* at) {
    uint32_t v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}
CAR_FN void store_relaxed(uint32_t* at, uint32_t v) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory");
}
CAR_FN uint32_t exchange(uint32_t* at, uint32_t v) { return atomicExch(at, v); }
CAR_FN uint64_t now_ns() {
    uint64_t t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

// The block that runs this code. Its last warp may be set apart to talk about the call (`control` is 32, else 0) while the other
// threads move the data.
struct Block {
    uint32_t control;

    CAR_FN uint32_t thread() const { return threadIdx.x; }
    CAR_FN uint32_t threads() const { return blockDim.x - control; }
    CAR_FN uint32_t block() const { return blockIdx.x; }
    CAR_FN uint32_t blocks() const { return gridDim.x; }
    // Meetings of the threads that move data.
    CAR_FN void sync() const { asm volatile("barrier.sync 1, %0;" ::"r"(threads()) : "memory"); }
    CAR_FN bool any(bool mine) const {
        uint32_t out;
        asm volatile("{ .reg .pred p, q; setp.ne.u32 p, %1, 0; barrier.red.or.pred q, 1, %2, p; selp.u32 %0, 1, 0, q; }"
                     : "=r"(out)
                     : "r"(uint32_t(mine)), "r"(threads())
                     : "memory");
        return out != 0;
    }
    // The control warp waits in `heard_all` until all others have been in `heard`, which does not wait.
    CAR_FN void heard() const { asm volatile("barrier.arrive 2, %0;" ::"r"(blockDim.x) : "memory"); }
    CAR_FN void heard_all() const { asm volatile("barrier.sync 2, %0;" ::"r"(blockDim.x) : "memory"); }
    // The sum over the threads that move data, added in one order; all of them meet here and get it.
    CAR_FN float add(float mine) const {
        __shared__ float of_warp[32];
        CAR_UNROLL
        for (int i = 16; i > 0; i /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, i);
        sync();  // of a former call nobody reads any more
        if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
        sync();
        float total = threadIdx.x % 32 < threads() / 32 ? of_warp[threadIdx.x % 32] : 0.0f;
        CAR_UNROLL
        for (int i = 16; i > 0; i /= 2) total += __shfl_xor_sync(0xffffffffu, total, i);
        return total;
    }
    // What the grid before this one in the stream wrote is there (programmatic dependent launch).
    CAR_FN void await_previous() const {
#if __CUDA_ARCH__ >= 900
        asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    }
    CAR_FN void let_next_start() const {
#if __CUDA_ARCH__ >= 900
        asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
    }
};

// Have the value now: the arguments of a kernel are slow to read the first time, and here there is time for it.
template <class P>
CAR_FN P* ready(P* p) {
    asm volatile("" : "+l"(p));
    return p;
}

#endif

}  // namespace gpu
}  // namespace car

#if !defined(__CUDACC__)
#include "host_machine.h"
#endif
