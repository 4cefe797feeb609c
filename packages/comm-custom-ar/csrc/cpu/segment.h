// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include <atomic>

// One mapping of a shared-memory object in this process.
struct commplane_car_segment {
    void* base;
    uint64_t bytes;
    std::atomic<uint32_t> users;  // communicators open on it: unmap refuses while there are any
};

namespace commplane_car {

int segment_create(const char* name, uint64_t bytes);
int segment_map(const char* name, uint64_t bytes, uint64_t reserve_offset, uint64_t reserve_bytes,
                commplane_car_segment** out);
int segment_unmap(commplane_car_segment* segment);
int segment_unlink(const char* name);

}  // namespace commplane_car
