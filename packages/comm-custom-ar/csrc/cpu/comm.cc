// SPDX-License-Identifier: Apache-2.0
// Opening and closing a communicator, its registered regions, and what happens when a hop fails.
#include "comm.h"

#include <stdio.h>
#include <stdlib.h>

#include <new>

#include "error.h"

namespace commplane_car {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kMismatchGraceNs = 200000000;  // how long a known mismatch waits for the rest of the picture

// Every communicator ever opened: handles stay valid to the end, and a leak checker sees that they are not lost.
std::atomic<Comm*> all_communicators{nullptr};

void remember(Comm* comm) {
    comm->older = all_communicators.load(std::memory_order_relaxed);
    while (!all_communicators.compare_exchange_weak(comm->older, comm, std::memory_order_release, std::memory_order_relaxed)) {
    }
}

enum AbortReason : uint64_t { kAbortCalled = 1, kAbortTimedOut = 2 };

uint64_t geometry_of(uint64_t world, uint64_t rank) {
    return (uint64_t{COMMPLANE_CAR_ABI_MAJOR} << 32) | (world << 16) | rank;
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

const char* kind_name(uint32_t kind) {
    switch (kind) {
        case COMMPLANE_CAR_KIND_ALL_REDUCE: return "all_reduce";
        case COMMPLANE_CAR_KIND_BARRIER: return "barrier";
        default: return "nothing";
    }
}

// "1, 3" into `text`.
void name_ranks(uint64_t mask, char* text, size_t bytes) {
    size_t used = 0;
    text[0] = '\0';
    for (uint32_t rank = 0; rank < COMMPLANE_CAR_MAX_WORLD && used + 8 < bytes; ++rank) {
        if ((mask >> rank & 1) == 0) continue;
        used += static_cast<size_t>(snprintf(text + used, bytes - used, used == 0 ? "%u" : ", %u", rank));
    }
}

uint64_t missing_at(const Comm& comm, uint64_t step) {
    uint64_t mask = 0;
    for (uint32_t rank = 0; rank < comm.world; ++rank) {
        const FlagLine& line = comm.control[rank]->ring[step % kRing];
        if (rank != comm.rank && line.step.load(std::memory_order_acquire) != step) mask |= UINT64_C(1) << rank;
    }
    return mask;
}

// The ranks that have published `step` with another descriptor; decodes them.
uint64_t mismatch_at(Comm& comm, uint64_t step, const Descriptor& mine) {
    uint64_t mask = 0;
    for (uint32_t rank = 0; rank < comm.world; ++rank) {
        const FlagLine& line = comm.control[rank]->ring[step % kRing];
        if (rank == comm.rank || line.step.load(std::memory_order_acquire) != step) continue;
        const Descriptor theirs{line.descriptor.load(std::memory_order_relaxed),
                                line.place.load(std::memory_order_relaxed)};
        if (theirs.word == mine.word && theirs.place == mine.place) continue;
        mask |= UINT64_C(1) << rank;
        comm.detail.peers[rank] = decode(theirs);
    }
    return mask;
}

uint64_t aborted_now(const Comm& comm) {
    uint64_t mask = 0;
    for (uint32_t rank = 0; rank < comm.world; ++rank) {
        if (comm.control[rank]->hello.aborted.load(std::memory_order_acquire) != 0) mask |= UINT64_C(1) << rank;
    }
    return mask;
}

// Fills the detail and poisons. The abort word tells the peers, except for a mismatch, which each of them sees itself.
void poison(Comm& comm, int status, const Descriptor& mine, uint64_t missing, uint64_t mismatch) {
    if (status == COMMPLANE_CAR_ETIMEDOUT) {
        comm.control[comm.rank]->hello.aborted.store(kAbortTimedOut, std::memory_order_release);
    }
    comm.detail.status = status;
    comm.detail.sequence = comm.sequence;
    comm.detail.missing_mask = missing;
    comm.detail.mismatch_mask = mismatch;
    comm.detail.abort_mask = aborted_now(comm);
    comm.detail.mine = decode(mine);
    comm.state.store(COMMPLANE_CAR_EPOISONED, std::memory_order_release);
}

}  // namespace

Descriptor describe(const commplane_car_call& call) {
    Descriptor descriptor;
    descriptor.word = (uint64_t{call.kind} << 60) | (uint64_t{call.op} << 56) | (uint64_t{call.dtype} << 52) |
                      (uint64_t{call.symmetric} << 51) | (uint64_t{call.in_place} << 50) | call.count;
    descriptor.place = (uint64_t{call.region} << 48) | call.offset;
    return descriptor;
}

commplane_car_call decode(const Descriptor& descriptor) {
    constexpr uint64_t kLow = (UINT64_C(1) << kCountBits) - 1;
    commplane_car_call call = {};
    call.kind = static_cast<uint32_t>(descriptor.word >> 60);
    call.op = static_cast<uint32_t>(descriptor.word >> 56 & 15);
    call.dtype = static_cast<uint32_t>(descriptor.word >> 52 & 15);
    call.symmetric = static_cast<uint32_t>(descriptor.word >> 51 & 1);
    call.in_place = static_cast<uint32_t>(descriptor.word >> 50 & 1);
    call.count = descriptor.word & kLow;
    call.region = static_cast<uint32_t>(descriptor.place >> 48);
    call.offset = descriptor.place & kLow;
    return call;
}

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
    if (options.timeout_ns == 0) return fail(COMMPLANE_CAR_EINVAL, "timeout_ns is 0: every wait has to be bounded");

    void* memory = aligned_alloc(64, (sizeof(Comm) + 63) / 64 * 64);
    if (memory == nullptr) return fail(COMMPLANE_CAR_ENOMEM, "no memory for a communicator");
    Comm* comm = new (memory) Comm;
    const uint64_t share = options.staging_bytes / kRing / 64 * 64;
    comm->slot_bytes = chunk < share ? chunk : share;
    comm->rank = options.rank;
    comm->world = options.world_size;
    comm->oversubscribed = options.oversubscribed != 0;
    comm->timeout_ns.store(options.timeout_ns, std::memory_order_relaxed);
    comm->segment = segment;
    for (uint32_t rank = 0; rank < comm->world; ++rank) {
        unsigned char* part = static_cast<unsigned char*>(segment->base) + info.part_bytes * rank;
        comm->control[rank] = reinterpret_cast<RankControl*>(part);
        comm->staging[rank] = part + kControlBytes;
    }
    HelloLine& hello = comm->control[comm->rank]->hello;
    if (hello.magic.load(std::memory_order_acquire) != 0) {
        free(memory);
        return fail(COMMPLANE_CAR_EBUSY, "rank %u's part of the segment has been used already: a communicator needs a fresh one",
                    options.rank);
    }
    hello.geometry.store(geometry_of(comm->world, comm->rank), std::memory_order_relaxed);
    hello.slot_bytes.store(comm->slot_bytes, std::memory_order_relaxed);
    hello.token.store(options.token, std::memory_order_relaxed);
    hello.magic.store(kMagic, std::memory_order_release);
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
    if (!closed) comm.segment->users.fetch_sub(1, std::memory_order_release);
    comm.busy.store(false, std::memory_order_release);
    return COMMPLANE_CAR_OK;
}

int comm_abort(Comm& comm) {
    if (comm.state.load(std::memory_order_acquire) == COMMPLANE_CAR_ECLOSED) {
        return fail(COMMPLANE_CAR_ECLOSED, "the communicator is closed");
    }
    Word& word = comm.control[comm.rank]->hello.aborted;
    uint64_t none = 0;
    word.compare_exchange_strong(none, kAbortCalled, std::memory_order_release, std::memory_order_relaxed);
    return COMMPLANE_CAR_OK;
}

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

int await_slowly(Comm& comm, uint64_t step, const Descriptor& mine) {
    const uint64_t missing = missing_at(comm, step);
    if (mismatch_at(comm, step, mine) != 0) return fail_mismatch(comm, step, mine);
    if (any_aborted(comm)) return fail_aborted(comm, mine, missing);
    // The last peer came between the end of the wait and this look: nobody is missing, so the step is as good as any.
    if (missing == 0) return await(comm, step, mine);
    poison(comm, COMMPLANE_CAR_ETIMEDOUT, mine, missing, 0);
    char absent[256];
    name_ranks(missing, absent, sizeof absent);
    return fail(COMMPLANE_CAR_ETIMEDOUT, "%s #%llu: rank %s did not arrive within %.3f s", kind_name(comm.detail.mine.kind),
                static_cast<unsigned long long>(comm.sequence), absent,
                static_cast<double>(comm.timeout_ns.load(std::memory_order_relaxed)) * 1e-9);
}

int fail_aborted(Comm& comm, const Descriptor& mine, uint64_t missing) {
    poison(comm, COMMPLANE_CAR_EABORTED, mine, missing, 0);
    char aborted[256];
    name_ranks(comm.detail.abort_mask, aborted, sizeof aborted);
    return fail(COMMPLANE_CAR_EABORTED, "%s #%llu: aborted by rank %s", kind_name(comm.detail.mine.kind),
                static_cast<unsigned long long>(comm.sequence), aborted);
}

int fail_mismatch(Comm& comm, uint64_t step, const Descriptor& mine) {
    // The ranks not here yet belong to the picture, but a known mistake does not wait for them for long.
    uint64_t grace = comm.timeout_ns.load(std::memory_order_relaxed);
    if (grace > kMismatchGraceNs) grace = kMismatchGraceNs;
    bounded_wait(
        comm.oversubscribed, grace, [&] { return missing_at(comm, step) == 0; }, [&] { return any_aborted(comm); });
    const uint64_t mismatch = mismatch_at(comm, step, mine);
    poison(comm, COMMPLANE_CAR_EMISMATCH, mine, missing_at(comm, step), mismatch);
    char different[256];
    name_ranks(mismatch, different, sizeof different);
    return fail(COMMPLANE_CAR_EMISMATCH, "%s #%llu: rank %s made another call than this rank %u",
                kind_name(comm.detail.mine.kind), static_cast<unsigned long long>(comm.sequence), different, comm.rank);
}

int greet(Comm& comm) {
    const HelloLine& mine = comm.control[comm.rank]->hello;
    for (uint32_t rank = 0; rank < comm.world; ++rank) {
        const HelloLine& hello = comm.control[rank]->hello;
        if (hello.magic.load(std::memory_order_acquire) == kMagic &&
            hello.geometry.load(std::memory_order_relaxed) == geometry_of(comm.world, rank) &&
            hello.slot_bytes.load(std::memory_order_relaxed) == comm.slot_bytes &&
            hello.token.load(std::memory_order_relaxed) == mine.token.load(std::memory_order_relaxed)) {
            continue;
        }
        poison(comm, COMMPLANE_CAR_EMISMATCH, Descriptor{0, 0}, 0, UINT64_C(1) << rank);
        return fail(COMMPLANE_CAR_EMISMATCH,
                    "rank %u opened its communicator with another world size, staging, chunk size or token than rank %u", rank,
                    comm.rank);
    }
    comm.greeted = true;
    return COMMPLANE_CAR_OK;
}

}  // namespace commplane_car
