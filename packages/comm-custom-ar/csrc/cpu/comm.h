// SPDX-License-Identifier: Apache-2.0
// A communicator: the layout of the segment, its control lines, and the flag hop that every collective is made of.
//
// The segment is world_size equal parts; part r belongs to rank r, is reserved by rank r, and has one writer, rank r:
//
//     [ hello line | flag line 0..3 | ... 4096 ][ staging slot 0 | slot 1 | slot 2 | slot 3 ]
//
// THE PROTOCOL. Ranks run through the same sequence of steps 1, 2, 3, ... One step is one flag hop: a rank publishes step u
// (descriptor, then u itself into flag line u % 4 of its own part), then awaits u in line u % 4 of every peer. It works on
// the data of step u after that. Collectives keep to one rule:
//
//     (R) a rank publishes step u only after it has finished with step u-2 (awaited, compared, and read the peers' data).
//
// So at most two steps are open, which lets the staged paths fill the slot of step u while its peers still read that of u-1.
//
// Why a slot or a flag line of step u-4 may be overwritten at step u without any further wait: by (R) this rank has awaited
// step u-2, so it has seen every peer publish u-2; by (R) again a peer publishes u-2 only after it has finished with step
// u-4. Hence four slots and four lines, and a line can only hold u-4 (or 0) or u while a peer awaits u in it.
//
// Why this is right on x86 and on arm64: it relies on nothing but C++'s release and acquire. publish() stores the step with
// release, so every earlier access of that rank is ordered before it: its writes of the slot (a peer that acquires the flag
// sees the data and the descriptor) and its reads of the peers' slots of step u-2 (a peer that acquires the flag may
// overwrite them: a load cannot sink below a release store). await() loads the step with acquire, so every later access is
// ordered after it: reads of the peer's data cannot be satisfied early, and writes into the slot of step u-2+4 cannot become
// visible early. x86 gives this order to plain loads and stores (TSO), where the atomics cost nothing but keep the compiler
// from moving accesses; on arm64 they become stlr and ldar/ldapr. Results written straight into a peer's buffer (symmetric
// path) are covered by the same two sentences. A flag is one aligned 64-bit word, lock-free, hence address-free: it works
// between mappings at different addresses. tests/protocol_model.py explores all of this exhaustively for 2 and 3 ranks.
#pragma once

#include <stdint.h>

#include <atomic>

#include "commplane_car.h"
#include "descriptor.h"
#include "flight.h"
#include "segment.h"
#include "wait.h"

namespace commplane_car {

constexpr uint64_t kLineBytes = 128;  // two 64-byte lines: adjacent lines are fetched in pairs, and some arm64 have 128
constexpr uint64_t kControlBytes = 4096;
constexpr uint64_t kRing = 4;
constexpr uint64_t kMagic = UINT64_C(0x31524143504d4f43);  // "COMPCAR1"

static_assert(Word::is_always_lock_free && sizeof(Word) == 8, "flags between processes have to be lock-free");

// What a rank opened its communicator with. Constant after open, but for the abort words.
struct alignas(kLineBytes) HelloLine {
    Word magic;  // stored last, with release
    Word geometry;
    Word slot_bytes;
    Word token;
    Word process_id;         // who to look for when this rank does not come; 0: not known
    Word process_start;      // and which process of that number
    Word process_namespace;  // numbers mean something inside one pid namespace only
    Word single_copy_probe;  // the address of comm.single_copy_word in this rank's memory
    alignas(64) Word aborted;
    Word culprits;  // bit r: this rank gave up because rank r was missing; stored before `aborted`
};

// One step of one rank. All words lie in one 64-byte line: one transfer brings the flag and what is compared.
struct alignas(kLineBytes) FlagLine {
    Word step;
    Word descriptor[Descriptor::kWords];
    Word address;  // single copy: where this step's data lies in the rank's own memory
};
static_assert(sizeof(Word) * (2 + Descriptor::kWords) <= 64, "the flag and what is compared share a cache line");

struct RankControl {
    HelloLine hello;
    FlagLine ring[kRing];
};
static_assert(sizeof(RankControl) <= kControlBytes);

struct Region {
    uint64_t base;  // an address in this process
    uint64_t stride;
    uint64_t bytes;
    uint32_t id;  // 0: free
};

}  // namespace commplane_car

struct commplane_car_comm {
    // Read on every call.
    std::atomic<int> state{0};  // 0, or the code that every further call returns (EPOISONED, ECLOSED)
    std::atomic<bool> busy{false};
    std::atomic<uint64_t> timeout_ns{0};
    uint32_t rank = 0;
    uint32_t world = 0;
    bool oversubscribed = false;
    bool greeted = false;  // the peers' hello lines have been checked
    uint64_t slot_bytes = 0;
    uint64_t next_step = 1;
    commplane_car::Word sequence{0};  // calls begun; written by the calling thread alone
    uint32_t region_count = 0;
    uint64_t single_copy_min = UINT64_MAX;  // bytes; this and 0: off
    uint64_t single_copy_max = 0;
    uint64_t single_copy_word = 0;  // what peers read to see that this is the process they mean
    unsigned char* scratch = nullptr;  // of the single-copy path: 64 KiB a peer
    commplane_car_segment* segment = nullptr;
    commplane_car_comm* older = nullptr;  // in the list of all that were ever opened
    commplane_car::RankControl* control[COMMPLANE_CAR_MAX_WORLD] = {};
    unsigned char* staging[COMMPLANE_CAR_MAX_WORLD] = {};
    commplane_car::FlightRing flight;
    commplane_car::Region regions[COMMPLANE_CAR_MAX_REGIONS] = {};
    bool interrupted = false;       // by the interrupt check, in the wait that just ended
    commplane_car_detail detail = {};
};

namespace commplane_car {

using Comm = commplane_car_comm;

int layout(const commplane_car_options& options, commplane_car_layout_info* out);
int comm_open(const commplane_car_options& options, commplane_car_segment* segment, Comm** out);
int comm_close(Comm& comm);
int comm_abort(Comm& comm);

inline uint64_t bit(uint32_t rank) { return UINT64_C(1) << rank; }

inline unsigned char* slot(const Comm& comm, uint32_t rank, uint64_t step) {
    return comm.staging[rank] + (step % kRing) * comm.slot_bytes;
}

// Says that this rank's data of `step` is ready and that it has finished with step - 2. Never waits.
inline void publish(Comm& comm, uint64_t step, const Descriptor& descriptor, const void* address = nullptr) {
    FlagLine& line = comm.control[comm.rank]->ring[step % kRing];
    for (int i = 0; i < Descriptor::kWords; ++i) line.descriptor[i].store(descriptor.words[i], std::memory_order_relaxed);
    line.address.store(reinterpret_cast<uint64_t>(address), std::memory_order_relaxed);
    line.step.store(step, std::memory_order_release);
}

// The slow ends of await(), in faults.cc: out of line, so that the fast path stays a load and a compare a peer.
[[gnu::cold]] int await_slowly(Comm& comm, uint64_t step, const Descriptor& descriptor);
[[gnu::cold]] bool should_stop(Comm& comm, uint64_t step, const Descriptor& descriptor);
[[gnu::cold]] int fail_mismatch(Comm& comm, uint64_t step, const Descriptor& descriptor);
[[gnu::cold]] int greet(Comm& comm);
// For a call that finds, before it begins or at its end, that some rank has aborted.
[[gnu::cold]] int refuse_aborted(Comm& comm, const Descriptor& mine);

// True if any rank, this one included, has aborted.
inline bool any_aborted(const Comm& comm) {
    uint64_t seen = 0;
    for (uint32_t rank = 0; rank < comm.world; ++rank) {
        seen |= comm.control[rank]->hello.aborted.load(std::memory_order_relaxed);
    }
    return seen != 0;
}

// Waits until every peer has published `step` and compares its descriptor with ours. Not OK poisons the communicator.
// One deadline for all peers: where they come one after the other, each late, this rank still gives up at its own.
inline int await(Comm& comm, uint64_t step, const Descriptor& descriptor) {
    uint64_t difference = 0, begun = 0;
    for (uint32_t rank = 0; rank < comm.world; ++rank) {
        if (rank == comm.rank) continue;
        const FlagLine& line = comm.control[rank]->ring[step % kRing];
        if (line.step.load(std::memory_order_acquire) != step) {
            const Waited waited = bounded_wait(
                comm.oversubscribed, comm.timeout_ns.load(std::memory_order_relaxed), begun,
                [&] { return line.step.load(std::memory_order_relaxed) == step; }, [&] { return any_aborted(comm); },
                [&] { return should_stop(comm, step, descriptor); });
            if (waited != Waited::kReady) [[unlikely]] return await_slowly(comm, step, descriptor);
            (void)line.step.load(std::memory_order_acquire);
        }
#ifndef COMMPLANE_CAR_NO_COMPARE  // defined by benchmarks alone: what the comparison costs is the difference
        for (int i = 0; i < Descriptor::kWords; ++i) {
            difference |= line.descriptor[i].load(std::memory_order_relaxed) ^ descriptor.words[i];
        }
#endif
    }
    if (difference != 0) return fail_mismatch(comm, step, descriptor);
    if (!comm.greeted) return greet(comm);
    return COMMPLANE_CAR_OK;
}

// One whole hop: everybody is here, and everything that anybody did before is visible.
inline int hop(Comm& comm, const Descriptor& descriptor) {
    const uint64_t step = comm.next_step;
    publish(comm, step, descriptor);
    const int status = await(comm, step, descriptor);
    comm.next_step = step + 1;
    return status;
}

// The last hop of a call in which ranks read each other's own memory: all have read. A rank that gives up in it has published
// already, returns, and may use its memory for something else while a slow peer still reads; that peer must not take what it
// read for a result. The abort word is stored before the memory is used again, and here it is loaded after it was read.
inline int last_hop(Comm& comm, const Descriptor& descriptor) {
    if (const int status = hop(comm, descriptor)) return status;
    std::atomic_thread_fence(std::memory_order_acquire);
    if (any_aborted(comm)) [[unlikely]] return refuse_aborted(comm, descriptor);
    return COMMPLANE_CAR_OK;
}

}  // namespace commplane_car
