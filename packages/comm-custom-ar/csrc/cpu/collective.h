// SPDX-License-Identifier: Apache-2.0
// The collectives, one algorithm a file. Each is collective over the communicator's ranks and returns a status.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "comm.h"
#include "norm.h"
#include "reduce.h"

namespace commplane_car {

// A checked call.
struct Call {
    const unsigned char* in;
    unsigned char* out;
    uint64_t count;  // elements, as the caller gave them
    uint64_t element_bytes;
    ReduceFunction reduce;  // null where nothing is reduced
    Descriptor descriptor;
    const Region* region;  // of the input; null: not symmetric
    uint64_t offset;       // of the input in this rank's part of the region
    uint32_t root;         // broadcast
};

// Where the input of `rank` lies in this process, from byte `at` on. Symmetric calls only.
inline unsigned char* peer_input(const Call& call, uint32_t rank, uint64_t at) {
    return reinterpret_cast<unsigned char*>(call.region->base + rank * call.region->stride + call.offset + at);
}

// All-reduce of any buffers. One-shot: every rank reduces everything. Two-shot: every rank reduces a slice and all copy the
// results. Single copy: two-shot without staging.
int all_reduce_one_shot(Comm& comm, const Call& call);
int all_reduce_two_shot(Comm& comm, const Call& call);
int all_reduce_single_copy(Comm& comm, const Call& call);
// The one of these that is fastest for the size and the number of ranks.
int all_reduce_staged(Comm& comm, const Call& call);
// Buffers in a registered region: nothing is copied but what is too small to be worth a second hop.
int all_reduce_symmetric(Comm& comm, const Call& call);

int all_gather(Comm& comm, const Call& call);
int reduce_scatter(Comm& comm, const Call& call);
int broadcast(Comm& comm, const Call& call);
int barrier(Comm& comm, const Descriptor& descriptor);

struct NormCall {
    Call call;  // count is rows * hidden, `out` is norm_out
    const unsigned char* residual;
    const unsigned char* weight;
    unsigned char* residual_out;
    uint64_t rows;
    uint64_t hidden;
    float eps;
    float weight_bias;
    const NormKernels* kernels;
};
int all_reduce_rms_norm(Comm& comm, const NormCall& call);

int single_copy_probe(Comm& comm);
int single_copy_enable(Comm& comm, uint64_t min_bytes, uint64_t max_bytes);

}  // namespace commplane_car
