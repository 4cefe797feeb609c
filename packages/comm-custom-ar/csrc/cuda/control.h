// SPDX-License-Identifier: Apache-2.0
//
// What the ranks of a group and their devices tell each other outside of the data: one page of host memory that all ranks map and
// all devices see. Only faults are written here; in a call without one nobody reads more than `stop`, and devices only while they
// wait.
#pragma once

#include <stdint.h>

namespace car {
namespace gpu {

constexpr int kMaxRanks = 8;
constexpr uint32_t kCallWords = 3;

enum Cause : uint32_t { kTimedOut, kStopped, kOtherCall, kTwoAtOnce, kCauses };  // kStopped: because others did

struct ControlRank {
    uint32_t causes[kCauses];      // 1: why this rank's device gave up, each of them that it met
    uint32_t gave_up;              // the host called abort
    uint32_t closed;               // has let go of the peers' memory
    uint32_t number;               // calls of the block that gave up
    uint32_t missing[kMaxRanks];  // 1: nothing had come from that rank
    uint32_t other[kMaxRanks];    // 1: that rank made another call, whose words are in `theirs`
    uint32_t mine[kCallWords];
    uint32_t reserved;
    uint32_t theirs[kMaxRanks][4];
    uint32_t pad[5];
};
static_assert(sizeof(ControlRank) == 256, "a rank's part");

struct Control {
    uint32_t stop;  // not 0: some rank is at fault or gave up; whoever waits stops waiting
    uint32_t pad[63];
    ControlRank rank[kMaxRanks];
};

}  // namespace gpu
}  // namespace car
