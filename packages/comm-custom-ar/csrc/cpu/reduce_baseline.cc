// SPDX-License-Identifier: Apache-2.0
// Any CPU: the compiler's own 16-byte vectors (SSE2 on x86-64, NEON on arm64), no intrinsics. Little endian.
#include "kernel_table.h"

namespace commplane_car {
namespace {

using Float4 = float __attribute__((vector_size(16)));
using Bits4 = uint32_t __attribute__((vector_size(16)));
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bfloat16 pairs are split as little-endian words");

#if defined(__aarch64__)
// Every arm64 core converts; __fp16 rounds to nearest even in the default mode.
CAR_INLINE float half_to_float(uint16_t half) {
    __fp16 value;
    memcpy(&value, &half, 2);
    return static_cast<float>(value);
}
CAR_INLINE uint16_t float_to_half(float value) {
    const __fp16 rounded = static_cast<__fp16>(value);
    uint16_t half;
    memcpy(&half, &rounded, 2);
    return half;
}
#else
CAR_INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
CAR_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
CAR_INLINE float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13 | (rest > 0x7c00u ? 0x400000u : 0));
    if (rest >= 0x0400u) return float_of(sign | ((rest << 13) + 0x38000000u));
    return float_of(sign | bits_of(static_cast<float>(rest) * 0x1p-24f));  // zero and denormals: exact
}
CAR_INLINE uint16_t float_to_half(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t rest = bits & 0x7fffffffu;
    uint32_t half;
    if (rest > 0x7f800000u) {
        half = 0x7e00u;
    } else if (rest >= 0x477ff000u) {  // 65520 and more round to infinity
        half = 0x7c00u;
    } else if (rest >= 0x38800000u) {  // normal: to nearest even at bit 13
        half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13;
    } else {  // denormal: adding 0.5 leaves exactly the 2^-24 digits, rounded by the addition itself
        half = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;
    }
    return static_cast<uint16_t>(sign | half);
}
#endif

struct Baseline {
    using Float = Float4;
    static constexpr size_t kLanes = 4;

    CAR_INLINE Float load(const unsigned char* p) {
        Float a;
        memcpy(&a, p, 16);
        return a;
    }
    CAR_INLINE void store(unsigned char* p, Float a) { memcpy(p, &a, 16); }
    CAR_INLINE Float splat(float x) { return Float{x, x, x, x}; }
    CAR_INLINE Float add(Float a, Float b) { return a + b; }
    CAR_INLINE Float multiply(Float a, Float b) { return a * b; }
    CAR_INLINE Float divide(Float a, Float b) { return a / b; }
    CAR_INLINE Float smaller(Float a, Float b) { return a < b ? a : b; }
    CAR_INLINE Float larger(Float a, Float b) { return a > b ? a : b; }
    CAR_INLINE Float unordered_nan(Float x, Float a, Float b) {
        const Bits4 nan = {0x7fc00000u, 0x7fc00000u, 0x7fc00000u, 0x7fc00000u};
        const Bits4 ordered = reinterpret_cast<Bits4>(a == a) & reinterpret_cast<Bits4>(b == b);
        return reinterpret_cast<Float>((reinterpret_cast<Bits4>(x) & ordered) | (nan & ~ordered));
    }

    CAR_INLINE void load_bf16(const unsigned char* p, Float& even, Float& odd) {
        Bits4 both;
        memcpy(&both, p, 16);
        even = reinterpret_cast<Float>(both << 16);
        odd = reinterpret_cast<Float>(both & 0xffff0000u);
    }
    CAR_INLINE Bits4 rounded(Float a) {
        const Bits4 bits = reinterpret_cast<Bits4>(a);
        return bits + 0x7fffu + (bits >> 16 & 1u);
    }
    CAR_INLINE Float round_bf16(Float a) { return reinterpret_cast<Float>(rounded(a) & 0xffff0000u); }
    // The upper halves of both.
    CAR_INLINE void pack(unsigned char* p, Bits4 even, Bits4 odd) {
        const Bits4 both = (even >> 16) | (odd & 0xffff0000u);
        memcpy(p, &both, 16);
    }
    CAR_INLINE void pack_bf16(unsigned char* p, Float even, Float odd) {
        pack(p, reinterpret_cast<Bits4>(even), reinterpret_cast<Bits4>(odd));
    }
    CAR_INLINE void store_bf16(unsigned char* p, Float even, Float odd) { pack(p, rounded(even), rounded(odd)); }

    CAR_INLINE void load_f16(const unsigned char* p, Float& a, Float& b) {
        uint16_t half[8];
        memcpy(half, p, 16);
        a = Float{half_to_float(half[0]), half_to_float(half[1]), half_to_float(half[2]), half_to_float(half[3])};
        b = Float{half_to_float(half[4]), half_to_float(half[5]), half_to_float(half[6]), half_to_float(half[7])};
    }
    CAR_INLINE Float round_f16(Float a) {
        return Float{half_to_float(float_to_half(a[0])), half_to_float(float_to_half(a[1])),
                     half_to_float(float_to_half(a[2])), half_to_float(float_to_half(a[3]))};
    }
    CAR_INLINE void store_f16(unsigned char* p, Float a, Float b) {
        uint16_t half[8];
        for (int i = 0; i < 4; ++i) half[i] = float_to_half(a[i]);
        for (int i = 0; i < 4; ++i) half[4 + i] = float_to_half(b[i]);
        memcpy(p, half, 16);
    }
};

}  // namespace

const ReduceTable kReduceBaseline = CAR_KERNEL_TABLE(Baseline, "baseline");

}  // namespace commplane_car
