// SPDX-License-Identifier: Apache-2.0
// Pipelined one-shot all-reduce through the staging slots.
//
// Chunk i of a call is step first+i. For every chunk a rank copies its input into its own slot, publishes, awaits the peers
// and reduces all slots (its own input is read where it is) into `out`. While it waits for the peers' chunk i its own chunk
// i+1 is already on its way:
//
//     copy 0, publish 0,  copy 1, publish 1, await 0, reduce 0,  copy 2, publish 2, await 1, reduce 1,  ...
//
// That is rule (R) of comm.h: step u is published after step u-2 has been reduced. Hence the slot that copy u overwrites,
// that of step u-4, is free: see there. A message of one chunk is one hop.
//
// In place is safe: reduce i writes chunk i of `out` only, and chunk i of `in` has been copied and read by then; the peers
// never read `in`.
#include <string.h>

#include "all_reduce.h"

namespace commplane_car {

int all_reduce_staged(Comm& comm, const AllReduce& call) {
    const uint64_t total = call.count * call.element_bytes;
    const uint64_t chunk = comm.slot_bytes;  // a multiple of 64, hence of the element
    const uint64_t first = comm.next_step;
    const uint64_t chunks = total <= chunk ? 1 : (total + chunk - 1) / chunk;

    const auto send = [&](uint64_t i) {
        const uint64_t at = i * chunk;
        const uint64_t bytes = total - at < chunk ? total - at : chunk;
        if (bytes != 0) memcpy(slot(comm, comm.rank, first + i), call.in + at, bytes);
        publish(comm, first + i, call.descriptor);
    };

    send(0);
    for (uint64_t i = 0; i < chunks; ++i) {
        if (i + 1 < chunks) send(i + 1);
        if (const int status = await(comm, first + i, call.descriptor)) return status;
        const uint64_t at = i * chunk;
        const uint64_t bytes = total - at < chunk ? total - at : chunk;
        const void* from[COMMPLANE_CAR_MAX_WORLD];
        for (uint32_t rank = 0; rank < comm.world; ++rank) from[rank] = slot(comm, rank, first + i);
        from[comm.rank] = call.in + at;
        void* to = call.out + at;
        call.reduce(&to, 1, from, comm.world, bytes / call.element_bytes);
    }
    comm.next_step = first + chunks;
    return COMMPLANE_CAR_OK;
}

}  // namespace commplane_car
