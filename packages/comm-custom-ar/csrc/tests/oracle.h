// SPDX-License-Identifier: Apache-2.0
// What an all-reduce has to give, bit for bit, computed another way than the library does: 16-bit numbers are rounded by
// looking for the nearest of all representable values in double, not with bit tricks.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "commplane_car.h"

inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

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

    // The nearest, ties to the even pattern. Positive patterns are ordered like their values.
    uint16_t encode(double value) const {
        if (isnan(value)) return static_cast<uint16_t>(infinity() | 1 << (mantissa_bits - 1));
        const uint16_t sign = signbit(value) ? 0x8000 : 0;
        const double size = fabs(value);
        uint16_t low = 0, high = infinity();  // the greatest pattern with decode <= size is in [low, high)
        if (isinf(size)) return static_cast<uint16_t>(sign | high);
        while (high - low > 1) {
            const auto middle = static_cast<uint16_t>((low + high) / 2);
            (decode(middle) <= size ? low : high) = middle;
        }
        // For rounding, infinity stands where the next number would be.
        const double next = high == infinity() ? ldexp(1.0, 1 << (exponent_bits - 1)) : decode(high);
        const double down = size - decode(low), up = next - size;
        const uint16_t nearest = down < up || (down == up && low % 2 == 0) ? low : high;
        return static_cast<uint16_t>(sign | nearest);
    }
};

constexpr Format16 kHalf = {5, 10};
constexpr Format16 kBrain = {8, 7};

inline size_t element_bytes(int dtype) { return dtype == COMMPLANE_CAR_FLOAT32 ? 4 : 2; }

inline float load_element(int dtype, const unsigned char* p) {
    if (dtype == COMMPLANE_CAR_FLOAT32) {
        float value;
        memcpy(&value, p, 4);
        return value;
    }
    uint16_t bits;
    memcpy(&bits, p, 2);
    return static_cast<float>((dtype == COMMPLANE_CAR_FLOAT16 ? kHalf : kBrain).decode(bits));
}

inline void store_element(int dtype, unsigned char* p, float value) {
    if (dtype == COMMPLANE_CAR_FLOAT32) {
        const uint32_t bits = isnan(value) ? 0x7fc00000u : bits_of(value);
        memcpy(p, &bits, 4);
        return;
    }
    const uint16_t bits = (dtype == COMMPLANE_CAR_FLOAT16 ? kHalf : kBrain).encode(value);
    memcpy(p, &bits, 2);
}

// Rank order, float32, NaN wins in min and max; of two equal numbers (0 and -0) the later rank's.
inline float combine(int op, float a, float b) {
    if (op == COMMPLANE_CAR_MIN || op == COMMPLANE_CAR_MAX) {
        if (isnan(a) || isnan(b)) return NAN;
        return (op == COMMPLANE_CAR_MIN ? a < b : a > b) ? a : b;
    }
    return a + b;
}

inline std::vector<unsigned char> expected(const std::vector<std::vector<unsigned char>>& inputs, size_t count, int dtype,
                                           int op) {
    const size_t width = element_bytes(dtype);
    std::vector<unsigned char> out(count * width);
    for (size_t i = 0; i < count; ++i) {
        float value = load_element(dtype, inputs[0].data() + i * width);
        for (size_t r = 1; r < inputs.size(); ++r) value = combine(op, value, load_element(dtype, inputs[r].data() + i * width));
        if (op == COMMPLANE_CAR_AVG) value = value / static_cast<float>(inputs.size());
        store_element(dtype, out.data() + i * width, value);
    }
    return out;
}

struct Random {
    uint64_t state;
    uint64_t next() {  // splitmix64
        uint64_t z = (state += UINT64_C(0x9e3779b97f4a7c15));
        z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
        z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
        return z ^ z >> 31;
    }
};

// Mostly numbers of like size; some of any bits at all: NaN, infinities, denormals, both zeros.
inline std::vector<unsigned char> random_input(uint64_t seed, size_t count, int dtype) {
    Random random{seed};
    const size_t width = element_bytes(dtype);
    std::vector<unsigned char> data(count * width);
    for (size_t i = 0; i < count; ++i) {
        const uint64_t r = random.next();
        if (r % 16 == 0) {
            const uint64_t raw = random.next();
            memcpy(data.data() + i * width, &raw, width);
        } else if (r % 16 == 1) {  // around the smallest numbers
            const uint64_t raw = (random.next() & 0x83ff) << (width == 4 ? 16 : 0);
            memcpy(data.data() + i * width, &raw, width);
        } else {
            store_element(dtype, data.data() + i * width, static_cast<float>(static_cast<int64_t>(r >> 40) - (1 << 23)) * 0x1p-20f);
        }
    }
    return data;
}
