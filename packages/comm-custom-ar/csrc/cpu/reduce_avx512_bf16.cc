// SPDX-License-Identifier: Apache-2.0
// AVX-512 with the bfloat16 instructions. vcvtne2ps2bf16 rounds 32 numbers at once, but takes denormals for zero, whatever the
// control register says; the other tables keep them. So where there is one, the rounding in integers of AVX-512 runs.
#include "vector_avx512.h"

namespace commplane_car {
namespace {

struct Avx512Bf16 : Avx512 {
    CAR_INLINE bool any_denormal(Float a, Float b) {
        constexpr int kDenormal = 0x20;
        return _kortestz_mask16_u8(_mm512_fpclass_ps_mask(a, kDenormal), _mm512_fpclass_ps_mask(b, kDenormal)) == 0;
    }
    CAR_INLINE void store_bf16(unsigned char* p, Float even, Float odd) {
        if (__builtin_expect(any_denormal(even, odd), 0)) return Avx512::store_bf16(p, even, odd);
        // The even ones in the lower half, the odd ones in the upper: brought together again.
        const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
        const __m512i places = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                                5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        _mm512_storeu_si512(p, _mm512_permutexvar_epi16(places, both));
    }
};

}  // namespace

const ReduceTable kReduceAvx512Bf16 = CAR_KERNEL_TABLE(Avx512Bf16, "avx512_bf16");

}  // namespace commplane_car
