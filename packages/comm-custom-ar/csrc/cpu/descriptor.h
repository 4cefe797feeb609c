// SPDX-License-Identifier: Apache-2.0
// A call as the ranks compare it: every word equal on all ranks, or EMISMATCH.
#pragma once

#include <stdint.h>

#include <atomic>

#include "commplane_car.h"

namespace commplane_car {

using Word = std::atomic<uint64_t>;

constexpr uint64_t kCountBits = 48;

struct Descriptor {
    static constexpr int kWords = 4;
    // [0] kind, op, dtype, symmetric, in place, count   [1] region, offset   [2] root, hidden   [3] eps, weight bias
    uint64_t words[kWords];
};

Descriptor describe(const commplane_car_call& call);
commplane_car_call decode(const Descriptor& descriptor);

// "all_reduce" and so on.
const char* kind_name(uint32_t kind);

// Bytes of an element of a dtype that is served.
inline uint64_t element_bytes(uint32_t dtype) {
    constexpr unsigned char kBytes[] = {0, 4, 2, 2, 8, 4, 8, 1, 1};
    return kBytes[dtype];
}

}  // namespace commplane_car
