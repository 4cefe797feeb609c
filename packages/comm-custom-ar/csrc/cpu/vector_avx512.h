// SPDX-License-Identifier: Apache-2.0
// The vector type of AVX-512 F, BW, VL, DQ.
#pragma once

#include <immintrin.h>

#include "kernel_table.h"

namespace commplane_car {
namespace {

struct Avx512 {
    using Float = __m512;
    static constexpr size_t kLanes = 16;

    CAR_INLINE Float load(const unsigned char* p) { return _mm512_loadu_ps(p); }
    CAR_INLINE void store(unsigned char* p, Float a) { _mm512_storeu_ps(p, a); }
    CAR_INLINE Float splat(float x) { return _mm512_set1_ps(x); }
    CAR_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    CAR_INLINE Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
    CAR_INLINE Float divide(Float a, Float b) { return _mm512_div_ps(a, b); }
    CAR_INLINE Float smaller(Float a, Float b) { return _mm512_min_ps(a, b); }
    CAR_INLINE Float larger(Float a, Float b) { return _mm512_max_ps(a, b); }
    CAR_INLINE Float unordered_nan(Float x, Float a, Float b) {
        const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000));
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q), x, nan);
    }

    // A bfloat16 is the upper half of a float32: the even elements of 32 are shifted up, the odd ones masked. No lane moves.
    CAR_INLINE void load_bf16(const unsigned char* p, Float& even, Float& odd) {
        const __m512i both = _mm512_loadu_si512(p);
        even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    }
    // To nearest even: add 0x7fff, and one more if the bit that becomes the last is set. Infinity stays, 0x7fc00000 stays.
    CAR_INLINE __m512i rounded(Float a) {
        const __m512i bits = _mm512_castps_si512(a);
        const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
    }
    CAR_INLINE Float round_bf16(Float a) {
        return _mm512_castsi512_ps(_mm512_and_si512(rounded(a), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    }
    // The upper halves of both.
    CAR_INLINE void pack(unsigned char* p, __m512i even, __m512i odd) {
        _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(even, 16), odd));
    }
    CAR_INLINE void pack_bf16(unsigned char* p, Float even, Float odd) {
        pack(p, _mm512_castps_si512(even), _mm512_castps_si512(odd));
    }
    CAR_INLINE void store_bf16(unsigned char* p, Float even, Float odd) { pack(p, rounded(even), rounded(odd)); }

    CAR_INLINE void load_f16(const unsigned char* p, Float& a, Float& b) {
        a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32)));
    }
    CAR_INLINE Float round_f16(Float a) {
        return _mm512_cvtph_ps(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    CAR_INLINE void store_f16(unsigned char* p, Float a, Float b) {
        constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, kNearest));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), _mm512_cvtps_ph(b, kNearest));
    }
};

}  // namespace
}  // namespace commplane_car
