// SPDX-License-Identifier: Apache-2.0
#include "kernel.cuh"
#include "two_shot_push.h"

namespace car {
namespace gpu {
namespace {

// Two blocks on a multiprocessor. Eight ranks have one (comm.cc), but with more than 96 registers they were a tenth slower.
template <class T, int N>
__global__ void __launch_bounds__(kTwoShotThreads + 32, 2)
    kernel(const __grid_constant__ Group g, const void* in, void* out, uint64_t count, bool aligned) {
    two_shot_push<T, N>(Block{32}, g, in, out, count, aligned);
}

}  // namespace

cudaError_t launch_two_shot_push(const Launch& how, const Group& g, int dtype, const void* in, void* out, uint64_t count,
                                 bool aligned) {
    const Launch with_control = {how.stream, how.blocks, how.threads + 32, how.early};
    return by_dtype(dtype, [&](auto t) {
        return by_ranks(g.ranks, [&](auto n) {
            return start(with_control, kernel<decltype(t), decltype(n)::value>, g, in, out, count, aligned);
        });
    });
}

}  // namespace gpu
}  // namespace car
