// SPDX-License-Identifier: Apache-2.0
#include "descriptor.h"

#include <string.h>

namespace commplane_car {
namespace {

uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

constexpr uint64_t kLow = (UINT64_C(1) << kCountBits) - 1;

}  // namespace

Descriptor describe(const commplane_car_call& call) {
    Descriptor out;
    // In place matters to the peers only where they write into each other's buffers.
    out.words[0] = (uint64_t{call.kind} << 60) | (uint64_t{call.op} << 56) | (uint64_t{call.dtype} << 52) |
                   (uint64_t{call.symmetric} << 51) | (uint64_t{call.symmetric & call.in_place} << 50) | call.count;
    out.words[1] = (uint64_t{call.region} << kCountBits) | call.offset;
    out.words[2] = (uint64_t{call.root} << kCountBits) | call.hidden;
    out.words[3] = (uint64_t{bits_of(call.eps)} << 32) | bits_of(call.weight_bias);
    return out;
}

commplane_car_call decode(const Descriptor& descriptor) {
    const uint64_t* words = descriptor.words;
    commplane_car_call call = {};
    call.kind = static_cast<uint32_t>(words[0] >> 60);
    call.op = static_cast<uint32_t>(words[0] >> 56 & 15);
    call.dtype = static_cast<uint32_t>(words[0] >> 52 & 15);
    call.symmetric = static_cast<uint32_t>(words[0] >> 51 & 1);
    call.in_place = static_cast<uint32_t>(words[0] >> 50 & 1);
    call.count = words[0] & kLow;
    call.region = static_cast<uint32_t>(words[1] >> kCountBits);
    call.offset = words[1] & kLow;
    call.root = static_cast<uint32_t>(words[2] >> kCountBits);
    call.hidden = words[2] & kLow;
    call.eps = float_of(static_cast<uint32_t>(words[3] >> 32));
    call.weight_bias = float_of(static_cast<uint32_t>(words[3]));
    return call;
}

const char* kind_name(uint32_t kind) {
    static const char* const kNames[] = {"nothing",        "all_reduce", "barrier",            "all_gather",
                                         "reduce_scatter", "broadcast",  "all_reduce_rms_norm"};
    return kind < sizeof kNames / sizeof kNames[0] ? kNames[kind] : "nothing";
}

}  // namespace commplane_car
