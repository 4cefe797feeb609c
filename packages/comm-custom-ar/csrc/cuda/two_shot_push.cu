// SPDX-License-Identifier: Apache-2.0
#include "two_shot_push.h"

#include "kernel.cuh"

namespace car {
namespace gpu {
namespace {

template <class T, int N>
__global__ void __launch_bounds__(kMostThreads)
    kernel(const __grid_constant__ Group g, const void* in, void* out, uint64_t count, bool aligned) {
    two_shot_push<T, N>(Block{0}, g, in, out, count, aligned);
}

}  // namespace

cudaError_t launch_two_shot_push(const Launch& how, const Group& g, int dtype, const void* in, void* out, uint64_t count,
                                  bool aligned) {
    return by_dtype(dtype, [&](auto t) {
        return by_ranks(g.ranks, [&](auto n) {
            return start(how, kernel<decltype(t), decltype(n)::value>, g, in, out, count, aligned);
        });
    });
}

}  // namespace gpu
}  // namespace car
