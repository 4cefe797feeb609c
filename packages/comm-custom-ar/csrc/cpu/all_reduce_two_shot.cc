// SPDX-License-Identifier: Apache-2.0
// Pipelined two-shot all-reduce through the staging slots: the work of a reduction is shared, so its cost hardly grows with the
// number of ranks. A chunk takes two steps. In step a (even) every rank's input lies in its slot; rank r reduces slice r of all
// of them into the slot of step a+1, and into its own `out`. In step a+1 all copy the other slices from their owners' slots:
//
//     fill 0, publish 0,  [ await 2i, reduce, publish 2i+1,  fill i+1, publish 2i+2,  await 2i+1, copy ]  for every chunk i
//
// Rule (R) of comm.h holds: 2i+1 is published after the copy of 2i-1, and 2i+2 after the reduction of 2i.
//
// In place is safe: chunk i of `out` is written after chunk i of `in` was copied into the slot; the own slice, which is not
// copied because no peer reads it, is read by the reduction that overwrites it.
#include <string.h>

#include "collective.h"
#include "pipeline.h"

namespace commplane_car {
namespace {

constexpr uint64_t kSliceAlign = 64;

}  // namespace

int all_reduce_two_shot(Comm& comm, const Call& call) {
    const uint64_t total = call.count * call.element_bytes;
    const uint64_t chunk = comm.slot_bytes;
    const uint64_t chunks = ceil_div(total, chunk);
    if (chunks == 0) return hop(comm, call.descriptor);
    const uint64_t first = comm.next_step;
    const uint64_t slice = ceil_div(ceil_div(smaller(total, chunk), comm.world), kSliceAlign) * kSliceAlign;

    // Slice `rank` of a chunk of `bytes`; empty for the last ranks of a small one.
    const auto length = [&](uint32_t rank, uint64_t bytes) {
        const uint64_t begin = smaller(rank * slice, bytes);
        return smaller(slice, bytes - begin);
    };
    const auto fill = [&](uint64_t i) {
        const uint64_t at = i * chunk, bytes = smaller(total - at, chunk), step = first + 2 * i;
        unsigned char* const to = slot(comm, comm.rank, step);
        const uint64_t before = smaller(comm.rank * slice, bytes), after = before + length(comm.rank, bytes);
        memcpy(to, call.in + at, before);
        memcpy(to + after, call.in + at + after, bytes - after);
        publish(comm, step, call.descriptor);
    };

    fill(0);
    for (uint64_t i = 0; i < chunks; ++i) {
        const uint64_t at = i * chunk, bytes = smaller(total - at, chunk), step = first + 2 * i;
        if (const int status = await(comm, step, call.descriptor)) return status;
        if (const uint64_t mine = length(comm.rank, bytes)) {
            const uint64_t begin = comm.rank * slice;
            const void* from[COMMPLANE_CAR_MAX_WORLD];
            for (uint32_t rank = 0; rank < comm.world; ++rank) from[rank] = slot(comm, rank, step) + begin;
            from[comm.rank] = call.in + at + begin;
            void* to[] = {call.out + at + begin, slot(comm, comm.rank, step + 1)};
            call.reduce(to, 2, from, comm.world, mine / call.element_bytes);
        }
        publish(comm, step + 1, call.descriptor);
        if (i + 1 < chunks) fill(i + 1);
        if (const int status = await(comm, step + 1, call.descriptor)) return status;
        for (uint32_t rank = 0; rank < comm.world; ++rank) {
            if (rank != comm.rank) memcpy(call.out + at + rank * slice, slot(comm, rank, step + 1), length(rank, bytes));
        }
    }
    comm.next_step = first + 2 * chunks;
    return COMMPLANE_CAR_OK;
}

}  // namespace commplane_car
