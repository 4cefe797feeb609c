// SPDX-License-Identifier: Apache-2.0
// What a rank knows about a failure.
#pragma once

#include "harness.h"

inline commplane_car_detail detail_of(const Rank& self) {
    commplane_car_detail detail = {};
    detail.size = sizeof detail;
    CHECK_STATUS(commplane_car_status_detail(self.comm, &detail), 0);
    return detail;
}

// Every further call says so, and changes nothing.
inline void check_poisoned(const Rank& self) {
    const commplane_car_detail before = detail_of(self);
    float data[128] = {}, more[128] = {}, norm[128], sum[128];
    commplane_car_comm* const comm = self.comm;
    const int f32 = COMMPLANE_CAR_FLOAT32, op = COMMPLANE_CAR_SUM, wanted = COMMPLANE_CAR_EPOISONED;
    CHECK_STATUS(commplane_car_all_reduce(comm, data, data, 1, f32, op), wanted);
    CHECK_STATUS(commplane_car_all_gather(comm, data, more, 1, f32), wanted);
    CHECK_STATUS(commplane_car_reduce_scatter(comm, data, more, 1, f32, op), wanted);
    CHECK_STATUS(commplane_car_broadcast(comm, data, 1, f32, 0), wanted);
    CHECK_STATUS(commplane_car_all_reduce_rms_norm(comm, data, more, more, norm, sum, 1, 1, f32, 1e-6f, 0.0f), wanted);
    CHECK_STATUS(commplane_car_barrier(comm), wanted);
    const commplane_car_detail after = detail_of(self);
    CHECK(after.status == before.status && after.sequence == before.sequence && after.missing_mask == before.missing_mask &&
          after.dead_mask == before.dead_mask && after.mine.kind == before.mine.kind);
}
