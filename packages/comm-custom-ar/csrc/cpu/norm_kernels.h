// SPDX-License-Identifier: Apache-2.0
// The loops of norm.h, written once over the vector type V and the element type T of reduce_kernels.h.
#pragma once

#include "norm.h"
#include "reduce_kernels.h"

namespace commplane_car {
namespace {

template <class V, class T>
struct Norm {
    using F = typename V::Float;
    static constexpr size_t kPair = 2 * V::kLanes;               // elements of one load
    static constexpr size_t kPairs = kNormLanes / kPair;         // loads of one block of kNormLanes elements
    static constexpr size_t kBlock = kNormLanes * T::kBytes;     // its bytes
    static_assert(kNormLanes % kPair == 0, "a block is whole pairs of vectors");

    CAR_INLINE F canonical(F x) { return V::unordered_nan(x, x, x); }

    template <uint32_t N>
    CAR_INLINE void accumulate_block(const unsigned char* const* src, uint32_t sources, const unsigned char* residual,
                                     unsigned char* residual_out, size_t at, F* lanes) {
        const uint32_t n = N != 0 ? N : sources;
        for (size_t p = 0; p < kPairs; ++p) {
            const size_t here = at + p * kPair * T::kBytes;
            F a, b, c, d;
            T::load(src[0] + here, a, b);
            for (uint32_t r = 1; r < n; ++r) {
                T::load(src[r] + here, c, d);
                a = V::add(a, c);
                b = V::add(b, d);
            }
            T::load(residual + here, c, d);
            a = T::round(canonical(V::add(T::round(canonical(a)), c)));
            b = T::round(canonical(V::add(T::round(canonical(b)), d)));
            T::store_rounded(residual_out + here, a, b);
            lanes[2 * p] = V::add(lanes[2 * p], V::multiply(a, a));
            lanes[2 * p + 1] = V::add(lanes[2 * p + 1], V::multiply(b, b));
        }
    }

    // The last elements, fewer than a block: through copies padded with zeros, which add nothing to the squares.
    [[gnu::noinline]] static void accumulate_tail(const unsigned char* const* src, uint32_t sources,
                                                  const unsigned char* residual, unsigned char* residual_out, size_t at,
                                                  size_t bytes, F* lanes) {
        alignas(64) unsigned char padded[kMostSources + 1][kBlock];
        const unsigned char* from[kMostSources];
        if (sources == 0) __builtin_unreachable();
        for (uint32_t r = 0; r <= sources; ++r) {
            memset(padded[r], 0, kBlock);
            memcpy(padded[r], (r < sources ? src[r] : residual) + at, bytes);
            if (r < sources) from[r] = padded[r];
        }
        accumulate_block<0>(from, sources, padded[sources], padded[0], 0, lanes);
        memcpy(residual_out + at, padded[0], bytes);
    }

    template <uint32_t N>
    static void accumulate_loop(const unsigned char* const* src, uint32_t sources, const unsigned char* residual,
                                unsigned char* residual_out, size_t count, float* lanes) {
        F sums[2 * kPairs];
        for (size_t i = 0; i < 2 * kPairs; ++i) sums[i] = V::load(reinterpret_cast<unsigned char*>(lanes + i * V::kLanes));
        const size_t bytes = count * T::kBytes;
        size_t at = 0;
        for (; at + kBlock <= bytes; at += kBlock) accumulate_block<N>(src, sources, residual, residual_out, at, sums);
        if (at < bytes) accumulate_tail(src, sources, residual, residual_out, at, bytes - at, sums);
        for (size_t i = 0; i < 2 * kPairs; ++i) V::store(reinterpret_cast<unsigned char*>(lanes + i * V::kLanes), sums[i]);
    }

    static void accumulate(const void* const* src, uint32_t sources, const void* residual, void* residual_out, size_t count,
                           float* lanes) {
        const auto from = reinterpret_cast<const unsigned char* const*>(src);
        const auto add = static_cast<const unsigned char*>(residual);
        const auto to = static_cast<unsigned char*>(residual_out);
        if (sources == 2) return accumulate_loop<2>(from, sources, add, to, count, lanes);
        if (sources == 1) return accumulate_loop<1>(from, sources, add, to, count, lanes);
        accumulate_loop<0>(from, sources, add, to, count, lanes);
    }

    // `lanes` is in the order of V's registers; added in the order of elements.
    static float total(const float* lanes) {
        float ordered[kNormLanes];
        for (size_t p = 0; p < kPairs; ++p) {
            for (size_t i = 0; i < V::kLanes; ++i) {
                const size_t first = p * kPair;
                ordered[first + (T::kInterleaved ? 2 * i : i)] = lanes[first + i];
                ordered[first + (T::kInterleaved ? 2 * i + 1 : V::kLanes + i)] = lanes[first + V::kLanes + i];
            }
        }
        for (size_t width = kNormLanes / 2; width != 0; width /= 2) {
            for (size_t i = 0; i < width; ++i) ordered[i] += ordered[i + width];
        }
        return ordered[0];
    }

    CAR_INLINE void scale_pair(const unsigned char* v, const unsigned char* weight, unsigned char* to, F inverse, F bias) {
        F a, b, c, d;
        T::load(v, a, b);
        T::load(weight, c, d);
        T::store(to, canonical(V::multiply(V::multiply(a, inverse), V::add(bias, c))),
                 canonical(V::multiply(V::multiply(b, inverse), V::add(bias, d))));
    }

    static void scale(const void* v, const void* weight, void* norm_out, size_t count, float inverse, float weight_bias) {
        constexpr size_t kBytes = kPair * T::kBytes;
        const F by = V::splat(inverse), bias = V::splat(weight_bias);
        const auto from = static_cast<const unsigned char*>(v), factor = static_cast<const unsigned char*>(weight);
        const auto to = static_cast<unsigned char*>(norm_out);
        const size_t bytes = count * T::kBytes;
        size_t at = 0;
        for (; at + kBytes <= bytes; at += kBytes) scale_pair(from + at, factor + at, to + at, by, bias);
        if (at < bytes) {
            alignas(64) unsigned char padded[2][kBytes] = {};
            memcpy(padded[0], from + at, bytes - at);
            memcpy(padded[1], factor + at, bytes - at);
            scale_pair(padded[0], padded[1], padded[0], by, bias);
            memcpy(to + at, padded[0], bytes - at);
        }
    }
};

#define CAR_NORM_KERNELS(V, T) \
    { Norm<V, T<V>>::accumulate, Norm<V, T<V>>::total, Norm<V, T<V>>::scale }

}  // namespace
}  // namespace commplane_car
