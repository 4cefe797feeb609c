// SPDX-License-Identifier: Apache-2.0
// Is another process still there? Asked only by a rank that has waited in vain for some time.
#pragma once

#include <stdint.h>

namespace commplane_car {

struct ProcessIdentity {
    uint64_t id;         // 0: /proc tells nothing here
    uint64_t start;      // clock ticks after boot: tells two processes of one number apart
    uint64_t space;      // inode of the pid namespace
};

ProcessIdentity this_process();

// True if it is certain that the process has ended (a zombie has). False where it runs or nothing can be learnt.
bool has_ended(const ProcessIdentity& process);

}  // namespace commplane_car
