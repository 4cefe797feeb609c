// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "comm.h"
#include "reduce.h"

namespace commplane_car {

// A checked all-reduce call.
struct AllReduce {
    const unsigned char* in;
    unsigned char* out;
    uint64_t count;
    uint64_t element_bytes;
    ReduceFunction reduce;
    Descriptor descriptor;
    const Region* region;  // null: not symmetric
    uint64_t offset;       // of `in` in this rank's part of the region
};

// Any buffers: one hop a chunk of slot_bytes, pipelined.
int all_reduce_staged(Comm& comm, const AllReduce& call);

// Buffers in a registered region: nothing is copied but what is too small to be worth a second hop.
int all_reduce_symmetric(Comm& comm, const AllReduce& call);

int barrier(Comm& comm, const Descriptor& descriptor);

}  // namespace commplane_car
