// SPDX-License-Identifier: Apache-2.0
// The staged pipeline: a message goes through the staging slots in chunks, chunk i of a call in step first+i.
//
// While a rank waits for the peers' chunk i, its own chunk i+1 is already on its way:
//
//     fill 0, publish 0,  fill 1, publish 1, await 0, drain 0,  fill 2, publish 2, await 1, drain 1,  ...
//
// That is rule (R) of comm.h: step u is published after step u-2 has been drained. Hence the slot that fill u overwrites, that
// of step u-4, is free: see there. A message of one chunk is one hop.
#pragma once

#include "comm.h"

namespace commplane_car {

// fill(i, slot): write this rank's chunk i into its slot. drain(i, step): every rank's chunk i is in slot(comm, rank, step).
// At least one step is taken, so that ranks meet and compare even with nothing to send.
template <class Fill, class Drain>
int pipelined(Comm& comm, const Descriptor& descriptor, uint64_t chunks, Fill fill, Drain drain) {
    const uint64_t first = comm.next_step;
    if (chunks == 0) return hop(comm, descriptor);
    fill(uint64_t{0}, slot(comm, comm.rank, first));
    publish(comm, first, descriptor);
    for (uint64_t i = 0; i < chunks; ++i) {
        if (i + 1 < chunks) {
            fill(i + 1, slot(comm, comm.rank, first + i + 1));
            publish(comm, first + i + 1, descriptor);
        }
        if (const int status = await(comm, first + i, descriptor)) return status;
        drain(i, first + i);
    }
    comm.next_step = first + chunks;
    return COMMPLANE_CAR_OK;
}

inline uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }
inline uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

}  // namespace commplane_car
