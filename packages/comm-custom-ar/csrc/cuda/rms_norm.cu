// SPDX-License-Identifier: Apache-2.0
#include "rms_norm.h"

#include "kernel.cuh"

namespace car {
namespace gpu {
namespace {

template <class T, int N, int V>
__global__ void __launch_bounds__(kMostThreads + 32) fused(const __grid_constant__ Group g, const void* in, const __grid_constant__ Norm norm) {
    all_reduce_rms_norm<T, N, V>(Block{32}, g, in, norm);
}

template <class T>
__global__ void __launch_bounds__(kMostThreads + 32) alone(const void* total, const __grid_constant__ Norm norm, bool aligned) {
    add_rms_norm<T>(Block{0}, total, norm, aligned);
}

}  // namespace

cudaError_t launch_all_reduce_rms_norm(const Launch& how, const Group& g, int dtype, const void* in, const Norm& norm) {
    const Launch with_control = {how.stream, how.blocks, how.threads + 32, how.early};
    return by_dtype(dtype, [&](auto t) {
        typedef decltype(t) T;
        return by_ranks(g.ranks, [&](auto n) {
            constexpr int N = decltype(n)::value;
            const bool few = norm.hidden <= uint64_t(how.threads) * T::kPerVec;
            return start(with_control, few ? fused<T, N, 1> : fused<T, N, 4>, g, in, norm);
        });
    });
}

cudaError_t launch_add_rms_norm(const Launch& how, int dtype, const void* total, const Norm& norm, bool aligned) {
    return by_dtype(dtype, [&](auto t) { return start(how, alone<decltype(t)>, total, norm, aligned); });
}

}  // namespace gpu
}  // namespace car
