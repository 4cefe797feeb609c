// SPDX-License-Identifier: Apache-2.0
#include "all_reduce_pull.h"
#include "kernel.cuh"

namespace car {
namespace gpu {
namespace {

template <class T, int N, int U>
__global__ void __launch_bounds__(kMostThreads)
    one_shot(const __grid_constant__ Group g, const __grid_constant__ Row row, void* out, uint64_t count) {
    one_shot_pull<T, N, U>(Block{0}, g, row.table != nullptr ? row.table : row.direct, out, count);
}

template <class T, int N, int U>
__global__ void __launch_bounds__(kMostThreads)
    two_shot(const __grid_constant__ Group g, const __grid_constant__ Row row, uint64_t count) {
    two_shot_pull<T, N, U>(Block{0}, g, row.table != nullptr ? row.table : row.direct, count);
}

}  // namespace

cudaError_t launch_one_shot_pull(const Launch& how, const Group& g, int dtype, const Row& row, void* out, uint64_t count) {
    return by_dtype(dtype, [&](auto t) {
        return by_ranks(g.ranks, [&](auto n) {
            constexpr int N = decltype(n)::value, U = N == 2 ? 4 : N == 4 ? 2 : 1;
            return start(how, one_shot<decltype(t), N, U>, g, row, out, count);
        });
    });
}

cudaError_t launch_two_shot_pull(const Launch& how, const Group& g, int dtype, const Row& row, uint64_t count) {
    return by_dtype(dtype, [&](auto t) {
        return by_ranks(g.ranks, [&](auto n) {
            constexpr int N = decltype(n)::value, U = N == 2 ? 4 : N == 4 ? 2 : 1;
            return start(how, two_shot<decltype(t), N, U>, g, row, count);
        });
    });
}

}  // namespace gpu
}  // namespace car
