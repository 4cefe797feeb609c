// SPDX-License-Identifier: Apache-2.0
// Reduce-scatter: rank r reduces slice r of all inputs. `call.count` are the elements of one slice.
#include <string.h>

#include "collective.h"
#include "pipeline.h"
#include "tuning.h"

namespace commplane_car {
namespace {

// Hop 1: all inputs are there. Hop 2: all have read. In place is safe: slice r is read by rank r alone.
int symmetric(Comm& comm, const Call& call, uint64_t bytes) {
    if (const int status = hop(comm, call.descriptor)) return status;
    const void* from[COMMPLANE_CAR_MAX_WORLD];
    for (uint32_t rank = 0; rank < comm.world; ++rank) from[rank] = peer_input(call, rank, comm.rank * bytes);
    void* to = call.out;
    call.reduce(&to, 1, from, comm.world, call.count);
    return last_hop(comm, call.descriptor);
}

// A slot holds a piece of every slice, piece s at s * piece; the own one is read where it is.
int staged(Comm& comm, const Call& call, uint64_t bytes) {
    uint64_t piece = comm.slot_bytes / comm.world;
    piece = piece >= 64 ? piece / 64 * 64 : piece / 8 * 8;  // whole elements; comm_open sees to it that it is not 0
    return pipelined(
        comm, call.descriptor, ceil_div(bytes, piece),
        [&](uint64_t i, unsigned char* to) {
            const uint64_t at = i * piece, length = smaller(bytes - at, piece);
            for (uint32_t rank = 0; rank < comm.world; ++rank) {
                if (rank != comm.rank) memcpy(to + rank * piece, call.in + rank * bytes + at, length);
            }
        },
        [&](uint64_t i, uint64_t step) {
            const uint64_t at = i * piece, length = smaller(bytes - at, piece);
            const void* from[COMMPLANE_CAR_MAX_WORLD];
            for (uint32_t rank = 0; rank < comm.world; ++rank) from[rank] = slot(comm, rank, step) + comm.rank * piece;
            from[comm.rank] = call.in + comm.rank * bytes + at;
            void* to = call.out + at;
            call.reduce(&to, 1, from, comm.world, length / call.element_bytes);
        });
}

}  // namespace

int reduce_scatter(Comm& comm, const Call& call) {
    const uint64_t bytes = call.count * call.element_bytes;
    const bool direct = call.region != nullptr && bytes * comm.world > kTinyBytes;
    return direct ? symmetric(comm, call, bytes) : staged(comm, call, bytes);
}

}  // namespace commplane_car
