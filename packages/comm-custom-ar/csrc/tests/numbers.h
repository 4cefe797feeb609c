// SPDX-License-Identifier: Apache-2.0
// Elements of the dtypes: load, store, random ones. Written another way than the library does it: 16-bit numbers are rounded by
// looking for the nearest of all representable values in double, not with bit tricks, and integers are wide.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <vector>

#include "commplane_car.h"

using Bytes = std::vector<unsigned char>;

constexpr int kFloat32 = COMMPLANE_CAR_FLOAT32;
constexpr int kFloat16 = COMMPLANE_CAR_FLOAT16;
constexpr int kBfloat16 = COMMPLANE_CAR_BFLOAT16;
constexpr int kFloat64 = COMMPLANE_CAR_FLOAT64;
constexpr int kDtypes[] = {COMMPLANE_CAR_FLOAT32, COMMPLANE_CAR_FLOAT16, COMMPLANE_CAR_BFLOAT16, COMMPLANE_CAR_FLOAT64,
                           COMMPLANE_CAR_INT32,   COMMPLANE_CAR_INT64,   COMMPLANE_CAR_INT8,     COMMPLANE_CAR_UINT8};

inline size_t element_bytes(int dtype) {
    switch (dtype) {
        case COMMPLANE_CAR_FLOAT64:
        case COMMPLANE_CAR_INT64: return 8;
        case COMMPLANE_CAR_FLOAT32:
        case COMMPLANE_CAR_INT32: return 4;
        case COMMPLANE_CAR_FLOAT16:
        case COMMPLANE_CAR_BFLOAT16: return 2;
        default: return 1;
    }
}

inline bool is_integer(int dtype) { return dtype >= COMMPLANE_CAR_INT32; }

template <class To, class From>
To as_bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline uint32_t bits_of(float value) { return as_bits<uint32_t>(value); }
inline float float_of(uint32_t bits) { return as_bits<float>(bits); }

struct Format16 {
    int exponent_bits;
    int mantissa_bits;

    double decode(uint16_t bits) const {
        const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
        const int mantissa = bits & ((1 << mantissa_bits) - 1);
        const int bias = (1 << (exponent_bits - 1)) - 1;
        const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
        if (exponent == (1 << exponent_bits) - 1) return mantissa != 0 ? NAN : sign * INFINITY;
        if (exponent == 0) return sign * ldexp(mantissa, 1 - bias - mantissa_bits);
        return sign * ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
    }
    uint16_t infinity() const { return static_cast<uint16_t>(((1 << exponent_bits) - 1) << mantissa_bits); }
};

class Numbers16 {
  public:
    explicit Numbers16(Format16 format) : format_(format), values_(65536) {
        for (uint32_t bits = 0; bits < 65536; ++bits) values_[bits] = format.decode(static_cast<uint16_t>(bits));
    }
    double decode(uint16_t bits) const { return values_[bits]; }

    // The nearest, ties to the even pattern. Positive patterns are ordered like their values. NaN: the positive quiet one.
    uint16_t encode(double value) const {
        const uint16_t infinity = format_.infinity();
        if (isnan(value)) return static_cast<uint16_t>(infinity | 1 << (format_.mantissa_bits - 1));
        const uint16_t sign = signbit(value) ? 0x8000 : 0;
        const double size = fabs(value);
        uint16_t low = 0, high = infinity;  // the greatest pattern with a value <= size is in [low, high)
        if (isinf(size)) return static_cast<uint16_t>(sign | high);
        while (high - low > 1) {
            const auto middle = static_cast<uint16_t>((low + high) / 2);
            (values_[middle] <= size ? low : high) = middle;
        }
        // For rounding, infinity stands where the next number would be.
        const double next = high == infinity ? ldexp(1.0, 1 << (format_.exponent_bits - 1)) : values_[high];
        const double down = size - values_[low], up = next - size;
        const uint16_t nearest = down < up || (down == up && low % 2 == 0) ? low : high;
        return static_cast<uint16_t>(sign | nearest);
    }

  private:
    Format16 format_;
    std::vector<double> values_;
};

inline const Numbers16& numbers16(int dtype) {
    static const Numbers16 half({5, 10}), brain({8, 7});
    return dtype == COMMPLANE_CAR_FLOAT16 ? half : brain;
}

// Floating-point dtypes. Exact.
inline double load_real(int dtype, const unsigned char* p) {
    if (dtype == COMMPLANE_CAR_FLOAT64) {
        double value;
        memcpy(&value, p, 8);
        return value;
    }
    if (dtype == COMMPLANE_CAR_FLOAT32) {
        float value;
        memcpy(&value, p, 4);
        return value;
    }
    uint16_t bits;
    memcpy(&bits, p, 2);
    return numbers16(dtype).decode(bits);
}

// Rounds to the dtype, to nearest even; a NaN becomes the positive quiet one.
inline void store_real(int dtype, unsigned char* p, double value) {
    if (dtype == COMMPLANE_CAR_FLOAT64) {
        const uint64_t bits = isnan(value) ? UINT64_C(0x7ff8000000000000) : as_bits<uint64_t>(value);
        memcpy(p, &bits, 8);
    } else if (dtype == COMMPLANE_CAR_FLOAT32) {
        const uint32_t bits = isnan(value) ? 0x7fc00000u : bits_of(static_cast<float>(value));
        memcpy(p, &bits, 4);
    } else {
        const uint16_t bits = numbers16(dtype).encode(value);
        memcpy(p, &bits, 2);
    }
}

using Wide = __int128;

inline Wide load_integer(int dtype, const unsigned char* p) {
    const size_t width = element_bytes(dtype);
    uint64_t bits = 0;
    memcpy(&bits, p, width);  // little endian
    const Wide value = bits;
    const bool negative = dtype != COMMPLANE_CAR_UINT8 && (bits >> (8 * width - 1) & 1) != 0;
    return negative ? value - (Wide{1} << (8 * width)) : value;
}

// Wraps: the low bits.
inline void store_integer(int dtype, unsigned char* p, Wide value) {
    const auto bits = static_cast<uint64_t>(value);
    memcpy(p, &bits, element_bytes(dtype));
}

struct Random {
    uint64_t state;
    uint64_t next() {  // splitmix64
        uint64_t z = (state += UINT64_C(0x9e3779b97f4a7c15));
        z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
        z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
        return z ^ z >> 31;
    }
    uint64_t below(uint64_t limit) { return next() % limit; }
    bool one_in(uint64_t n) { return below(n) == 0; }
};

enum class Kind {
    kAny,  // mostly numbers of like size; some of any bits at all: NaN, infinities, denormals, both zeros
    kTame,  // numbers of like size only
    kTiny   // the same, and some around the smallest numbers
};

inline Bytes random_elements(uint64_t seed, size_t count, int dtype, Kind kind = Kind::kAny) {
    Random random{seed};
    const size_t width = element_bytes(dtype);
    Bytes data(count * width);
    for (size_t i = 0; i < count; ++i) {
        const uint64_t r = random.next();
        unsigned char* const p = data.data() + i * width;
        if (is_integer(dtype)) {
            const uint64_t raw = r % 4 == 0 ? r >> 60 : r >> 2;  // small ones, and any
            memcpy(p, &raw, width);
        } else if (kind == Kind::kAny && r % 16 == 0) {
            const uint64_t raw = random.next();
            memcpy(p, &raw, width);
        } else if (kind != Kind::kTame && r % 16 == 1) {  // around the smallest numbers
            const uint64_t raw = (random.next() & 0x83ff) << (8 * width - 16);
            memcpy(p, &raw, width);
        } else {
            store_real(dtype, p, static_cast<double>(static_cast<int64_t>(r >> 40) - (1 << 23)) * 0x1p-20);
        }
    }
    return data;
}
