// SPDX-License-Identifier: Apache-2.0
// Registered symmetric regions: memory of every rank that this process has mapped.
#pragma once

#include "comm.h"

namespace commplane_car {

int register_region(Comm& comm, uint64_t base, uint64_t stride, uint64_t bytes, uint32_t id);
int unregister_region(Comm& comm, uint32_t id);

// The region whose part of this rank holds [address, +bytes); null if none does.
const Region* find_region(const Comm& comm, uint64_t address, uint64_t bytes);

}  // namespace commplane_car
