// SPDX-License-Identifier: Apache-2.0
// AVX-512 F, BW, VL, DQ.
#include "vector_avx512.h"

namespace commplane_car {

const ReduceTable kReduceAvx512 = CAR_KERNEL_TABLE(Avx512, "avx512");

}  // namespace commplane_car
