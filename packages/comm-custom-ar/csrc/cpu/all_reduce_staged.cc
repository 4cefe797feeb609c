// SPDX-License-Identifier: Apache-2.0
// Which staged all-reduce runs. A pure function of what all ranks have in common.
#include "collective.h"
#include "tuning.h"

namespace commplane_car {

int all_reduce_staged(Comm& comm, const Call& call) {
    const uint64_t bytes = call.count * call.element_bytes;
    if (bytes >= comm.single_copy_min && bytes <= comm.single_copy_max) return all_reduce_single_copy(comm, call);
    if (bytes >= two_shot_from(comm.world, call.element_bytes, comm.oversubscribed, is_intel())) {
        return all_reduce_two_shot(comm, call);
    }
    return all_reduce_one_shot(comm, call);
}

}  // namespace commplane_car
