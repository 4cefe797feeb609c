// SPDX-License-Identifier: Apache-2.0
// The exported functions: check what the caller gave, then hand over.
#include <stdint.h>
#include <string.h>

#include "collective.h"
#include "comm.h"
#include "commplane_car.h"
#include "error.h"
#include "faults.h"
#include "reduce.h"
#include "region.h"
#include "segment.h"
#include "tuning.h"

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

[[gnu::cold]] int bad_dtype(int dtype) { return car::fail(COMMPLANE_CAR_EUNSUPPORTED, "dtype %d is not served", dtype); }

bool is_dtype(int dtype) { return dtype >= COMMPLANE_CAR_FLOAT32 && dtype <= COMMPLANE_CAR_UINT8; }

// Whether [a, +a_bytes) and [b, +b_bytes) share a byte.
bool overlap(const void* a, uint64_t a_bytes, const void* b, uint64_t b_bytes) {
    const auto from = reinterpret_cast<uint64_t>(a), to = reinterpret_cast<uint64_t>(b);
    return from < to + b_bytes && to < from + a_bytes;
}

[[gnu::cold]] int bad_op(int op) { return car::fail(COMMPLANE_CAR_EUNSUPPORTED, "op %d is not served for this dtype", op); }

[[gnu::cold]] int bad_count() { return car::fail(COMMPLANE_CAR_EINVAL, "there are 2^48 elements or more"); }

// Elements of a part where all parts together have fewer than 2^48.
uint64_t most_parts(const commplane_car_comm& comm) { return ((UINT64_C(1) << car::kCountBits) - 1) / comm.world; }

[[gnu::cold]] int bad_buffers(const char* what) { return car::fail(COMMPLANE_CAR_EINVAL, "%s", what); }

// What every collective does around its algorithm. The caller has checked the arguments; `about` lacks only what depends on
// the region that the input, `bytes` long, lies in.
template <class Run>
inline int collective(commplane_car_comm& comm, commplane_car_call& about, car::Call& call, uint64_t bytes, Run run) {
    const Entered entered(comm);
    if (entered.status() != 0) [[unlikely]] return entered.status();
    call.region = nullptr;
    call.offset = 0;
    if (bytes != 0 && comm.region_count != 0) {
        const auto from = reinterpret_cast<uint64_t>(call.in);
        call.region = car::find_region(comm, from, bytes);
        if (call.region != nullptr) {
            call.offset = from - (call.region->base + comm.rank * call.region->stride);
            about.symmetric = 1;
            about.region = call.region->id;
            about.offset = call.offset;
        }
    }
    call.count = about.count;
    call.element_bytes = car::element_bytes(about.dtype);
    call.descriptor = car::describe(about);

    const uint64_t sequence = comm.sequence.load(std::memory_order_relaxed) + 1, step = comm.next_step;
    if (car::kRecordFlight) comm.flight.begin(sequence, call.descriptor);
    comm.sequence.store(sequence, std::memory_order_release);
    int status;
    if (car::any_aborted(comm)) [[unlikely]] {
        status = car::refuse_aborted(comm, call.descriptor);
    } else {
        const car::DefaultRounding rounding;
        status = run();
    }
    if (car::kRecordFlight) comm.flight.end(sequence, status, comm.next_step - step);
    return status;
}

}  // namespace

extern "C" {

uint32_t commplane_car_abi_version(void) { return COMMPLANE_CAR_ABI_MAJOR << 16 | COMMPLANE_CAR_ABI_MINOR; }

const char* commplane_car_last_error(void) { return car::last_error(); }

const char* commplane_car_status_name(int status) {
    static const char* const names[] = {"OK",       "EINVAL",   "ENOMEM",    "ESYS",      "ENOSPC",  "EEXIST",
                                        "ENOENT",   "ESIZE",    "EPERM",     "ETIMEDOUT", "EABORTED", "EMISMATCH",
                                        "EPOISONED", "ECLOSED", "EBUSY",     "EUNSUPPORTED", "ELIMIT", "EPEERDEAD", "EINTERRUPTED"};
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
    if (!is_dtype(dtype)) return bad_dtype(dtype);
    if (op < COMMPLANE_CAR_SUM || op > COMMPLANE_CAR_AVG) return bad_op(op);
    if (count >> car::kCountBits != 0) return bad_count();
    car::Call call;
    call.reduce = car::reduce_table().reduce[dtype - 1][op - 1];
    if (call.reduce == nullptr) return bad_op(op);
    const uint64_t bytes = count * car::element_bytes(static_cast<uint32_t>(dtype));
    if (count != 0 && (in == nullptr || out == nullptr)) return bad_buffers("a buffer is null");
    if (in != out && overlap(in, bytes, out, bytes)) return bad_buffers("input and output overlap without being the same");
    call.in = static_cast<const unsigned char*>(in);
    call.out = static_cast<unsigned char*>(out);
    commplane_car_call about = {};
    about.kind = COMMPLANE_CAR_KIND_ALL_REDUCE;
    about.dtype = static_cast<uint32_t>(dtype);
    about.op = static_cast<uint32_t>(op);
    about.count = count;
    about.in_place = in == out;
    return collective(*comm, about, call, bytes, [&] {
        return call.region == nullptr ? car::all_reduce_staged(*comm, call) : car::all_reduce_symmetric(*comm, call);
    });
}

int commplane_car_all_gather(commplane_car_comm* comm, const void* in, void* out, uint64_t count, int dtype) {
    if (comm == nullptr) return null_comm();
    if (!is_dtype(dtype)) return bad_dtype(dtype);
    if (count > most_parts(*comm)) return bad_count();
    if (count != 0 && (in == nullptr || out == nullptr)) return bad_buffers("a buffer is null");
    const uint64_t bytes = count * car::element_bytes(static_cast<uint32_t>(dtype));
    if (static_cast<unsigned char*>(out) + comm->rank * bytes != in && overlap(in, bytes, out, bytes * comm->world)) {
        return bad_buffers("the input overlaps the output without being its own part of it");
    }
    car::Call call;
    call.in = static_cast<const unsigned char*>(in);
    call.out = static_cast<unsigned char*>(out);
    commplane_car_call about = {};
    about.kind = COMMPLANE_CAR_KIND_ALL_GATHER;
    about.dtype = static_cast<uint32_t>(dtype);
    about.count = count;
    return collective(*comm, about, call, bytes, [&] { return car::all_gather(*comm, call); });
}

int commplane_car_reduce_scatter(commplane_car_comm* comm, const void* in, void* out, uint64_t count, int dtype, int op) {
    if (comm == nullptr) return null_comm();
    if (!is_dtype(dtype)) return bad_dtype(dtype);
    if (op < COMMPLANE_CAR_SUM || op > COMMPLANE_CAR_AVG) return bad_op(op);
    if (count > most_parts(*comm)) return bad_count();
    car::Call call;
    call.reduce = car::reduce_table().reduce[dtype - 1][op - 1];
    if (call.reduce == nullptr) return bad_op(op);
    if (count != 0 && (in == nullptr || out == nullptr)) return bad_buffers("a buffer is null");
    const uint64_t bytes = count * car::element_bytes(static_cast<uint32_t>(dtype));
    if (static_cast<const unsigned char*>(in) + comm->rank * bytes != out && overlap(in, bytes * comm->world, out, bytes)) {
        return bad_buffers("the output overlaps the input without being its own part of it");
    }
    call.in = static_cast<const unsigned char*>(in);
    call.out = static_cast<unsigned char*>(out);
    commplane_car_call about = {};
    about.kind = COMMPLANE_CAR_KIND_REDUCE_SCATTER;
    about.dtype = static_cast<uint32_t>(dtype);
    about.op = static_cast<uint32_t>(op);
    about.count = count;
    return collective(*comm, about, call, bytes * comm->world, [&] { return car::reduce_scatter(*comm, call); });
}

int commplane_car_broadcast(commplane_car_comm* comm, void* buffer, uint64_t count, int dtype, uint32_t root) {
    if (comm == nullptr) return null_comm();
    if (!is_dtype(dtype)) return bad_dtype(dtype);
    if (count >> car::kCountBits != 0) return bad_count();
    if (root >= comm->world) return car::fail(COMMPLANE_CAR_EINVAL, "root %u is not below %u", root, comm->world);
    if (count != 0 && buffer == nullptr) return bad_buffers("a buffer is null");
    car::Call call;
    call.in = call.out = static_cast<unsigned char*>(buffer);
    call.root = root;
    commplane_car_call about = {};
    about.kind = COMMPLANE_CAR_KIND_BROADCAST;
    about.dtype = static_cast<uint32_t>(dtype);
    about.count = count;
    about.root = root;
    const uint64_t bytes = count * car::element_bytes(static_cast<uint32_t>(dtype));
    return collective(*comm, about, call, bytes, [&] { return car::broadcast(*comm, call); });
}

int commplane_car_all_reduce_rms_norm(commplane_car_comm* comm, const void* in, const void* residual, const void* weight,
                                      void* norm_out, void* residual_out, uint64_t rows, uint64_t hidden, int dtype, float eps,
                                      float weight_bias) {
    if (comm == nullptr) return null_comm();
    if (dtype < COMMPLANE_CAR_FLOAT32 || dtype > COMMPLANE_CAR_BFLOAT16) return bad_dtype(dtype);
    if (hidden >> 32 != 0 || (hidden != 0 && rows > ((UINT64_C(1) << car::kCountBits) - 1) / hidden)) return bad_count();
    const uint64_t element = car::element_bytes(static_cast<uint32_t>(dtype)), bytes = rows * hidden * element;
    if (bytes != 0) {
        if (in == nullptr || residual == nullptr || weight == nullptr || norm_out == nullptr || residual_out == nullptr) {
            return bad_buffers("a buffer is null");
        }
        if ((norm_out != in && overlap(norm_out, bytes, in, bytes)) || overlap(norm_out, bytes, residual, bytes) ||
            (residual_out != residual && overlap(residual_out, bytes, residual, bytes)) ||
            overlap(residual_out, bytes, in, bytes) || overlap(norm_out, bytes, residual_out, bytes) ||
            overlap(norm_out, bytes, weight, hidden * element) || overlap(residual_out, bytes, weight, hidden * element)) {
            return bad_buffers("an output overlaps what it may not");
        }
    }
    car::NormCall norm;
    norm.call.in = static_cast<const unsigned char*>(in);
    norm.call.out = static_cast<unsigned char*>(norm_out);
    norm.call.reduce = car::reduce_table().reduce[dtype - 1][COMMPLANE_CAR_SUM - 1];
    norm.residual = static_cast<const unsigned char*>(residual);
    norm.weight = static_cast<const unsigned char*>(weight);
    norm.residual_out = static_cast<unsigned char*>(residual_out);
    norm.rows = rows;
    norm.hidden = hidden;
    norm.eps = eps;
    norm.weight_bias = weight_bias;
    norm.kernels = &car::reduce_table().norm[dtype - 1];
    commplane_car_call about = {};
    about.kind = COMMPLANE_CAR_KIND_ALL_REDUCE_RMS_NORM;
    about.dtype = static_cast<uint32_t>(dtype);
    about.op = COMMPLANE_CAR_SUM;
    about.count = rows * hidden;
    about.hidden = hidden;
    about.eps = eps;
    about.weight_bias = weight_bias;
    about.in_place = in == norm_out;
    return collective(*comm, about, norm.call, bytes, [&] { return car::all_reduce_rms_norm(*comm, norm); });
}

int commplane_car_barrier(commplane_car_comm* comm) {
    if (comm == nullptr) return null_comm();
    commplane_car_call about = {};
    about.kind = COMMPLANE_CAR_KIND_BARRIER;
    car::Call call;
    return collective(*comm, about, call, 0, [&] { return car::barrier(*comm, call.descriptor); });
}

int commplane_car_single_copy_probe(commplane_car_comm* comm) {
    return comm == nullptr ? null_comm() : car::single_copy_probe(*comm);
}

void commplane_car_single_copy_range(uint32_t world_size, uint64_t* min_bytes, uint64_t* max_bytes) {
    const car::SizeRange range = car::single_copy_range(world_size);
    *min_bytes = range.min_bytes;
    *max_bytes = range.max_bytes;
}

int commplane_car_single_copy_enable(commplane_car_comm* comm, uint64_t min_bytes, uint64_t max_bytes) {
    if (comm == nullptr) return null_comm();
    const Entered entered(*comm);
    return entered.status() != 0 ? entered.status() : car::single_copy_enable(*comm, min_bytes, max_bytes);
}

int commplane_car_flight(commplane_car_comm* comm, void* records, uint64_t record_bytes, uint64_t capacity, uint64_t* count) {
    if (comm == nullptr) return null_comm();
    if (records == nullptr || count == nullptr || record_bytes != sizeof(commplane_car_flight_record)) {
        return car::fail(COMMPLANE_CAR_EINVAL, "flight records are %zu bytes each, and need a place", sizeof(commplane_car_flight_record));
    }
    *count = comm->flight.read(comm->sequence.load(std::memory_order_acquire),
                               static_cast<commplane_car_flight_record*>(records), capacity);
    return COMMPLANE_CAR_OK;
}

void commplane_car_set_interrupt_check(int (*check)(void)) { car::set_interrupt_check(check); }

int commplane_car_abort(commplane_car_comm* comm) { return comm == nullptr ? null_comm() : car::comm_abort(*comm); }

int commplane_car_status_detail(const commplane_car_comm* comm, commplane_car_detail* out) {
    if (comm == nullptr) return null_comm();
    commplane_car_detail detail = comm->detail;
    if (detail.status == 0) detail.sequence = comm->sequence.load(std::memory_order_relaxed);
    return give(detail, sizeof detail, out);
}

}  // extern "C"
