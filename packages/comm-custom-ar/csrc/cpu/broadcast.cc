// SPDX-License-Identifier: Apache-2.0
// Broadcast from `root`. Every rank takes part in every hop, also those that have nothing to send: that is what keeps the ring
// in step and finds ranks that made another call.
#include <string.h>

#include "collective.h"
#include "pipeline.h"
#include "tuning.h"

namespace commplane_car {
namespace {

// Hop 1: the root's data is there. Hop 2: all have read it.
int symmetric(Comm& comm, const Call& call, uint64_t bytes) {
    if (const int status = hop(comm, call.descriptor)) return status;
    if (comm.rank != call.root) memcpy(call.out, peer_input(call, call.root, 0), bytes);
    return last_hop(comm, call.descriptor);
}

int staged(Comm& comm, const Call& call, uint64_t bytes) {
    const uint64_t chunk = comm.slot_bytes;
    return pipelined(
        comm, call.descriptor, ceil_div(bytes, chunk),
        [&](uint64_t i, unsigned char* to) {
            if (comm.rank == call.root) memcpy(to, call.in + i * chunk, smaller(bytes - i * chunk, chunk));
        },
        [&](uint64_t i, uint64_t step) {
            if (comm.rank == call.root) return;
            memcpy(call.out + i * chunk, slot(comm, call.root, step), smaller(bytes - i * chunk, chunk));
        });
}

}  // namespace

int broadcast(Comm& comm, const Call& call) {
    const uint64_t bytes = call.count * call.element_bytes;
    return call.region != nullptr && bytes > kTinyBytes ? symmetric(comm, call, bytes) : staged(comm, call, bytes);
}

}  // namespace commplane_car
