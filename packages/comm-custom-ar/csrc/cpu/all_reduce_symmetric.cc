// SPDX-License-Identifier: Apache-2.0
// All-reduce of buffers that all ranks have mapped: peers read the input where it is. The descriptor holds region and offset,
// so the address computed for a peer's buffer is the peer's own.
#include "collective.h"
#include "pipeline.h"
#include "tuning.h"

namespace commplane_car {
namespace {

constexpr uint64_t kSliceAlign = 64;

// The buffers of all ranks, from byte `at` on.
void find_buffers(const Comm& comm, const Call& call, uint64_t at, void** buffers) {
    for (uint32_t rank = 0; rank < comm.world; ++rank) buffers[rank] = peer_input(call, rank, at);
}

// Two-shot. Between the two hops slice r of every rank's buffer is read and written by rank r alone: it reduces the N slices
// in rank order and writes the result to all N buffers. Hop 1: all inputs are there. Hop 2: all results are there, and
// nobody touches this rank's buffer any more.
int in_place(Comm& comm, const Call& call) {
    if (const int status = hop(comm, call.descriptor)) return status;
    const uint64_t total = call.count * call.element_bytes;
    const uint64_t slice = ceil_div(ceil_div(total, comm.world), kSliceAlign) * kSliceAlign;
    const uint64_t begin = comm.rank * slice;
    if (begin < total) {
        void* buffers[COMMPLANE_CAR_MAX_WORLD];
        find_buffers(comm, call, begin, buffers);
        call.reduce(buffers, comm.world, buffers, comm.world, smaller(total - begin, slice) / call.element_bytes);
    }
    return last_hop(comm, call.descriptor);
}

// One-shot. Hop 1: all inputs are there. Then every rank reduces everything into its own `out`, which no peer touches. Hop 2:
// all have read, so each caller may change its input at once.
int out_of_place(Comm& comm, const Call& call) {
    if (const int status = hop(comm, call.descriptor)) return status;
    void* buffers[COMMPLANE_CAR_MAX_WORLD];
    find_buffers(comm, call, 0, buffers);
    void* to = call.out;
    call.reduce(&to, 1, buffers, comm.world, call.count);
    return last_hop(comm, call.descriptor);
}

}  // namespace

int all_reduce_symmetric(Comm& comm, const Call& call) {
    if (call.count * call.element_bytes <= kTinyBytes) return all_reduce_one_shot(comm, call);
    return call.in == call.out ? in_place(comm, call) : out_of_place(comm, call);
}

}  // namespace commplane_car
