// SPDX-License-Identifier: Apache-2.0
// The numbers that decide which algorithm runs. Each was measured; the command stands beside it.
#pragma once

#include <stdint.h>

namespace commplane_car {

// Symmetric messages up to this many bytes go through the staging slots: the copy costs less than a second hop.
constexpr uint64_t kTinyBytes = 2048;

// Staged all-reduces from this many bytes on are two-shot.
constexpr uint64_t two_shot_from(uint32_t world) { return world <= 2 ? UINT64_MAX : 32768; }

}  // namespace commplane_car
