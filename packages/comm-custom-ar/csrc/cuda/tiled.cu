// SPDX-License-Identifier: Apache-2.0
#include "all_reduce_tiled.h"
#include "kernel.cuh"

namespace car {
namespace gpu {
namespace {

template <class T, int N, int U>
__global__ void __launch_bounds__(kMostThreads)
    one_shot(const __grid_constant__ Group g, const void* in, void* out, uint64_t count, bool aligned) {
    one_shot_tiled<T, N, U>(Block{0}, g, in, out, count, aligned);
}

template <class T, int N>
__global__ void __launch_bounds__(kMostThreads)
    two_shot(const __grid_constant__ Group g, const void* in, void* out, uint64_t count, bool aligned) {
    two_shot_tiled<T, N>(Block{0}, g, in, out, count, aligned);
}

}  // namespace

cudaError_t launch_one_shot_tiled(const Launch& how, const Group& g, int dtype, const void* in, void* out, uint64_t count,
                                  bool aligned) {
    return by_dtype(dtype, [&](auto t) {
        return by_ranks(g.ranks, [&](auto n) {
            constexpr int N = decltype(n)::value, U = N == 2 ? 4 : N == 4 ? 2 : 1;
            return start(how, one_shot<decltype(t), N, U>, g, in, out, count, aligned);
        });
    });
}

cudaError_t launch_two_shot_tiled(const Launch& how, const Group& g, int dtype, const void* in, void* out, uint64_t count,
                                  bool aligned) {
    return by_dtype(dtype, [&](auto t) {
        return by_ranks(g.ranks, [&](auto n) {
            return start(how, two_shot<decltype(t), decltype(n)::value>, g, in, out, count, aligned);
        });
    });
}

}  // namespace gpu
}  // namespace car
