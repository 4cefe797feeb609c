// SPDX-License-Identifier: Apache-2.0
// The exported functions: check what the caller gave, then hand over.
#include <stdint.h>
#include <string.h>

#include "all_reduce.h"
#include "comm.h"
#include "commplane_car.h"
#include "error.h"
#include "reduce.h"
#include "segment.h"

namespace car = commplane_car;

namespace {

// Copies a caller's struct that may be older (shorter) or newer (longer) than ours; unknown fields are zero.
template <class Struct>
int take(const Struct* given, size_t least, Struct* out) {
    if (given == nullptr) return car::fail(COMMPLANE_CAR_EINVAL, "a struct pointer is null");
    if (given->size < least) {
        return car::fail(COMMPLANE_CAR_EINVAL, "struct size %u is below %zu: set `size` first", given->size, least);
    }
    memset(out, 0, sizeof *out);
    memcpy(out, given, given->size < sizeof *out ? given->size : sizeof *out);
    return COMMPLANE_CAR_OK;
}

// Fills a caller's struct, no more of it than the caller has.
template <class Struct>
int give(const Struct& value, size_t least, Struct* out) {
    if (out == nullptr) return car::fail(COMMPLANE_CAR_EINVAL, "a struct pointer is null");
    const uint32_t size = out->size;
    if (size < least) return car::fail(COMMPLANE_CAR_EINVAL, "struct size %u is below %zu: set `size` first", size, least);
    memcpy(out, &value, size < sizeof value ? size : sizeof value);
    out->size = size;
    return COMMPLANE_CAR_OK;
}

[[gnu::cold]] int fail_state(const commplane_car_comm& comm, int state) {
    if (state == COMMPLANE_CAR_ECLOSED) return car::fail(state, "the communicator is closed");
    return car::fail(state, "the communicator was poisoned by %s in call #%llu",
                     commplane_car_status_name(comm.detail.status),
                     static_cast<unsigned long long>(comm.detail.sequence));
}

// One call at a time on a communicator, and none on one that has failed.
class Entered {
  public:
    explicit Entered(commplane_car_comm& comm) : comm_(comm) {
        if (comm.busy.exchange(true, std::memory_order_acquire)) [[unlikely]] {
            owner_ = false;
            status_ = car::fail(COMMPLANE_CAR_EBUSY, "another thread is in a call on this communicator");
            return;
        }
        const int state = comm.state.load(std::memory_order_relaxed);
        if (state != 0) [[unlikely]] status_ = fail_state(comm, state);
    }
    ~Entered() {
        if (owner_) comm_.busy.store(false, std::memory_order_release);
    }
    Entered(const Entered&) = delete;
    Entered& operator=(const Entered&) = delete;
    int status() const { return status_; }

  private:
    commplane_car_comm& comm_;
    bool owner_ = true;
    int status_ = COMMPLANE_CAR_OK;
};

int null_comm() { return car::fail(COMMPLANE_CAR_EINVAL, "communicator handle is null"); }

}  // namespace

extern "C" {

uint32_t commplane_car_abi_version(void) { return COMMPLANE_CAR_ABI_MAJOR << 16 | COMMPLANE_CAR_ABI_MINOR; }

const char* commplane_car_last_error(void) { return car::last_error(); }

const char* commplane_car_status_name(int status) {
    static const char* const names[] = {"OK",       "EINVAL",   "ENOMEM",    "ESYS",      "ENOSPC",  "EEXIST",
                                        "ENOENT",   "ESIZE",    "EPERM",     "ETIMEDOUT", "EABORTED", "EMISMATCH",
                                        "EPOISONED", "ECLOSED", "EBUSY",     "EUNSUPPORTED", "ELIMIT"};
    const int index = -status;
    return index >= 0 && index < static_cast<int>(sizeof names / sizeof names[0]) ? names[index] : "EUNKNOWN";
}

const char* commplane_car_isa(void) { return car::reduce_table().name; }

int commplane_car_set_isa(const char* name) { return car::set_isa(name); }

int commplane_car_segment_create(const char* name, uint64_t bytes) { return car::segment_create(name, bytes); }

int commplane_car_segment_map(const char* name, uint64_t bytes, uint64_t reserve_offset, uint64_t reserve_bytes,
                              commplane_car_segment** out) {
    return car::segment_map(name, bytes, reserve_offset, reserve_bytes, out);
}

void* commplane_car_segment_base(const commplane_car_segment* segment) {
    return segment == nullptr ? nullptr : segment->base;
}

uint64_t commplane_car_segment_bytes(const commplane_car_segment* segment) {
    return segment == nullptr ? 0 : segment->bytes;
}

int commplane_car_segment_unmap(commplane_car_segment* segment) { return car::segment_unmap(segment); }

int commplane_car_segment_unlink(const char* name) { return car::segment_unlink(name); }

int commplane_car_layout(const commplane_car_options* options, commplane_car_layout_info* out) {
    commplane_car_options own;
    if (const int status = take(options, sizeof own, &own)) return status;
    commplane_car_layout_info info = {};
    if (const int status = car::layout(own, &info)) return status;
    return give(info, sizeof info, out);
}

int commplane_car_comm_open(const commplane_car_options* options, commplane_car_segment* segment,
                            commplane_car_comm** out) {
    commplane_car_options own;
    if (const int status = take(options, sizeof own, &own)) return status;
    return car::comm_open(own, segment, out);
}

int commplane_car_comm_close(commplane_car_comm* comm) { return comm == nullptr ? null_comm() : car::comm_close(*comm); }

int commplane_car_set_timeout(commplane_car_comm* comm, uint64_t timeout_ns) {
    if (comm == nullptr) return null_comm();
    if (timeout_ns == 0) return car::fail(COMMPLANE_CAR_EINVAL, "timeout_ns is 0: every wait has to be bounded");
    comm->timeout_ns.store(timeout_ns, std::memory_order_relaxed);
    return COMMPLANE_CAR_OK;
}

uint64_t commplane_car_chunk_bytes(const commplane_car_comm* comm) { return comm == nullptr ? 0 : comm->slot_bytes; }

int commplane_car_register_symmetric(commplane_car_comm* comm, void* base, uint64_t stride, uint64_t bytes, uint32_t id) {
    if (comm == nullptr) return null_comm();
    const Entered entered(*comm);
    if (entered.status() != 0) return entered.status();
    return car::register_region(*comm, reinterpret_cast<uint64_t>(base), stride, bytes, id);
}

int commplane_car_unregister_symmetric(commplane_car_comm* comm, uint32_t id) {
    if (comm == nullptr) return null_comm();
    const Entered entered(*comm);
    if (entered.status() == COMMPLANE_CAR_EBUSY) return entered.status();  // a poisoned one still lets go of its regions
    return car::unregister_region(*comm, id);
}

int commplane_car_all_reduce(commplane_car_comm* comm, const void* in, void* out, uint64_t count, int dtype, int op) {
    if (comm == nullptr) return null_comm();
    if (dtype < COMMPLANE_CAR_FLOAT32 || dtype > COMMPLANE_CAR_BFLOAT16) {
        return car::fail(COMMPLANE_CAR_EUNSUPPORTED, "dtype %d is not served", dtype);
    }
    if (op < COMMPLANE_CAR_SUM || op > COMMPLANE_CAR_AVG) {
        return car::fail(COMMPLANE_CAR_EUNSUPPORTED, "op %d is not served", op);
    }
    if (count >> car::kCountBits != 0) return car::fail(COMMPLANE_CAR_EINVAL, "count is not below 2^48");
    const uint64_t element = dtype == COMMPLANE_CAR_FLOAT32 ? 4 : 2;
    const uint64_t bytes = count * element;
    const uint64_t from = reinterpret_cast<uint64_t>(in);
    const uint64_t to = reinterpret_cast<uint64_t>(out);
    if (count != 0 && (from == 0 || to == 0)) return car::fail(COMMPLANE_CAR_EINVAL, "a buffer is null");
    if (from != to && from < to + bytes && to < from + bytes) {
        return car::fail(COMMPLANE_CAR_EINVAL, "input and output overlap without being the same");
    }

    const Entered entered(*comm);
    if (entered.status() != 0) return entered.status();
    const car::Region* region = count == 0 ? nullptr : car::find_region(*comm, from, bytes);
    commplane_car_call description = {};
    description.kind = COMMPLANE_CAR_KIND_ALL_REDUCE;
    description.dtype = static_cast<uint32_t>(dtype);
    description.op = static_cast<uint32_t>(op);
    description.count = count;
    car::AllReduce call;
    call.offset = 0;
    if (region != nullptr) {
        call.offset = from - (region->base + comm->rank * region->stride);
        description.symmetric = 1;
        description.in_place = from == to;
        description.region = region->id;
        description.offset = call.offset;
    }
    call.in = static_cast<const unsigned char*>(in);
    call.out = static_cast<unsigned char*>(out);
    call.count = count;
    call.element_bytes = element;
    call.reduce = car::reduce_table().reduce[dtype - 1][op - 1];
    call.descriptor = car::describe(description);
    call.region = region;

    ++comm->sequence;
    if (car::any_aborted(*comm)) [[unlikely]] return car::fail_aborted(*comm, call.descriptor, 0);
    const car::DefaultRounding rounding;
    return region == nullptr ? car::all_reduce_staged(*comm, call) : car::all_reduce_symmetric(*comm, call);
}

int commplane_car_barrier(commplane_car_comm* comm) {
    if (comm == nullptr) return null_comm();
    const Entered entered(*comm);
    if (entered.status() != 0) return entered.status();
    commplane_car_call description = {};
    description.kind = COMMPLANE_CAR_KIND_BARRIER;
    const car::Descriptor descriptor = car::describe(description);
    ++comm->sequence;
    if (car::any_aborted(*comm)) [[unlikely]] return car::fail_aborted(*comm, descriptor, 0);
    return car::barrier(*comm, descriptor);
}

int commplane_car_abort(commplane_car_comm* comm) { return comm == nullptr ? null_comm() : car::comm_abort(*comm); }

int commplane_car_status_detail(const commplane_car_comm* comm, commplane_car_detail* out) {
    if (comm == nullptr) return null_comm();
    commplane_car_detail detail = comm->detail;
    if (detail.status == 0) detail.sequence = comm->sequence;
    return give(detail, sizeof detail, out);
}

}  // extern "C"
