// SPDX-License-Identifier: Apache-2.0
// Random sequences of all collectives: dtypes, ops, counts, offsets, alignments, roots, in place or not, staged, symmetric or single
// copy, in groups of any size with slots of any size, on ranks that dawdle. No barrier but those of the sequence. Every result is
// compared with the oracle, bit for bit, and the oracle's sums with float64.
//
// CAR_TEST_SEED repeats a run (but for the timing of threads), CAR_TEST_CALLS sets how many calls a rank makes in all.
#include <random>

#include "solve.h"
#include "tuning.h"

namespace {

constexpr uint64_t kProblems = 24;       // of a group
constexpr uint64_t kCallsOfGroup = 400;  // each problem is solved in many ways
constexpr uint64_t kArena = 1 << 20;
constexpr uint64_t kMostBytes = 80 << 10;  // of a message; two-shot begins below it for any number of ranks
static_assert(commplane_car::two_shot_from(3, 4, true, false) < kMostBytes && commplane_car::two_shot_from(8, 4, true, false) < kMostBytes);

// Like real messages: most are small, some are long.
uint64_t random_bytes(Random& random, uint64_t chunk) {
    const uint64_t most = std::min(kMostBytes, 256 * chunk);  // a call of very many hops would leave no time for others
    switch (random.below(10)) {
        case 0: return random.below(9);
        case 1: return chunk - 8 + random.below(17);
        case 2: return commplane_car::kTinyBytes - 8 + random.below(17);
        case 3:
        case 4: return random.below(most) + 1;
        default: return random.below(600);
    }
}

Problem random_problem(Random& random, uint32_t world, uint64_t chunk) {
    const int kinds[] = {kAllReduce, kAllReduce, kAllReduce, kAllGather, kReduceScatter, kBroadcast, kRmsNorm, kBarrier};
    const int kind = kinds[random.below(8)];
    int dtype = kDtypes[random.below(kind == kRmsNorm ? 3 : 8)];
    const int op = static_cast<int>(1 + random.below(is_integer(dtype) ? 3 : 4));
    const uint64_t seed = random.next(), width = element_bytes(dtype), count = random_bytes(random, chunk) / width;
    switch (kind) {
        case kBarrier: return barrier_problem(world);
        case kAllReduce: return reduction_problem(kind, dtype, op, count, world, seed);
        case kReduceScatter: return reduction_problem(kind, dtype, op, count / world, world, seed);
        case kAllGather: return gather_problem(dtype, count / world, world, seed);
        case kBroadcast: return broadcast_problem(dtype, count, static_cast<uint32_t>(random.below(world)), world, seed);
        default: break;
    }
    const uint64_t rows = 1 + random.below(6), hidden = std::max<uint64_t>(1, count / rows);
    return norm_problem(dtype, rows, hidden, random.one_in(2) ? 1e-6f : 1e-5f, random.one_in(2) ? 1.0f : 0.0f, world, seed);
}

Way random_way(Random& random) {
    const uint64_t bits = random.next();
    Way way;
    way.symmetric = (bits & 1) != 0;
    way.in_place = (bits & 2) != 0;
    way.residual_in_place = (bits & 4) != 0;
    way.out_in_region = (bits & 24) == 0;
    way.shift = (bits >> 8 & 1) != 0 ? 0 : bits >> 16 & 63;
    way.out_shift = (bits >> 9 & 1) != 0 ? 0 : bits >> 24 & 63;
    return way;
}

// What all ranks of a group do alike comes from `common`, and what a rank does by itself from its own numbers.
void play(Rank& self, const std::vector<Problem>& problems, uint64_t seed, uint64_t calls, bool single_copy) {
    Random common{seed}, own{seed + 1 + self.rank};
    Solver solver(self, kArena);
    if (single_copy) {
        CHECK_STATUS(commplane_car_barrier(self.comm), 0);  // all have opened
        if (commplane_car_single_copy_probe(self.comm) == 0) {
            CHECK_STATUS(commplane_car_single_copy_enable(self.comm, 3000, kMostBytes / 2), 0);
        }
    }
    const uint64_t dawdle = own.one_in(2) ? 16 : 256;  // one rank in two is a slow one
    for (uint64_t call = 0; call < calls; ++call) {
        const Problem& problem = problems[common.below(problems.size())];
        const Way way = random_way(common);
        if (own.one_in(dawdle)) std::this_thread::sleep_for(std::chrono::microseconds(own.below(300)));
        if (!solver.solve(problem, way)) return;
    }
}

void group(Random& random, uint64_t calls, const std::vector<std::string>& sets) {
    constexpr uint64_t kChunks[] = {128, 192, 320, 1024, 4096, 16384, 65536};
    GroupOptions options;
    options.world = static_cast<uint32_t>(2 + random.below(7));
    options.chunk = kChunks[random.below(7)];
    options.staging = 4 * options.chunk + random.below(4096);
    options.symmetric = kArena;
    const uint32_t yields = random.one_in(3) ? 1 : 0;
    options.adjust = [&](commplane_car_options& own) { own.oversubscribed |= yields; };
    const std::string isa = sets[random.below(sets.size())];
    CHECK_STATUS(commplane_car_set_isa(isa.c_str()), 0);
    std::vector<Problem> problems;
    while (problems.size() < kProblems) problems.push_back(random_problem(random, options.world, options.chunk));
    const uint64_t seed = random.next();
    const bool single_copy = random.one_in(3);
    const int before = failures;
    run_group(options, [&](Rank& self) { play(self, problems, seed, calls, single_copy); });
    if (failures != before) {
        fprintf(stderr, "world %u chunk %llu staging %llu isa %s\n", options.world, static_cast<unsigned long long>(options.chunk),
                static_cast<unsigned long long>(options.staging), isa.c_str());
    }
}

}  // namespace

int main() {
    deadline(590);
    const char* given = getenv("CAR_TEST_SEED");
    const uint64_t seed = given != nullptr ? strtoull(given, nullptr, 0) : uint64_t{std::random_device{}()};
    const char* wanted = getenv("CAR_TEST_CALLS");
    uint64_t calls = wanted != nullptr ? strtoull(wanted, nullptr, 0) : 20000;
    printf("CAR_TEST_SEED=%llu\n", static_cast<unsigned long long>(seed));
    fflush(stdout);  // before anything can go wrong
    Random random{seed};
    const std::vector<std::string> sets = instruction_sets();
    while (calls != 0 && failures == 0) {
        const uint64_t now = std::min(calls, kCallsOfGroup);
        group(random, now, sets);
        calls -= now;
    }
    return report("fuzz");
}
