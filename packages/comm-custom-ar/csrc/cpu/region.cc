// SPDX-License-Identifier: Apache-2.0
#include "region.h"

#include "error.h"

namespace commplane_car {

int register_region(Comm& comm, uint64_t base, uint64_t stride, uint64_t bytes, uint32_t id) {
    if (base == 0 || id == 0 || id > 0xffff || bytes == 0 || bytes > stride || stride >= (UINT64_C(1) << kCountBits)) {
        return fail(COMMPLANE_CAR_EINVAL, "a symmetric region needs a base, 1 <= id <= 65535 and 1 <= bytes <= stride < 2^48");
    }
    if (comm.region_count == COMMPLANE_CAR_MAX_REGIONS) {
        return fail(COMMPLANE_CAR_ELIMIT, "no more than %d symmetric regions at once", COMMPLANE_CAR_MAX_REGIONS);
    }
    const uint64_t begin = base + comm.rank * stride;
    for (uint32_t i = 0; i < comm.region_count; ++i) {
        const Region& other = comm.regions[i];
        const uint64_t theirs = other.base + comm.rank * other.stride;
        if (other.id == id) return fail(COMMPLANE_CAR_EEXIST, "symmetric region %u is registered already", id);
        if (begin < theirs + other.bytes && theirs < begin + bytes) {
            return fail(COMMPLANE_CAR_EINVAL, "the region overlaps registration %u", other.id);
        }
    }
    comm.regions[comm.region_count++] = Region{base, stride, bytes, id};
    return COMMPLANE_CAR_OK;
}

int unregister_region(Comm& comm, uint32_t id) {
    for (uint32_t i = 0; i < comm.region_count; ++i) {
        if (comm.regions[i].id != id) continue;
        comm.regions[i] = comm.regions[--comm.region_count];
        return COMMPLANE_CAR_OK;
    }
    return fail(COMMPLANE_CAR_ENOENT, "no symmetric region is registered as %u", id);
}

const Region* find_region(const Comm& comm, uint64_t address, uint64_t bytes) {
    for (uint32_t i = 0; i < comm.region_count; ++i) {
        const Region& region = comm.regions[i];
        const uint64_t offset = address - (region.base + comm.rank * region.stride);  // wraps below the region: huge
        if (offset < region.bytes && bytes <= region.bytes - offset) return &region;
    }
    return nullptr;
}

}  // namespace commplane_car
