// SPDX-License-Identifier: Apache-2.0
// The reductions of float64 and integers: loops over tiles that the compiler turns into vector code of the file's own
// instruction set. Everything is in an unnamed namespace for the reason given in reduce_kernels.h.
#pragma once

#include "reduce_kernels.h"

namespace commplane_car {
namespace {

CAR_INLINE double canonical_nan() {
    const uint64_t bits = UINT64_C(0x7ff8000000000000);
    double value;
    memcpy(&value, &bits, 8);
    return value;
}

template <class E>
struct IsFloat {
    static constexpr bool kValue = false;
};
template <>
struct IsFloat<double> {
    static constexpr bool kValue = true;
};

// Integers wrap: they are added as unsigned.
template <class E, class U>
struct PlainSum {
    CAR_INLINE E combine(E a, E b) { return static_cast<E>(static_cast<U>(static_cast<U>(a) + static_cast<U>(b))); }
    CAR_INLINE E finish(E a, E) { return a; }
};
template <>
struct PlainSum<double, double> {
    CAR_INLINE double combine(double a, double b) { return a + b; }
    CAR_INLINE double finish(double a, double) { return a == a ? a : canonical_nan(); }
};
template <class E, class>
struct PlainAverage {
    CAR_INLINE E combine(E a, E b) { return a + b; }
    CAR_INLINE E finish(E a, E sources) { return a == a ? a / sources : canonical_nan(); }
};
// Of equal numbers (0 and -0) the later rank's; NaN wins.
template <class E, class>
struct PlainMinimum {
    CAR_INLINE E combine(E a, E b) {
        const E least = a < b ? a : b;
        if constexpr (IsFloat<E>::kValue) return a == a ? least : a;  // b NaN: least is b
        return least;
    }
    CAR_INLINE E finish(E a, E) {
        if constexpr (IsFloat<E>::kValue) return a == a ? a : canonical_nan();
        return a;
    }
};
template <class E, class>
struct PlainMaximum {
    CAR_INLINE E combine(E a, E b) {
        const E most = a > b ? a : b;
        if constexpr (IsFloat<E>::kValue) return a == a ? most : a;
        return most;
    }
    CAR_INLINE E finish(E a, E) {
        if constexpr (IsFloat<E>::kValue) return a == a ? a : canonical_nan();
        return a;
    }
};

template <class E, class Op>
void plain(void* const* dst, uint32_t targets, const void* const* src, uint32_t sources, size_t count) {
    constexpr size_t kTile = 512 / sizeof(E);
    const E divisor = static_cast<E>(sources);
    E sum[kTile], next[kTile];
    for (size_t at = 0; at < count; at += kTile) {
        const size_t n = count - at < kTile ? count - at : kTile;
        if (n == kTile) {  // a length that the compiler knows
            memcpy(sum, static_cast<const unsigned char*>(src[0]) + at * sizeof(E), kTile * sizeof(E));
            for (uint32_t r = 1; r < sources; ++r) {
                memcpy(next, static_cast<const unsigned char*>(src[r]) + at * sizeof(E), kTile * sizeof(E));
                for (size_t i = 0; i < kTile; ++i) sum[i] = Op::combine(sum[i], next[i]);
            }
            for (size_t i = 0; i < kTile; ++i) sum[i] = Op::finish(sum[i], divisor);
        } else {
            memcpy(sum, static_cast<const unsigned char*>(src[0]) + at * sizeof(E), n * sizeof(E));
            for (uint32_t r = 1; r < sources; ++r) {
                memcpy(next, static_cast<const unsigned char*>(src[r]) + at * sizeof(E), n * sizeof(E));
                for (size_t i = 0; i < n; ++i) sum[i] = Op::combine(sum[i], next[i]);
            }
            for (size_t i = 0; i < n; ++i) sum[i] = Op::finish(sum[i], divisor);
        }
        for (uint32_t t = 0; t < targets; ++t) memcpy(static_cast<unsigned char*>(dst[t]) + at * sizeof(E), sum, n * sizeof(E));
    }
}

#define CAR_PLAIN_FLOAT_ROW(E) \
    { plain<E, PlainSum<E, E>>, plain<E, PlainMinimum<E, E>>, plain<E, PlainMaximum<E, E>>, plain<E, PlainAverage<E, E>> }
// No mean of integers.
#define CAR_PLAIN_INTEGER_ROW(E, U) \
    { plain<E, PlainSum<E, U>>, plain<E, PlainMinimum<E, U>>, plain<E, PlainMaximum<E, U>>, nullptr }

}  // namespace
}  // namespace commplane_car
