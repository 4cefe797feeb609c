// SPDX-License-Identifier: Apache-2.0
//
// Vectors of 16 bytes as numbers: summed in float32 in the order they are added in, rounded once.
#pragma once

#include "machine.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace car {
namespace gpu {

struct Float32 {
    static constexpr int kPerVec = 4;
    typedef uint32_t Raw;
    CAR_FN static void widen(const Vec& v, float* out) {
        CAR_UNROLL
        for (int i = 0; i < 4; ++i) {
#if defined(__CUDACC__)
            out[i] = __uint_as_float(v.w[i]);
#else
            __builtin_memcpy(&out[i], &v.w[i], 4);
#endif
        }
    }
    CAR_FN static Vec narrow(const float* in) {
        Vec v;
        CAR_UNROLL
        for (int i = 0; i < 4; ++i) {
#if defined(__CUDACC__)
            v.w[i] = __float_as_uint(in[i]);
#else
            __builtin_memcpy(&v.w[i], &in[i], 4);
#endif
        }
        return v;
    }
};

#if defined(__CUDACC__)

struct Float16 {
    static constexpr int kPerVec = 8;
    typedef uint16_t Raw;
    CAR_FN static void widen(const Vec& v, float* out) {
        CAR_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&v.w[i]));
            out[2 * i] = f.x;
            out[2 * i + 1] = f.y;
        }
    }
    CAR_FN static Vec narrow(const float* in) {
        Vec v;
        CAR_UNROLL
        for (int i = 0; i < 4; ++i) *reinterpret_cast<__half2*>(&v.w[i]) = __floats2half2_rn(in[2 * i], in[2 * i + 1]);
        return v;
    }
};

struct BFloat16 {
    static constexpr int kPerVec = 8;
    typedef uint16_t Raw;
    CAR_FN static void widen(const Vec& v, float* out) {
        CAR_UNROLL
        for (int i = 0; i < 4; ++i) {
            out[2 * i] = __uint_as_float(v.w[i] << 16);
            out[2 * i + 1] = __uint_as_float(v.w[i] & 0xffff0000u);
        }
    }
    CAR_FN static Vec narrow(const float* in) {
        Vec v;
        CAR_UNROLL
        for (int i = 0; i < 4; ++i) *reinterpret_cast<__nv_bfloat162*>(&v.w[i]) = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
        return v;
    }
};

#endif

// The sum of the vectors of ranks 0..n-1, in that order. It begins with rank 0's own value and not with zero, so -0 stays -0.
template <class T, int N>
CAR_FN Vec sum(const Vec* of_rank, int n) {
    float total[T::kPerVec];
    T::widen(of_rank[0], total);
    CAR_UNROLL
    for (int r = 1; r < N; ++r) {
        if (r < n) {
            float more[T::kPerVec];
            T::widen(of_rank[r], more);
            CAR_UNROLL
            for (int i = 0; i < T::kPerVec; ++i) total[i] += more[i];
        }
    }
    return T::narrow(total);
}

// The vector that begins at element `first` of `count`, zeros behind the end. `aligned`: whether the array begins at 16 bytes.
template <class T>
CAR_FN Vec load_some(const void* array, uint64_t first, uint64_t count, bool aligned) {
    typedef typename T::Raw Raw;
    const Raw* from = static_cast<const Raw*>(array) + first;
    if (aligned && first + T::kPerVec <= count) return load(from);
    Vec v = {{0, 0, 0, 0}};
    CAR_UNROLL
    for (int i = 0; i < T::kPerVec; ++i) {
        if (first + i < count) v.w[i * sizeof(Raw) / 4] |= uint32_t(from[i]) << (8 * (i * sizeof(Raw) % 4));
    }
    return v;
}

template <class T>
CAR_FN void store_some(void* array, uint64_t first, uint64_t count, bool aligned, const Vec& v) {
    typedef typename T::Raw Raw;
    Raw* to = static_cast<Raw*>(array) + first;
    if (aligned && first + T::kPerVec <= count) {
        store(to, v);
        return;
    }
    CAR_UNROLL
    for (int i = 0; i < T::kPerVec; ++i) {
        if (first + i < count) to[i] = Raw(v.w[i * sizeof(Raw) / 4] >> (8 * (i * sizeof(Raw) % 4)));
    }
}

}  // namespace gpu
}  // namespace car
