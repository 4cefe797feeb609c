// SPDX-License-Identifier: Apache-2.0
// Opening and closing a communicator.
#include "comm.h"

#include <stdlib.h>

#include <new>

#include "error.h"
#include "faults.h"
#include "process.h"

namespace commplane_car {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kWidestElement = 8;

// Every communicator ever opened: handles stay valid to the end, and a leak checker sees that they are not lost.
std::atomic<Comm*> all_communicators{nullptr};

void remember(Comm* comm) {
    comm->older = all_communicators.load(std::memory_order_relaxed);
    while (!all_communicators.compare_exchange_weak(comm->older, comm, std::memory_order_release, std::memory_order_relaxed)) {
    }
}

int check(const commplane_car_options& options) {
    if (options.world_size < 2 || options.world_size > COMMPLANE_CAR_MAX_WORLD) {
        return fail(COMMPLANE_CAR_EINVAL, "world_size %u is not 2 to %d", options.world_size, COMMPLANE_CAR_MAX_WORLD);
    }
    if (options.rank >= options.world_size) {
        return fail(COMMPLANE_CAR_EINVAL, "rank %u is not below world_size %u", options.rank, options.world_size);
    }
    if (options.staging_bytes < kRing * 64 || options.staging_bytes > (UINT64_C(1) << 40)) {
        return fail(COMMPLANE_CAR_EINVAL, "staging_bytes %llu is not 256 to 2^40",
                    static_cast<unsigned long long>(options.staging_bytes));
    }
    return COMMPLANE_CAR_OK;
}

void introduce(Comm& comm, uint64_t token) {
    const ProcessIdentity self = this_process();
    HelloLine& hello = comm.control[comm.rank]->hello;
    hello.geometry.store(geometry_of(comm, comm.rank), std::memory_order_relaxed);
    hello.slot_bytes.store(comm.slot_bytes, std::memory_order_relaxed);
    hello.token.store(token, std::memory_order_relaxed);
    hello.process_id.store(self.id, std::memory_order_relaxed);
    hello.process_start.store(self.start, std::memory_order_relaxed);
    hello.process_namespace.store(self.space, std::memory_order_relaxed);
    comm.single_copy_word = kMagic ^ comm.rank ^ token;
    hello.single_copy_probe.store(reinterpret_cast<uint64_t>(&comm.single_copy_word), std::memory_order_relaxed);
    hello.magic.store(kMagic, std::memory_order_release);
}

}  // namespace

int layout(const commplane_car_options& options, commplane_car_layout_info* out) {
    if (const int status = check(options)) return status;
    const uint64_t part = kControlBytes + (options.staging_bytes + kPage - 1) / kPage * kPage;
    out->reserved = 0;
    out->total_bytes = part * options.world_size;
    out->part_offset = part * options.rank;
    out->part_bytes = part;
    return COMMPLANE_CAR_OK;
}

int comm_open(const commplane_car_options& options, commplane_car_segment* segment, Comm** out) {
    if (segment == nullptr || out == nullptr) return fail(COMMPLANE_CAR_EINVAL, "segment or place for the handle is null");
    commplane_car_layout_info info = {};
    if (const int status = layout(options, &info)) return status;
    if (segment->bytes < info.total_bytes) {
        return fail(COMMPLANE_CAR_ESIZE, "segment has %llu bytes, %u ranks with %llu of staging need %llu",
                    static_cast<unsigned long long>(segment->bytes), options.world_size,
                    static_cast<unsigned long long>(options.staging_bytes),
                    static_cast<unsigned long long>(info.total_bytes));
    }
    const uint64_t chunk = options.chunk_bytes == 0 ? COMMPLANE_CAR_DEFAULT_CHUNK : options.chunk_bytes;
    if (chunk % 64 != 0) {
        return fail(COMMPLANE_CAR_EINVAL, "chunk_bytes %llu is not a multiple of 64", static_cast<unsigned long long>(chunk));
    }
    const uint64_t share = options.staging_bytes / kRing / 64 * 64;
    const uint64_t slot_bytes = chunk < share ? chunk : share;
    if (slot_bytes < kWidestElement * options.world_size) {
        return fail(COMMPLANE_CAR_EINVAL, "a slot of %llu bytes does not hold one element a rank: chunk_bytes and a quarter of "
                    "staging_bytes have to be at least 8 * world_size", static_cast<unsigned long long>(slot_bytes));
    }
    if (options.timeout_ns == 0) return fail(COMMPLANE_CAR_EINVAL, "timeout_ns is 0: every wait has to be bounded");
    const unsigned char* const part = static_cast<unsigned char*>(segment->base) + info.part_offset;
    if (reinterpret_cast<const RankControl*>(part)->hello.magic.load(std::memory_order_acquire) != 0) {
        return fail(COMMPLANE_CAR_EBUSY, "rank %u's part of the segment has been used already: a communicator needs a fresh one",
                    options.rank);
    }

    void* memory = aligned_alloc(kLineBytes, (sizeof(Comm) + kLineBytes - 1) / kLineBytes * kLineBytes);
    if (memory == nullptr) return fail(COMMPLANE_CAR_ENOMEM, "no memory for a communicator");
    Comm* comm = new (memory) Comm{};
    comm->slot_bytes = slot_bytes;
    comm->rank = options.rank;
    comm->world = options.world_size;
    comm->oversubscribed = options.oversubscribed != 0;
    comm->timeout_ns.store(options.timeout_ns, std::memory_order_relaxed);
    comm->segment = segment;
    for (uint32_t rank = 0; rank < comm->world; ++rank) {
        unsigned char* theirs = static_cast<unsigned char*>(segment->base) + info.part_bytes * rank;
        comm->control[rank] = reinterpret_cast<RankControl*>(theirs);
        comm->staging[rank] = theirs + kControlBytes;
    }
    introduce(*comm, options.token);
    segment->users.fetch_add(1, std::memory_order_relaxed);
    remember(comm);
    *out = comm;
    return COMMPLANE_CAR_OK;
}

int comm_close(Comm& comm) {
    if (comm.busy.exchange(true, std::memory_order_acquire)) {
        return fail(COMMPLANE_CAR_EBUSY, "a call is running on this communicator");
    }
    const bool closed = comm.state.exchange(COMMPLANE_CAR_ECLOSED, std::memory_order_acq_rel) == COMMPLANE_CAR_ECLOSED;
    if (!closed) {
        free(comm.scratch);
        comm.scratch = nullptr;
        comm.segment->users.fetch_sub(1, std::memory_order_release);
    }
    comm.busy.store(false, std::memory_order_release);
    return COMMPLANE_CAR_OK;
}

int comm_abort(Comm& comm) {
    if (comm.state.load(std::memory_order_acquire) == COMMPLANE_CAR_ECLOSED) {
        return fail(COMMPLANE_CAR_ECLOSED, "the communicator is closed");
    }
    // Who was told by another rank has nothing to add: it would be taken for one of those that are to blame.
    const bool told = comm.state.load(std::memory_order_acquire) == COMMPLANE_CAR_EPOISONED &&
                      comm.detail.status == COMMPLANE_CAR_EABORTED;
    if (!told) tell_peers(comm, bit(comm.rank));
    return COMMPLANE_CAR_OK;
}

}  // namespace commplane_car
