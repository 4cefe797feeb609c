// SPDX-License-Identifier: Apache-2.0
#include "kernel.cuh"
#include "one_shot_push.h"

namespace car {
namespace gpu {
namespace {

template <class T, int N, int U>
__global__ void __launch_bounds__(kMostThreads + 32)
    kernel(const __grid_constant__ Group g, const void* in, void* out, uint64_t count, bool aligned) {
    one_shot_push<T, N, U>(Block{32}, g, in, out, count, aligned);
}

}  // namespace

cudaError_t launch_one_shot_push(const Launch& how, const Group& g, int dtype, const void* in, void* out, uint64_t count,
                                 bool aligned, bool few) {
    const Launch with_control = {how.stream, how.blocks, how.threads + 32, how.early};
    return by_dtype(dtype, [&](auto t) {
        typedef decltype(t) T;
        return by_ranks(g.ranks, [&](auto n) {
            constexpr int N = decltype(n)::value, U = N == 2 ? 4 : N == 4 ? 2 : 1;
            return start(with_control, few ? kernel<T, N, 1> : kernel<T, N, U>, g, in, out, count, aligned);
        });
    });
}

}  // namespace gpu
}  // namespace car
