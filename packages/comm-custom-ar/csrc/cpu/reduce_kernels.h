// SPDX-License-Identifier: Apache-2.0
// The reduction loops, written once over a vector type V that each reduce_*.cc brings. Everything is in an unnamed
// namespace on purpose: those files are compiled for different instruction sets, and a function with linkage could be
// merged by the linker into one compiled for a CPU that we do not have. For the same reason no std:: function is used.
//
// V has: Float (a vector of kLanes float), load, store (f32), load_bf16 / store_bf16 / load_f16 / store_f16 (a pair of
// Floats for 2 * kLanes elements: for bf16 the even ones and the odd ones, for f16 the first half and the second), pack_bf16
// (store_bf16 of numbers that are rounded already), round_bf16 / round_f16 (to the nearest such number, as Float), add,
// multiply, divide, smaller, larger (b if equal), splat, unordered_nan(x, a, b) (x, but the quiet NaN where a or b is NaN).
//
// NaNs are made canonical before they are stored: which payload an addition hands on depends on the order of its operands,
// which the compiler may swap, and results have to be equal bit for bit whatever code ran.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "reduce.h"

namespace commplane_car {
namespace {

#define CAR_INLINE [[gnu::always_inline]] static inline

template <class V>
struct AsFloat32 {
    static constexpr size_t kBytes = 4;
    static constexpr bool kInterleaved = false;
    CAR_INLINE typename V::Float round(typename V::Float a) { return a; }
    CAR_INLINE void store_rounded(unsigned char* p, typename V::Float a, typename V::Float b) { store(p, a, b); }
    CAR_INLINE void load(const unsigned char* p, typename V::Float& a, typename V::Float& b) {
        a = V::load(p);
        b = V::load(p + 4 * V::kLanes);
    }
    CAR_INLINE void store(unsigned char* p, typename V::Float a, typename V::Float b) {
        V::store(p, a);
        V::store(p + 4 * V::kLanes, b);
    }
};

template <class V>
struct AsFloat16 {
    static constexpr size_t kBytes = 2;
    static constexpr bool kInterleaved = false;
    CAR_INLINE typename V::Float round(typename V::Float a) { return V::round_f16(a); }
    CAR_INLINE void store_rounded(unsigned char* p, typename V::Float a, typename V::Float b) { store(p, a, b); }
    CAR_INLINE void load(const unsigned char* p, typename V::Float& a, typename V::Float& b) { V::load_f16(p, a, b); }
    CAR_INLINE void store(unsigned char* p, typename V::Float a, typename V::Float b) { V::store_f16(p, a, b); }
};

template <class V>
struct AsBfloat16 {
    static constexpr size_t kBytes = 2;
    static constexpr bool kInterleaved = true;
    CAR_INLINE typename V::Float round(typename V::Float a) { return V::round_bf16(a); }
    CAR_INLINE void store_rounded(unsigned char* p, typename V::Float a, typename V::Float b) { V::pack_bf16(p, a, b); }
    CAR_INLINE void load(const unsigned char* p, typename V::Float& a, typename V::Float& b) { V::load_bf16(p, a, b); }
    CAR_INLINE void store(unsigned char* p, typename V::Float a, typename V::Float b) { V::store_bf16(p, a, b); }
};

template <class V>
struct Sum {
    using F = typename V::Float;
    CAR_INLINE F combine(F a, F b) { return V::add(a, b); }
    CAR_INLINE F finish(F a, F) { return V::unordered_nan(a, a, a); }
};

template <class V>
struct Average {
    using F = typename V::Float;
    CAR_INLINE F combine(F a, F b) { return V::add(a, b); }
    CAR_INLINE F finish(F a, F sources) {
        const F quotient = V::divide(a, sources);
        return V::unordered_nan(quotient, quotient, quotient);
    }
};

template <class V>
struct Minimum {
    using F = typename V::Float;
    CAR_INLINE F combine(F a, F b) { return V::unordered_nan(V::smaller(a, b), a, b); }
    CAR_INLINE F finish(F a, F) { return V::unordered_nan(a, a, a); }
};

template <class V>
struct Maximum {
    using F = typename V::Float;
    CAR_INLINE F combine(F a, F b) { return V::unordered_nan(V::larger(a, b), a, b); }
    CAR_INLINE F finish(F a, F) { return V::unordered_nan(a, a, a); }
};

// One block: U pairs of vectors, all sources, all targets. N or D not 0: that many sources or targets, known to the compiler.
template <class V, class T, class Op, uint32_t N, uint32_t D, int U>
CAR_INLINE void block(void* const* dst, uint32_t targets, const void* const* src, uint32_t sources, size_t at,
                      typename V::Float divisor) {
    using F = typename V::Float;
    constexpr size_t kPair = 2 * V::kLanes * T::kBytes;
    const uint32_t n = N != 0 ? N : sources;
    const uint32_t d = D != 0 ? D : targets;
    F sum[2 * U];
    const unsigned char* first = static_cast<const unsigned char*>(src[0]) + at;
    for (int u = 0; u < U; ++u) T::load(first + u * kPair, sum[2 * u], sum[2 * u + 1]);
    for (uint32_t r = 1; r < n; ++r) {
        const unsigned char* from = static_cast<const unsigned char*>(src[r]) + at;
        for (int u = 0; u < U; ++u) {
            F a, b;
            T::load(from + u * kPair, a, b);
            sum[2 * u] = Op::combine(sum[2 * u], a);
            sum[2 * u + 1] = Op::combine(sum[2 * u + 1], b);
        }
    }
    for (int u = 0; u < 2 * U; ++u) sum[u] = Op::finish(sum[u], divisor);
    for (uint32_t t = 0; t < d; ++t) {
        unsigned char* to = static_cast<unsigned char*>(dst[t]) + at;
        for (int u = 0; u < U; ++u) T::store(to + u * kPair, sum[2 * u], sum[2 * u + 1]);
    }
}

constexpr uint32_t kMostSources = 64;  // COMMPLANE_CAR_MAX_WORLD

// The last elements, fewer than one pair of vectors: through padded copies, so that they run the same code as all others.
template <class V, class T, class Op>
[[gnu::noinline]] void tail(void* const* dst, uint32_t targets, const void* const* src, uint32_t sources, size_t at,
                            size_t bytes, typename V::Float divisor) {
    constexpr size_t kPair = 2 * V::kLanes * T::kBytes;
    alignas(64) unsigned char padded[kMostSources][kPair];
    const void* from[kMostSources];
    if (sources == 0) __builtin_unreachable();
    for (uint32_t r = 0; r < sources; ++r) {
        for (size_t i = 0; i < kPair; i += 8) memset(padded[r] + i, 0, 8);
        memcpy(padded[r], static_cast<const unsigned char*>(src[r]) + at, bytes);
        from[r] = padded[r];
    }
    void* to = padded[0];
    block<V, T, Op, 0, 1, 1>(&to, 1, from, sources, 0, divisor);
    for (uint32_t t = 0; t < targets; ++t) memcpy(static_cast<unsigned char*>(dst[t]) + at, padded[0], bytes);
}

template <class V, class T, class Op, uint32_t N, uint32_t D>
void loop(void* const* dst, uint32_t targets, const void* const* src, uint32_t sources, size_t count) {
    constexpr size_t kPair = 2 * V::kLanes * T::kBytes;
    constexpr int kUnroll = 2;
    const typename V::Float divisor = V::splat(static_cast<float>(sources));
    const size_t bytes = count * T::kBytes;
    size_t at = 0;
    for (; at + kUnroll * kPair <= bytes; at += kUnroll * kPair) {
        block<V, T, Op, N, D, kUnroll>(dst, targets, src, sources, at, divisor);
    }
    for (; at + kPair <= bytes; at += kPair) block<V, T, Op, N, D, 1>(dst, targets, src, sources, at, divisor);
    if (at < bytes) tail<V, T, Op>(dst, targets, src, sources, at, bytes - at, divisor);
}

template <class V, class T, class Op>
void reduce(void* const* dst, uint32_t targets, const void* const* src, uint32_t sources, size_t count) {
    if (sources == 2) {
        if (targets == 1) return loop<V, T, Op, 2, 1>(dst, targets, src, sources, count);
        return loop<V, T, Op, 2, 0>(dst, targets, src, sources, count);
    }
    if (targets == 1) return loop<V, T, Op, 0, 1>(dst, targets, src, sources, count);
    return loop<V, T, Op, 0, 0>(dst, targets, src, sources, count);
}

#define CAR_REDUCE_ROW(V, T) \
    { reduce<V, T<V>, Sum<V>>, reduce<V, T<V>, Minimum<V>>, reduce<V, T<V>, Maximum<V>>, reduce<V, T<V>, Average<V>> }

}  // namespace
}  // namespace commplane_car
