// SPDX-License-Identifier: Apache-2.0
// How a call fails. Each of these poisons the communicator and returns the status.
#pragma once

#include <stdint.h>

#include "comm.h"

namespace commplane_car {

// For a system call that said that the process of `rank` is gone.
[[gnu::cold]] int fail_peer(Comm& comm, const Descriptor& mine, uint32_t rank);

// For a failure of this rank alone, whose text is set already: the peers are told.
[[gnu::cold]] int fail_here(Comm& comm, const Descriptor& mine, int status);

// Makes every rank that waits or arrives later fail. `culprits`: who is to blame, this rank itself if it will not come.
void tell_peers(Comm& comm, uint64_t culprits);

void set_interrupt_check(int (*check)(void));

// What has to fit between the ranks: also `oversubscribed`, which decides which algorithm runs.
inline uint64_t geometry_of(const Comm& comm, uint64_t rank) {
    return (uint64_t{comm.oversubscribed} << 48) | (uint64_t{COMMPLANE_CAR_ABI_MAJOR} << 32) | (uint64_t{comm.world} << 16) | rank;
}

}  // namespace commplane_car
