// SPDX-License-Identifier: Apache-2.0
// AVX2 and F16C. The bfloat16 arithmetic is explained in vector_avx512.h.
#include <immintrin.h>

#include "kernel_table.h"

namespace commplane_car {
namespace {

struct Avx2 {
    using Float = __m256;
    static constexpr size_t kLanes = 8;

    CAR_INLINE Float load(const unsigned char* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
    CAR_INLINE void store(unsigned char* p, Float a) { _mm256_storeu_ps(reinterpret_cast<float*>(p), a); }
    CAR_INLINE Float splat(float x) { return _mm256_set1_ps(x); }
    CAR_INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
    CAR_INLINE Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
    CAR_INLINE Float divide(Float a, Float b) { return _mm256_div_ps(a, b); }
    CAR_INLINE Float smaller(Float a, Float b) { return _mm256_min_ps(a, b); }
    CAR_INLINE Float larger(Float a, Float b) { return _mm256_max_ps(a, b); }
    CAR_INLINE Float unordered_nan(Float x, Float a, Float b) {
        const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
        return _mm256_blendv_ps(x, nan, _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
    }

    CAR_INLINE void load_bf16(const unsigned char* p, Float& even, Float& odd) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    }
    CAR_INLINE __m256i rounded(Float a) {
        const __m256i bits = _mm256_castps_si256(a);
        const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), last);
    }
    CAR_INLINE Float round_bf16(Float a) {
        return _mm256_castsi256_ps(_mm256_and_si256(rounded(a), _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    }
    // The upper halves of both.
    CAR_INLINE void pack(unsigned char* p, __m256i even, __m256i odd) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa));
    }
    CAR_INLINE void pack_bf16(unsigned char* p, Float even, Float odd) {
        pack(p, _mm256_castps_si256(even), _mm256_castps_si256(odd));
    }
    CAR_INLINE void store_bf16(unsigned char* p, Float even, Float odd) { pack(p, rounded(even), rounded(odd)); }

    CAR_INLINE void load_f16(const unsigned char* p, Float& a, Float& b) {
        a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)));
    }
    CAR_INLINE Float round_f16(Float a) {
        return _mm256_cvtph_ps(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    CAR_INLINE void store_f16(unsigned char* p, Float a, Float b) {
        constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, kNearest));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16), _mm256_cvtps_ph(b, kNearest));
    }
};

}  // namespace

const ReduceTable kReduceAvx2 = CAR_KERNEL_TABLE(Avx2, "avx2");

}  // namespace commplane_car
