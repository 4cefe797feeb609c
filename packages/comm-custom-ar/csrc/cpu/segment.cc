// SPDX-License-Identifier: Apache-2.0
// POSIX shared-memory objects: make, map and reserve, unmap, unlink.
#include "segment.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <new>

#include "commplane_car.h"
#include "error.h"

namespace commplane_car {
namespace {

constexpr size_t kNameMax = 200;

struct Name {
    char text[kNameMax + 2];
};

int normalise(const char* name, Name* out) {
    if (name == nullptr) return fail(COMMPLANE_CAR_EINVAL, "segment name is null");
    const char* bare = name[0] == '/' ? name + 1 : name;
    const size_t length = strlen(bare);
    if (length == 0 || length > kNameMax || strchr(bare, '/') != nullptr) {
        return fail(COMMPLANE_CAR_EINVAL, "segment name '%.64s' is not 1 to %zu characters without '/'", name, kNameMax);
    }
    snprintf(out->text, sizeof out->text, "/%s", bare);
    return COMMPLANE_CAR_OK;
}

int code_of(int error) {
    switch (error) {
        case EEXIST: return COMMPLANE_CAR_EEXIST;
        case ENOENT: return COMMPLANE_CAR_ENOENT;
        case ENOSPC: return COMMPLANE_CAR_ENOSPC;
        case ENOMEM: return COMMPLANE_CAR_ENOMEM;
        case EACCES:
        case EPERM: return COMMPLANE_CAR_EPERM;
        default: return COMMPLANE_CAR_ESYS;
    }
}

// posix_fallocate returns the error instead of setting errno, and may be interrupted while it zeroes many pages.
int reserve(int fd, uint64_t offset, uint64_t bytes) {
    int error;
    do {
        error = posix_fallocate(fd, static_cast<off_t>(offset), static_cast<off_t>(bytes));
    } while (error == EINTR);
    return error;
}

int map_open(int fd, const char* name, uint64_t bytes, uint64_t reserve_offset, uint64_t reserve_bytes,
             commplane_car_segment** out) {
    struct stat about;
    if (fstat(fd, &about) != 0) return fail_errno(COMMPLANE_CAR_ESYS, errno, "cannot stat segment", name);
    if (about.st_uid != geteuid()) {
        return fail(COMMPLANE_CAR_EPERM, "segment %s belongs to user %u, this process is user %u", name,
                    static_cast<unsigned>(about.st_uid), static_cast<unsigned>(geteuid()));
    }
    if (static_cast<uint64_t>(about.st_size) != bytes) {
        return fail(COMMPLANE_CAR_ESIZE, "segment %s has %llu bytes, wanted %llu", name,
                    static_cast<unsigned long long>(about.st_size), static_cast<unsigned long long>(bytes));
    }
    if (reserve_bytes != 0) {
        const int error = reserve(fd, reserve_offset, reserve_bytes);
        if (error != 0) return fail_errno(code_of(error), error, "cannot reserve pages of segment", name);
    }
    void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) return fail_errno(code_of(errno), errno, "cannot map segment", name);
    void* memory = malloc(sizeof(commplane_car_segment));  // not `new`: it would bring the C++ runtime's unwinder along
    if (memory == nullptr) {
        munmap(base, bytes);
        return fail(COMMPLANE_CAR_ENOMEM, "no memory for a segment handle");
    }
    *out = new (memory) commplane_car_segment{base, bytes, {0}};
    return COMMPLANE_CAR_OK;
}

}  // namespace

int segment_create(const char* name, uint64_t bytes) {
    Name full;
    if (const int status = normalise(name, &full)) return status;
    if (bytes == 0 || bytes > (UINT64_C(1) << 47)) {
        return fail(COMMPLANE_CAR_EINVAL, "segment size is not 1 to 2^47 bytes");
    }
    const int fd = shm_open(full.text, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0) return fail_errno(code_of(errno), errno, "cannot create segment", full.text);
    int error = 0;
    while (ftruncate(fd, static_cast<off_t>(bytes)) != 0) {
        error = errno;
        if (error != EINTR) break;
        error = 0;
    }
    close(fd);
    if (error != 0) {
        shm_unlink(full.text);
        return fail_errno(code_of(error), error, "cannot size segment", full.text);
    }
    return COMMPLANE_CAR_OK;
}

int segment_map(const char* name, uint64_t bytes, uint64_t reserve_offset, uint64_t reserve_bytes,
                commplane_car_segment** out) {
    Name full;
    if (const int status = normalise(name, &full)) return status;
    if (out == nullptr) return fail(COMMPLANE_CAR_EINVAL, "the place for the segment handle is null");
    if (reserve_offset > bytes || reserve_bytes > bytes - reserve_offset) {
        return fail(COMMPLANE_CAR_EINVAL, "the part to reserve does not lie in the segment's %llu bytes",
                    static_cast<unsigned long long>(bytes));
    }
    const int fd = shm_open(full.text, O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0) return fail_errno(code_of(errno), errno, "cannot open segment", full.text);
    const int status = map_open(fd, full.text, bytes, reserve_offset, reserve_bytes, out);
    close(fd);
    return status;
}

int segment_unmap(commplane_car_segment* segment) {
    if (segment == nullptr) return fail(COMMPLANE_CAR_EINVAL, "segment handle is null");
    if (segment->users.load(std::memory_order_acquire) != 0) {
        return fail(COMMPLANE_CAR_EBUSY, "a communicator is open on this segment: close it first");
    }
    if (munmap(segment->base, segment->bytes) != 0) {
        return fail_errno(COMMPLANE_CAR_ESYS, errno, "cannot unmap a segment", "");
    }
    free(segment);
    return COMMPLANE_CAR_OK;
}

int segment_unlink(const char* name) {
    Name full;
    if (const int status = normalise(name, &full)) return status;
    if (shm_unlink(full.text) != 0 && errno != ENOENT) {
        return fail_errno(code_of(errno), errno, "cannot unlink segment", full.text);
    }
    return COMMPLANE_CAR_OK;
}

}  // namespace commplane_car
