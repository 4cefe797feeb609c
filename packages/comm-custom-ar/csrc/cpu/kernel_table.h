// SPDX-License-Identifier: Apache-2.0
// The table of one instruction set. Included once by each reduce_*.cc, after the flags of its compilation are known.
#pragma once

#include "norm_kernels.h"
#include "reduce_kernels.h"
#include "reduce_plain.h"

#define CAR_KERNEL_TABLE(V, name)                                                                                       \
    {                                                                                                                   \
        name,                                                                                                           \
            {CAR_REDUCE_ROW(V, AsFloat32), CAR_REDUCE_ROW(V, AsFloat16), CAR_REDUCE_ROW(V, AsBfloat16),                 \
             CAR_PLAIN_FLOAT_ROW(double), CAR_PLAIN_INTEGER_ROW(int32_t, uint32_t),                                     \
             CAR_PLAIN_INTEGER_ROW(int64_t, uint64_t), CAR_PLAIN_INTEGER_ROW(int8_t, uint8_t),                          \
             CAR_PLAIN_INTEGER_ROW(uint8_t, uint8_t)},                                                                  \
            {CAR_NORM_KERNELS(V, AsFloat32), CAR_NORM_KERNELS(V, AsFloat16), CAR_NORM_KERNELS(V, AsBfloat16)},          \
    }
