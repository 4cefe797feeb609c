// SPDX-License-Identifier: Apache-2.0
#include "kernel.cuh"
#include "one_shot_ring.h"

namespace car {
namespace gpu {
namespace {

template <class T, int N, int U>
__global__ void __launch_bounds__(kMostThreads)
    kernel(const __grid_constant__ Group g, const void* in, void* out, uint64_t count, bool aligned) {
    one_shot_ring<T, N, U>(Block{0}, g, in, out, count, aligned);
}

}  // namespace

cudaError_t launch_one_shot_ring(const Launch& how, const Group& g, int dtype, const void* in, void* out, uint64_t count,
                                 bool aligned) {
    return by_dtype(dtype, [&](auto t) {
        return by_ranks(g.ranks, [&](auto n) {
            constexpr int N = decltype(n)::value, U = ring_unroll(N);
            return start(how, kernel<decltype(t), N, U>, g, in, out, count, aligned);
        });
    });
}

}  // namespace gpu
}  // namespace car
