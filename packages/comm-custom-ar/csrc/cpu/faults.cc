// SPDX-License-Identifier: Apache-2.0
// What happens when a hop fails: a peer that does not come, has ended, gave up, or made another call.
//
// The rank that finds it writes down who is to blame (culprits), then its abort word. Whoever waits or arrives later reads both,
// so that all ranks name the rank that is missing, and not the one that noticed first.
#include <stdio.h>

#include "comm.h"
#include "error.h"
#include "faults.h"
#include "process.h"

namespace commplane_car {
namespace {

constexpr uint64_t kMismatchGraceNs = 200000000;  // how long a known mismatch waits for the rest of the picture
constexpr int kDyingMs = 200;  // how long a process that is known to end is waited for

std::atomic<int (*)(void)> interrupt_check{nullptr};

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
        if (rank != comm.rank && line.step.load(std::memory_order_acquire) != step) mask |= bit(rank);
    }
    return mask;
}

// The ranks that have published `step` with another descriptor; decodes them.
uint64_t mismatch_at(Comm& comm, uint64_t step, const Descriptor& mine) {
    uint64_t mask = 0;
    for (uint32_t rank = 0; rank < comm.world; ++rank) {
        const FlagLine& line = comm.control[rank]->ring[step % kRing];
        if (rank == comm.rank || line.step.load(std::memory_order_acquire) != step) continue;
        Descriptor theirs;
        uint64_t difference = 0;
        for (int i = 0; i < Descriptor::kWords; ++i) {
            theirs.words[i] = line.descriptor[i].load(std::memory_order_relaxed);
            difference |= theirs.words[i] ^ mine.words[i];
        }
        if (difference == 0) continue;
        mask |= bit(rank);
        comm.detail.peers[rank] = decode(theirs);
    }
    return mask;
}

uint64_t aborted_now(const Comm& comm) {
    uint64_t mask = 0;
    for (uint32_t rank = 0; rank < comm.world; ++rank) {
        if (comm.control[rank]->hello.aborted.load(std::memory_order_acquire) != 0) mask |= bit(rank);
    }
    return mask;
}

// Which of `ranks` have ended, as far as can be seen from here.
uint64_t dead_among(const Comm& comm, uint64_t ranks) {
    uint64_t mask = 0;
    for (uint32_t rank = 0; rank < comm.world; ++rank) {
        if ((ranks >> rank & 1) == 0) continue;
        const HelloLine& hello = comm.control[rank]->hello;
        if (hello.magic.load(std::memory_order_acquire) != kMagic) continue;
        const ProcessIdentity process = {hello.process_id.load(std::memory_order_relaxed),
                                         hello.process_start.load(std::memory_order_relaxed),
                                         hello.process_namespace.load(std::memory_order_relaxed)};
        if (has_ended(process)) mask |= bit(rank);
    }
    return mask;
}

// Fills the detail and poisons. `blame`: who made this rank give up, for the peers; 0 leaves the abort word alone, because the
// peers see for themselves.
void poison(Comm& comm, int status, const Descriptor& mine, uint64_t missing, uint64_t mismatch, uint64_t blame) {
    if (blame != 0) tell_peers(comm, blame);
    comm.flight.waits_for(missing);
    comm.detail.status = status;
    comm.detail.sequence = comm.sequence.load(std::memory_order_relaxed);
    comm.detail.missing_mask = missing;
    comm.detail.mismatch_mask = mismatch;
    comm.detail.abort_mask = aborted_now(comm);
    comm.detail.dead_mask = dead_among(comm, missing);
    comm.detail.mine = decode(mine);
    comm.state.store(COMMPLANE_CAR_EPOISONED, std::memory_order_release);
}

// "all_reduce #7: " and the rest.
int fail_call(const Comm& comm, int status, const char* what, uint64_t ranks, const char* rest) {
    char named[256];
    name_ranks(ranks, named, sizeof named);
    return fail(status, "%s #%llu: %s %s%s", kind_name(comm.detail.mine.kind),
                static_cast<unsigned long long>(comm.detail.sequence), what, named, rest);
}

int fail_aborted(Comm& comm, const Descriptor& mine) {
    const uint64_t aborted = aborted_now(comm);
    uint64_t culprits = 0;
    for (uint32_t rank = 0; rank < comm.world; ++rank) {
        if ((aborted >> rank & 1) != 0) culprits |= comm.control[rank]->hello.culprits.load(std::memory_order_relaxed);
    }
    poison(comm, COMMPLANE_CAR_EABORTED, mine, culprits & ~bit(comm.rank), 0, 0);
    return fail_call(comm, COMMPLANE_CAR_EABORTED, "aborted by rank", aborted, "");
}

}  // namespace

void set_interrupt_check(int (*check)(void)) { interrupt_check.store(check, std::memory_order_release); }

void tell_peers(Comm& comm, uint64_t culprits) {
    HelloLine& hello = comm.control[comm.rank]->hello;
    uint64_t none = 0;  // the first reason stays: peers may be reading it
    if (hello.culprits.compare_exchange_strong(none, culprits, std::memory_order_relaxed)) {
        hello.aborted.store(1, std::memory_order_release);
        std::atomic_thread_fence(std::memory_order_seq_cst);  // before this rank's memory is used for anything else: last_hop()
    }
}

int refuse_aborted(Comm& comm, const Descriptor& mine) { return fail_aborted(comm, mine); }

bool should_stop(Comm& comm, uint64_t step, const Descriptor& mine) {
    const uint64_t missing = missing_at(comm, step);
    comm.flight.waits_for(missing);
    int (*const check)(void) = interrupt_check.load(std::memory_order_acquire);
    if (check != nullptr && check() != 0) {
        comm.interrupted = true;
        return true;
    }
    // A mistake of the ranks that are here is known without those that are not.
    return mismatch_at(comm, step, mine) != 0 || dead_among(comm, missing) != 0;
}

int await_slowly(Comm& comm, uint64_t step, const Descriptor& mine) {
    const uint64_t missing = missing_at(comm, step);
    if (comm.interrupted) {
        comm.interrupted = false;
        poison(comm, COMMPLANE_CAR_EINTERRUPTED, mine, missing, 0, bit(comm.rank));
        if (missing == 0) return fail_call(comm, COMMPLANE_CAR_EINTERRUPTED, "interrupted when the last rank came", 0, "");
        return fail_call(comm, COMMPLANE_CAR_EINTERRUPTED, "interrupted while it waited for rank", missing, "");
    }
    if (mismatch_at(comm, step, mine) != 0) return fail_mismatch(comm, step, mine);
    if (any_aborted(comm)) return fail_aborted(comm, mine);
    // The last peer came between the end of the wait and this look: nobody is missing, so the step is as good as any.
    if (missing == 0) return await(comm, step, mine);
    const uint64_t dead = dead_among(comm, missing);
    if (dead != 0) {
        // Who is late, too, may only wait for the dead one elsewhere: it is not to blame.
        poison(comm, COMMPLANE_CAR_EPEERDEAD, mine, dead, 0, dead);
        return fail_call(comm, COMMPLANE_CAR_EPEERDEAD, "the process of rank", dead, " has ended");
    }
    poison(comm, COMMPLANE_CAR_ETIMEDOUT, mine, missing, 0, missing);
    char rest[64];
    snprintf(rest, sizeof rest, " did not arrive within %.3f s",
             static_cast<double>(comm.timeout_ns.load(std::memory_order_relaxed)) * 1e-9);
    return fail_call(comm, COMMPLANE_CAR_ETIMEDOUT, "rank", missing, rest);
}

int fail_peer(Comm& comm, const Descriptor& mine, uint32_t rank) {
    // A process gives its memory back before /proc says that it has ended. The other ranks, which look there, are told after that.
    constexpr timespec kNap = {0, 1000000};
    for (int i = 0; i < kDyingMs && dead_among(comm, bit(rank)) == 0; ++i) nanosleep(&kNap, nullptr);
    poison(comm, COMMPLANE_CAR_EPEERDEAD, mine, bit(rank), 0, bit(rank));
    return fail_call(comm, COMMPLANE_CAR_EPEERDEAD, "the process of rank", bit(rank), " has ended");
}

int fail_here(Comm& comm, const Descriptor& mine, int status) {
    poison(comm, status, mine, 0, 0, bit(comm.rank));
    return status;
}

int fail_mismatch(Comm& comm, uint64_t step, const Descriptor& mine) {
    // The ranks not here yet belong to the picture, but a known mistake does not wait for them for long.
    uint64_t grace = comm.timeout_ns.load(std::memory_order_relaxed);
    if (grace > kMismatchGraceNs) grace = kMismatchGraceNs;
    uint64_t begun = 0;
    bounded_wait(
        comm.oversubscribed, grace, begun, [&] { return missing_at(comm, step) == 0; }, [&] { return any_aborted(comm); },
        [] { return false; });
    const uint64_t mismatch = mismatch_at(comm, step, mine);
    poison(comm, COMMPLANE_CAR_EMISMATCH, mine, missing_at(comm, step), mismatch, 0);
    char rest[64];
    snprintf(rest, sizeof rest, " made another call than this rank %u", comm.rank);
    return fail_call(comm, COMMPLANE_CAR_EMISMATCH, "rank", mismatch, rest);
}

int greet(Comm& comm) {
    const HelloLine& mine = comm.control[comm.rank]->hello;
    for (uint32_t rank = 0; rank < comm.world; ++rank) {
        const HelloLine& hello = comm.control[rank]->hello;
        if (hello.magic.load(std::memory_order_acquire) == kMagic &&
            hello.geometry.load(std::memory_order_relaxed) == geometry_of(comm, rank) &&
            hello.slot_bytes.load(std::memory_order_relaxed) == comm.slot_bytes &&
            hello.token.load(std::memory_order_relaxed) == mine.token.load(std::memory_order_relaxed)) {
            continue;
        }
        poison(comm, COMMPLANE_CAR_EMISMATCH, Descriptor{}, 0, bit(rank), 0);
        return fail(COMMPLANE_CAR_EMISMATCH,
                    "rank %u opened its communicator with another world size, chunk size, token or share of cores than rank %u", rank,
                    comm.rank);
    }
    comm.greeted = true;
    return COMMPLANE_CAR_OK;
}

}  // namespace commplane_car
