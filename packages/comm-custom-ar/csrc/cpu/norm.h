// SPDX-License-Identifier: Apache-2.0
// The arithmetic of all_reduce_rms_norm on pieces of a row; one table of functions per instruction set, all with the same bits.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace commplane_car {

// The squares of a row are summed in 32 lanes, element i in lane i % 32, and the lanes in a fixed tree: so the sum does not
// depend on the vector width, nor on how a row is cut into pieces, as long as pieces begin at a multiple of 32 elements.
constexpr size_t kNormLanes = 32;

struct NormKernels {
    // residual_out = round(round(sum over r of src[r]) + residual), and its squares are added to `lanes`. residual_out may be
    // residual or one of the sources. Elements may have any alignment.
    void (*accumulate)(const void* const* src, uint32_t sources, const void* residual, void* residual_out, size_t count,
                       float* lanes);
    // The sum over all lanes.
    float (*total)(const float* lanes);
    // norm_out = round(v * inverse * (weight_bias + weight)).
    void (*scale)(const void* v, const void* weight, void* norm_out, size_t count, float inverse, float weight_bias);
};

}  // namespace commplane_car
