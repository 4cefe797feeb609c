// SPDX-License-Identifier: Apache-2.0
//
// How a templated kernel is chosen and launched. The number of ranks is a bound for unrolling: 2, 4 or 8.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "launch.h"
#include "numbers.h"
#include "session.h"

namespace car {
namespace gpu {

template <class... Wanted, class... Given>
cudaError_t start(const Launch& how, void (*kernel)(Wanted...), const Given&... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(how.blocks);
    config.blockDim = dim3(how.threads);
    config.stream = how.stream;
    cudaLaunchAttribute early[1];
    early[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early[0].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = early;
    config.numAttrs = how.early ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Wanted>(arguments)...);
}

template <class F>
cudaError_t by_dtype(int dtype, F f) {
    if (dtype == 1) return f(Float32());
    if (dtype == 2) return f(Float16());
    return f(BFloat16());
}

template <int N>
using Ranks = std::integral_constant<int, N>;

template <class F>
cudaError_t by_ranks(uint32_t ranks, F f) {
    if (ranks <= 2) return f(Ranks<2>());
    if (ranks <= 4) return f(Ranks<4>());
    return f(Ranks<8>());
}

}  // namespace gpu
}  // namespace car
