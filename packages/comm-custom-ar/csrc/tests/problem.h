// SPDX-License-Identifier: Apache-2.0
// A problem is one collective call of a whole group, with every rank's input and result. It is computed once, by one thread, and
// then solved on every path, by every rank.
#pragma once

#include <string>

#include "harness.h"
#include "oracle.h"

constexpr int kAllReduce = COMMPLANE_CAR_KIND_ALL_REDUCE;
constexpr int kBarrier = COMMPLANE_CAR_KIND_BARRIER;
constexpr int kAllGather = COMMPLANE_CAR_KIND_ALL_GATHER;
constexpr int kReduceScatter = COMMPLANE_CAR_KIND_REDUCE_SCATTER;
constexpr int kBroadcast = COMMPLANE_CAR_KIND_BROADCAST;
constexpr int kRmsNorm = COMMPLANE_CAR_KIND_ALL_REDUCE_RMS_NORM;

inline const char* name_of(int kind) {
    static const char* const names[] = {"?", "all_reduce", "barrier", "all_gather", "reduce_scatter", "broadcast",
                                        "all_reduce_rms_norm"};
    return names[kind];
}

struct Problem {
    int kind = kBarrier;
    int dtype = 0;
    int op = 0;
    uint32_t world = 0;
    uint64_t count = 0;  // as the function takes it; for all_reduce_rms_norm rows * hidden
    uint64_t rows = 0;
    uint64_t hidden = 0;
    uint32_t root = 0;
    float eps = 0;
    float weight_bias = 0;
    std::vector<Bytes> inputs;   // a rank
    std::vector<Bytes> outputs;  // a rank, or one for all
    Bytes residual, weight, residual_out;

    const Bytes& output(uint32_t rank) const { return outputs[outputs.size() == 1 ? 0 : rank]; }
    std::string text() const {
        char line[200];
        snprintf(line, sizeof line, "%s dtype %d op %d count %llu rows %llu hidden %llu root %u world %u", name_of(kind), dtype, op,
                 static_cast<unsigned long long>(count), static_cast<unsigned long long>(rows),
                 static_cast<unsigned long long>(hidden), root, world);
        return line;
    }
};

inline Problem barrier_problem(uint32_t world) {
    Problem p;
    p.world = world;
    return p;
}

inline Problem empty_problem(int kind, int dtype, int op, uint64_t count, uint32_t world) {
    Problem p;
    p.kind = kind;
    p.dtype = dtype;
    p.op = op;
    p.count = count;
    p.world = world;
    return p;
}

// all_reduce and reduce_scatter. The results are compared with the exact ones at once, where they are sums.
inline Problem reduction_problem(int kind, int dtype, int op, uint64_t count, uint32_t world, uint64_t seed) {
    Problem p = empty_problem(kind, dtype, op, count, world);
    const uint64_t parts = kind == kReduceScatter ? world : 1, width = element_bytes(dtype);
    for (uint32_t r = 0; r < world; ++r) p.inputs.push_back(random_elements(seed + r, parts * count, dtype));
    const Bytes all = reduced(p.inputs, parts * count, dtype, op);
    for (uint64_t part = 0; part < parts; ++part) {
        p.outputs.emplace_back(all.begin() + static_cast<long>(part * count * width),
                               all.begin() + static_cast<long>((part + 1) * count * width));
    }
    if (!is_integer(dtype) && (op == COMMPLANE_CAR_SUM || op == COMMPLANE_CAR_AVG)) {
        size_t compared = 0;
        CHECK(near_exact_sum(p.inputs, parts * count, dtype, op, all, &compared));
        CHECK(parts * count < 100 || compared > parts * count / 4);
    }
    return p;
}

inline Problem gather_problem(int dtype, uint64_t count, uint32_t world, uint64_t seed) {
    Problem p = empty_problem(kAllGather, dtype, 0, count, world);
    p.outputs.emplace_back();
    for (uint32_t r = 0; r < world; ++r) {
        p.inputs.push_back(random_elements(seed + r, count, dtype));
        p.outputs[0].insert(p.outputs[0].end(), p.inputs[r].begin(), p.inputs[r].end());
    }
    return p;
}

inline Problem broadcast_problem(int dtype, uint64_t count, uint32_t root, uint32_t world, uint64_t seed) {
    Problem p = empty_problem(kBroadcast, dtype, 0, count, world);
    p.root = root;
    for (uint32_t r = 0; r < world; ++r) p.inputs.push_back(random_elements(seed + r, count, dtype));
    p.outputs.push_back(p.inputs[root]);
    return p;
}

// How far the norm may be from a float64 computation, in steps of the dtype. For 16-bit numbers the float32 arithmetic in between
// is exact enough that only its last rounding shows. In float32 itself every operation shows: the squares' sum, mean, eps, root,
// reciprocal, two products and a sum are eight roundings of half a step to one; 3 steps was the worst of some million elements.
inline uint64_t norm_tolerance(int dtype) { return dtype == kFloat32 ? 5 : 1; }

// Every fourth row has any bits at all, the others numbers of like size.
inline Problem norm_problem(int dtype, uint64_t rows, uint64_t hidden, float eps, float weight_bias, uint32_t world,
                            uint64_t seed) {
    Problem p = empty_problem(kRmsNorm, dtype, COMMPLANE_CAR_SUM, rows * hidden, world);
    p.rows = rows;
    p.hidden = hidden;
    p.eps = eps;
    p.weight_bias = weight_bias;
    const auto elements = [&](uint64_t from) {
        Bytes data;
        for (uint64_t row = 0; row < rows; ++row) {
            const Bytes one = random_elements(from + row * 1000, hidden, dtype, row % 4 == 3 ? Kind::kAny : Kind::kTame);
            data.insert(data.end(), one.begin(), one.end());
        }
        return data;
    };
    for (uint32_t r = 0; r < world; ++r) p.inputs.push_back(elements(seed + r));
    p.residual = elements(seed + 100);
    p.weight = random_elements(seed + 101, hidden, dtype, Kind::kTiny);
    Normed wanted = rms_norm(p.inputs, p.residual, p.weight, rows, hidden, dtype, eps, weight_bias);
    size_t compared = 0;
    CHECK(worst_norm(wanted, p.weight, rows, hidden, dtype, eps, weight_bias, &compared) <= norm_tolerance(dtype));
    CHECK(compared >= rows * hidden / 2);
    p.outputs.push_back(std::move(wanted.norm_out));
    p.residual_out = std::move(wanted.residual_out);
    return p;
}
