// SPDX-License-Identifier: Apache-2.0
// All-gather: every rank copies the peers' parts from where they lie, the staging slots or the symmetric buffers.
#include <string.h>

#include "collective.h"
#include "pipeline.h"
#include "tuning.h"

namespace commplane_car {
namespace {

void copy_own(const Comm& comm, const Call& call, uint64_t bytes) {
    unsigned char* const own = call.out + comm.rank * bytes;
    if (own != call.in && bytes != 0) memcpy(own, call.in, bytes);
}

// Hop 1: all inputs are there. Hop 2: all have read, so each caller may change its input at once.
int symmetric(Comm& comm, const Call& call, uint64_t bytes) {
    if (const int status = hop(comm, call.descriptor)) return status;
    for (uint32_t step = 1; step < comm.world; ++step) {  // each begins with another peer: no memory is read by all at once
        const uint32_t rank = (comm.rank + step) % comm.world;
        memcpy(call.out + rank * bytes, peer_input(call, rank, 0), bytes);
    }
    copy_own(comm, call, bytes);
    return last_hop(comm, call.descriptor);
}

int staged(Comm& comm, const Call& call, uint64_t bytes) {
    const uint64_t chunk = comm.slot_bytes;
    const int status = pipelined(
        comm, call.descriptor, ceil_div(bytes, chunk),
        [&](uint64_t i, unsigned char* to) { memcpy(to, call.in + i * chunk, smaller(bytes - i * chunk, chunk)); },
        [&](uint64_t i, uint64_t step) {
            const uint64_t at = i * chunk;
            for (uint32_t other = 1; other < comm.world; ++other) {
                const uint32_t rank = (comm.rank + other) % comm.world;
                memcpy(call.out + rank * bytes + at, slot(comm, rank, step), smaller(bytes - at, chunk));
            }
        });
    if (status == COMMPLANE_CAR_OK) copy_own(comm, call, bytes);
    return status;
}

}  // namespace

int all_gather(Comm& comm, const Call& call) {
    const uint64_t bytes = call.count * call.element_bytes;
    return call.region != nullptr && bytes > kTinyBytes ? symmetric(comm, call, bytes) : staged(comm, call, bytes);
}

}  // namespace commplane_car
