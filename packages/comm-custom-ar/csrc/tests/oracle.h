// SPDX-License-Identifier: Apache-2.0
// What the collectives have to give, bit for bit, and how far that may lie from the exact result.
#pragma once

#include <float.h>

#include <algorithm>

#include "numbers.h"

// NaN wins in min and max; of two equal numbers (0 and -0) the later rank's.
template <class Real>
Real combine(int op, Real a, Real b) {
    if (op == COMMPLANE_CAR_MIN || op == COMMPLANE_CAR_MAX) {
        if (isnan(a) || isnan(b)) return static_cast<Real>(NAN);
        return (op == COMMPLANE_CAR_MIN ? a < b : a > b) ? a : b;
    }
    return a + b;
}

// Rank order, in Real: float32 for all but float64.
template <class Real>
void reduce_reals(const std::vector<Bytes>& inputs, size_t count, int dtype, int op, Bytes& out) {
    const size_t width = element_bytes(dtype);
    for (size_t i = 0; i < count; ++i) {
        Real value = static_cast<Real>(load_real(dtype, inputs[0].data() + i * width));
        for (size_t r = 1; r < inputs.size(); ++r) {
            value = combine(op, value, static_cast<Real>(load_real(dtype, inputs[r].data() + i * width)));
        }
        if (op == COMMPLANE_CAR_AVG) value = value / static_cast<Real>(inputs.size());
        store_real(dtype, out.data() + i * width, static_cast<double>(value));
    }
}

inline void reduce_integers(const std::vector<Bytes>& inputs, size_t count, int dtype, int op, Bytes& out) {
    const size_t width = element_bytes(dtype);
    for (size_t i = 0; i < count; ++i) {
        Wide value = load_integer(dtype, inputs[0].data() + i * width);
        for (size_t r = 1; r < inputs.size(); ++r) {
            const Wide next = load_integer(dtype, inputs[r].data() + i * width);
            value = op == COMMPLANE_CAR_SUM ? value + next : op == COMMPLANE_CAR_MIN ? std::min(value, next) : std::max(value, next);
        }
        store_integer(dtype, out.data() + i * width, value);
    }
}

// `count` elements of every rank's input, reduced.
inline Bytes reduced(const std::vector<Bytes>& inputs, size_t count, int dtype, int op) {
    Bytes out(count * element_bytes(dtype));
    if (is_integer(dtype)) {
        reduce_integers(inputs, count, dtype, op, out);
    } else if (dtype == kFloat64) {
        reduce_reals<double>(inputs, count, dtype, op, out);
    } else {
        reduce_reals<float>(inputs, count, dtype, op, out);
    }
    return out;
}

// A sum or a mean in `dtype` against the exact one: a rounding of the accumulator a rank, one to the dtype, and half of the
// smallest number where digits run out. Elements that are not finite, or near overflow, are left out; *compared counts the others.
inline bool near_exact_sum(const std::vector<Bytes>& inputs, size_t count, int dtype, int op, const Bytes& got, size_t* compared) {
    const size_t width = element_bytes(dtype);
    const double unit = dtype == kFloat64 ? 0x1p-53 : 0x1p-24;  // of the accumulator
    const double rounding = dtype == kFloat16 ? 0x1p-11 : dtype == kBfloat16 ? 0x1p-8 : unit;
    const double smallest = dtype == kFloat16 ? 0x1p-25 : dtype == kBfloat16 ? 0x1p-134 : dtype == kFloat32 ? 0x1p-150 : 0;
    const double most = dtype == kFloat64 ? DBL_MAX / 2 : dtype == kFloat16 ? 65000.0 : 1.5e38;
    *compared = 0;
    for (size_t i = 0; i < count; ++i) {
        long double sum = 0, size = 0;
        for (const Bytes& input : inputs) {
            const double value = load_real(dtype, input.data() + i * width);
            sum += value;
            size += fabs(value);
        }
        if (!(size < most)) continue;  // NaN too
        ++*compared;
        if (op == COMMPLANE_CAR_AVG) {
            sum /= static_cast<long double>(inputs.size());
            size /= static_cast<long double>(inputs.size());
        }
        const long double off = fabsl(load_real(dtype, got.data() + i * width) - sum);
        if (off > size * unit * static_cast<long double>(inputs.size() + 1) + fabsl(sum) * rounding + smallest) return false;
    }
    return true;
}

// all_reduce_rms_norm on what the ranks contribute. Rounding points: commplane_car.h. The order in which the squares are summed,
// element i in lane i % 32 and then a tree, is that of cpu/norm.h; no other order gives the same bits.
struct Normed {
    Bytes residual_out;
    Bytes norm_out;
};

inline Normed rms_norm(const std::vector<Bytes>& inputs, const Bytes& residual, const Bytes& weight, size_t rows, size_t hidden,
                       int dtype, float eps, float weight_bias) {
    const size_t width = element_bytes(dtype), count = rows * hidden;
    Normed out = {reduced(inputs, count, dtype, COMMPLANE_CAR_SUM), Bytes(count * width)};
    const auto at = [&](const Bytes& data, size_t i) { return static_cast<float>(load_real(dtype, data.data() + i * width)); };
    for (size_t row = 0; row < rows; ++row) {
        float lanes[32] = {};
        for (size_t i = 0; i < hidden; ++i) {
            const size_t here = row * hidden + i;
            store_real(dtype, out.residual_out.data() + here * width, at(out.residual_out, here) + at(residual, here));
            const float v = at(out.residual_out, here);
            lanes[i % 32] += v * v;
        }
        for (size_t half = 16; half != 0; half /= 2) {
            for (size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
        }
        const float inverse = 1.0f / sqrtf(lanes[0] / static_cast<float>(hidden) + eps);
        for (size_t i = 0; i < hidden; ++i) {
            const size_t here = row * hidden + i;
            store_real(dtype, out.norm_out.data() + here * width, at(out.residual_out, here) * inverse * (weight_bias + at(weight, i)));
        }
    }
    return out;
}

// The distance between two finite numbers of a dtype, in steps from one representable number to the next.
inline uint64_t steps_apart(int dtype, const unsigned char* a, const unsigned char* b) {
    const size_t width = element_bytes(dtype);
    const auto place = [&](const unsigned char* p) {
        uint64_t bits = 0;
        memcpy(&bits, p, width);
        const uint64_t sign = UINT64_C(1) << (8 * width - 1);
        const auto size = static_cast<int64_t>(bits & (sign - 1));
        return (bits & sign) != 0 ? -size : size;
    };
    const int64_t distance = place(a) - place(b);
    return static_cast<uint64_t>(distance < 0 ? -distance : distance);
}

// The greatest distance of `norm_out` from a float64 computation on the rounded `residual_out`, rounded once. Rows with numbers
// that are not finite, or whose squares leave float32's range, are left out; *compared counts the elements of the others.
inline uint64_t worst_norm(const Normed& got, const Bytes& weight, size_t rows, size_t hidden, int dtype, float eps,
                           float weight_bias, size_t* compared) {
    const size_t width = element_bytes(dtype);
    uint64_t worst = 0;
    *compared = 0;
    for (size_t row = 0; row < rows; ++row) {
        const unsigned char* const v = got.residual_out.data() + row * hidden * width;
        double squares = 0;
        for (size_t i = 0; i < hidden; ++i) squares += load_real(dtype, v + i * width) * load_real(dtype, v + i * width);
        if (!(squares < 1e37)) continue;
        const double inverse = 1.0 / sqrt(squares / static_cast<double>(hidden) + static_cast<double>(eps));
        for (size_t i = 0; i < hidden; ++i) {
            const double factor = static_cast<double>(weight_bias) + load_real(dtype, weight.data() + i * width);
            unsigned char wanted[8];
            store_real(dtype, wanted, load_real(dtype, v + i * width) * inverse * factor);
            worst = std::max(worst, steps_apart(dtype, wanted, got.norm_out.data() + (row * hidden + i) * width));
            ++*compared;
        }
    }
    return worst;
}
