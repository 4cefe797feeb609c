// SPDX-License-Identifier: Apache-2.0
// What the kernels for CUDA do, run on threads of the host, when a rank is missing, calls something else, gives up, or has two
// kernels of one communicator at once: every wait ends, and the page of control says why. A hang is found by the deadline.
#include "gpu_calls.h"

namespace {

// In ns. Short: but ranks that are there must have come by then. Long: longer than the deadline of this test.
constexpr uint64_t kShort = 300000000, kBrief = 60000000, kLong = UINT64_C(3600000000000);
constexpr Kind kAll[] = {Kind::one_shot_push, Kind::two_shot_push,  Kind::one_shot_pull, Kind::two_shot_pull, Kind::all_gather,
                         Kind::broadcast,     Kind::reduce_scatter, Kind::barrier,       Kind::rms_norm};
typedef std::vector<std::vector<GpuGroup::Launch>> Streams;

Plan plan_of(Kind kind, uint64_t count, uint32_t seed) {
    Plan plan;
    plan.kind = kind;
    plan.count = count;
    plan.seed = seed;
    plan.rows = 2;
    plan.hidden = 16;
    return plan;
}

GpuOptions options_of(uint32_t ranks, uint64_t timeout_ns, uint32_t seed) {
    GpuOptions out;
    out.ranks = ranks;
    out.timeout_ns = timeout_ns;
    out.delays = 24;
    out.seed = seed;
    return out;
}

const car::gpu::ControlRank& of(GpuGroup& group, uint32_t rank) { return group.control().rank[rank]; }

// Whoever waited long enough says that this rank is missing, and no other; the rest has stopped. Nobody says anything else.
void check_absent(GpuGroup& group, uint32_t ranks, uint32_t absent) {
    uint32_t timed_out = 0;
    for (uint32_t r = 0; r < ranks; ++r) {
        if (r == absent) {
            CHECK(group.status(r) == kFine);
            continue;
        }
        CHECK(group.status(r) == car::gpu::kTimedOut || group.status(r) == car::gpu::kStopped);
        const bool first = group.met(r, car::gpu::kTimedOut);
        timed_out += first;
        for (uint32_t peer = 0; peer < ranks; ++peer) {
            CHECK(of(group, r).missing[peer] == (first && peer == absent ? 1u : 0u));
            CHECK(of(group, r).other[peer] == 0);
        }
        if (first) CHECK(of(group, r).number == 1);
    }
    CHECK(timed_out >= 1);
}

void a_rank_that_never_calls(uint32_t ranks, Kind kind, uint64_t count) {
    const GpuOptions options = options_of(ranks, kShort, ranks);
    GpuGroup group(options);
    const uint32_t absent = ranks - 2;
    GpuCall call(options, plan_of(kind, count, 1)), next(options, plan_of(kind, count, 2));
    Streams first(ranks), second(ranks);
    for (uint32_t r = 0; r < ranks; ++r) {
        if (r == absent) continue;
        call.launches(r, first[r]);
        next.launches(r, second[r]);
    }
    group.run(first);
    CHECK(group.control().stop != 0);
    check_absent(group, ranks, absent);
    for (uint32_t r = 0; r < ranks; ++r) {
        if (group.met(r, car::gpu::kTimedOut)) CHECK(memcmp(of(group, r).mine, first[r][0].words, sizeof of(group, r).mine) == 0);
    }
    // Whatever comes after it stops too, and nothing new is said of anybody.
    group.run(second);
    check_absent(group, ranks, absent);
}

// Rank 2 says its call and ends in front of its data, rank 0 comes late and waits for it, and rank 1, which has no part, waits for
// rank 0's sum: it is rank 2 that is missing, and nobody says that of rank 0.
void a_rank_whose_data_does_not_come_to_one_that_is_late() {
    const GpuOptions options = options_of(3, 1000000000, 1);
    GpuGroup group(options);
    GpuCall call(options, plan_of(Kind::two_shot_push, 4, 1));
    Streams streams(3);
    for (uint32_t r = 0; r < 3; ++r) call.launches(r, streams[r]);
    const GpuGroup::Kernel whole = streams[0][0].kernel;
    streams[0][0].kernel = [whole](const car::gpu::HostBlock& b, const car::gpu::Group& g) {
        const timespec half = {0, 500000000};
        nanosleep(&half, nullptr);
        whole(b, g);
    };
    streams[2][0].kernel = [](const car::gpu::HostBlock& b, const car::gpu::Group& g) {
        car::gpu::Session<car::gpu::HostBlock> s(g, b);
        s.begin();
        if (b.thread() >= b.threads()) return s.control(b.thread() - b.threads(), 0);
        b.heard();
    };
    group.run(streams);
    CHECK(group.status(0) == car::gpu::kTimedOut);
    CHECK(of(group, 0).missing[2] == 1 && of(group, 0).missing[1] == 0);
    CHECK(of(group, 1).missing[0] == 0 && of(group, 1).missing[2] == 0);
}

// The deadline of the device cannot end this wait: the host of the rank that is missing does.
void a_host_that_gives_up(uint32_t ranks, Kind kind) {
    const GpuOptions options = options_of(ranks, kLong, ranks);
    GpuGroup group(options);
    GpuCall call(options, plan_of(kind, 40, 1));
    Streams streams(ranks);
    for (uint32_t r = 0; r + 1 < ranks; ++r) call.launches(r, streams[r]);
    std::thread host([&] {
        const timespec moment = {0, 20000000};
        nanosleep(&moment, nullptr);
        group.abort(ranks - 1);
    });
    group.run(streams);
    host.join();
    for (uint32_t r = 0; r + 1 < ranks; ++r) CHECK(group.status(r) == car::gpu::kStopped);
    CHECK(group.status(ranks - 1) == kFine);
    CHECK(of(group, ranks - 1).gave_up == 1);
}

// `odd` makes another call than the others: nobody waits for the deadline, and who finds it knows the words of the other.
void another_call(uint32_t ranks, Kind kind, Kind other, uint64_t other_count) {
    const GpuOptions options = options_of(ranks, kLong, ranks + uint32_t(other));
    GpuGroup group(options);
    const uint32_t odd = 1;
    GpuCall call(options, plan_of(kind, 40, 1)), another(options, plan_of(other, other_count, 1));
    Streams streams(ranks);
    for (uint32_t r = 0; r < ranks; ++r) (r == odd ? another : call).launches(r, streams[r]);
    group.run(streams);
    CHECK(group.control().stop != 0);
    uint32_t found = 0;
    for (uint32_t r = 0; r < ranks; ++r) {
        CHECK(group.status(r) == car::gpu::kOtherCall || group.status(r) == car::gpu::kStopped);
        if (group.status(r) != car::gpu::kOtherCall) continue;
        ++found;
        const car::gpu::ControlRank& mine = of(group, r);
        CHECK(memcmp(mine.mine, streams[r][0].words, sizeof mine.mine) == 0);
        uint32_t others = 0;
        for (uint32_t peer = 0; peer < ranks; ++peer) {
            if (mine.other[peer] == 0) continue;
            ++others;
            CHECK((peer == odd) != (r == odd));
            CHECK(memcmp(mine.theirs[peer], streams[peer][0].words, sizeof mine.mine) == 0);
        }
        CHECK(others >= 1);
    }
    CHECK(found >= 1);
}

// A rank that makes one call more than its peers did is found where they next meet, by the number of the call.
void a_call_too_many(uint32_t ranks, Kind kind) {
    const GpuOptions options = options_of(ranks, kLong, ranks);
    GpuGroup group(options);
    GpuCall call(options, plan_of(kind, 40, 1)), next(options, plan_of(Kind::barrier, 0, 2));
    Streams streams(ranks);
    for (uint32_t r = 0; r < ranks; ++r) {
        call.launches(r, streams[r]);
        if (r == 0) call.launches(r, streams[r]);
        next.launches(r, streams[r]);
    }
    group.run(streams);
    bool found = false;
    for (uint32_t r = 0; r < ranks; ++r) found |= group.status(r) == car::gpu::kOtherCall;
    CHECK(found);
}

// Rank 0 runs its two calls on two streams at once, the others one after the other: either that is found, or it went well.
uint32_t two_at_once(uint32_t ranks, Kind kind, uint32_t seed) {
    const GpuOptions options = options_of(ranks, kBrief, seed);
    GpuGroup group(options);
    GpuCall call(options, plan_of(kind, 40, 1));
    GpuCall again(options, plan_of(kind, 40, 1));
    std::vector<uint32_t> owners = {0, 0};
    Streams streams(2);
    call.launches(0, streams[0]);
    again.launches(0, streams[1]);
    for (uint32_t r = 1; r < ranks; ++r) {
        owners.push_back(r);
        streams.emplace_back();
        call.launches(r, streams.back());
        again.launches(r, streams.back());
    }
    group.run(owners, streams);
    if (group.control().stop == 0) {
        // The two of rank 0 may have met the peers' calls in either order: the inputs are the same in both.
        call.check("two at once");
        again.check("two at once");
        return 0;
    }
    bool found = false;
    for (uint32_t r = 0; r < ranks; ++r) found |= group.status(r) != kFine;
    CHECK(found);
    return group.status(0) == car::gpu::kTwoAtOnce ? 1 : 0;
}

}  // namespace

int main() {
    deadline(300);
    for (const uint32_t ranks : {2u, 3u, 5u}) {
        for (const Kind kind : kAll) {
            if (ranks == 3 || kind == Kind::one_shot_push || kind == Kind::two_shot_push) a_rank_that_never_calls(ranks, kind, 40);
            a_host_that_gives_up(ranks, kind);
            a_call_too_many(ranks, kind);
            if (kind != Kind::barrier) another_call(ranks, kind, Kind::barrier, 0);
            if (kind != Kind::two_shot_push) another_call(ranks, kind, Kind::two_shot_push, 40);
            if (kind != Kind::barrier && kind != Kind::rms_norm) another_call(ranks, kind, kind, 36);
        }
        a_rank_that_never_calls(ranks, Kind::one_shot_push, 500);  // several kernels, queued
        a_rank_that_never_calls(ranks, Kind::two_shot_push, 500);
        a_rank_that_never_calls(ranks, Kind::two_shot_push, 4);  // one part: who has none waits for what its rank waits for
    }
    a_rank_whose_data_does_not_come_to_one_that_is_late();
    uint32_t found = 0, runs = 0;
    for (uint32_t seed = 1; seed <= 20; ++seed) {
        for (const Kind kind : {Kind::one_shot_push, Kind::two_shot_push, Kind::all_gather}) {
            found += two_at_once(2 + seed % 2, kind, seed);
            ++runs;
        }
    }
    CHECK(found > 0);
    printf("two at once: rank 0 said so %u times of %u\n", found, runs);
    return report("gpu_faults");
}
