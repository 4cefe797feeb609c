// SPDX-License-Identifier: Apache-2.0
// The arithmetic: one table of functions per instruction set, all of which give the same bits.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "norm.h"

namespace commplane_car {

// dst[d][i] = op over r of src[r][i], r = 0..sources-1 in this order, for every d. A dst may be one of the srcs. Pointers
// need no alignment. avg divides by `sources`.
using ReduceFunction = void (*)(void* const* dst, uint32_t targets, const void* const* src, uint32_t sources, size_t count);

struct ReduceTable {
    const char* name;
    ReduceFunction reduce[8][4];  // [dtype - 1][op - 1]; null: no mean of integers
    NormKernels norm[3];          // [dtype - 1]: float32, float16, bfloat16
};

extern const ReduceTable kReduceBaseline;
#if defined(__x86_64__)
extern const ReduceTable kReduceAvx2;
extern const ReduceTable kReduceAvx512;
extern const ReduceTable kReduceAvx512Bf16;
#endif

// The table in use. Chosen by CPU detection when the library is loaded; set_isa changes it for the whole process.
const ReduceTable& reduce_table();
int set_isa(const char* name);

// Results must not depend on what the application did to the floating-point control register (flush to zero, rounding
// mode): this puts the default in force for its scope, and costs one read of the register if it is so already.
class DefaultRounding {
  public:
    DefaultRounding();
    ~DefaultRounding();
    DefaultRounding(const DefaultRounding&) = delete;
    DefaultRounding& operator=(const DefaultRounding&) = delete;

  private:
    uint64_t saved_;
    bool changed_;
};

}  // namespace commplane_car
