// SPDX-License-Identifier: Apache-2.0
// kill -9 and SIGSTOP of a rank, before, during and after collectives of every kind: the others learn in time who is gone. All
// deadlines of the communicators but those of the SIGSTOP tests are far longer than the test may take.
#include "detail.h"
#include "processes.h"
#include "solve.h"

namespace {

constexpr int kSum = COMMPLANE_CAR_SUM;
constexpr uint64_t kLong = UINT64_C(600000000000);
constexpr uint64_t kShort = UINT64_C(1000000000);
constexpr uint64_t kArena = 4 << 20;

enum class When { kBefore, kDuring, kAfter };
enum class Path { kStaged, kSymmetric, kSymmetricInPlace, kSingleCopy };

Problem problem_of(int kind, uint32_t world) {
    const uint64_t count = 40000;
    switch (kind) {
        case kAllReduce: return reduction_problem(kind, kFloat32, kSum, count, world, 1);
        case kReduceScatter: return reduction_problem(kind, kBfloat16, kSum, count, world, 2);
        case kAllGather: return gather_problem(COMMPLANE_CAR_INT8, count, world, 3);
        case kBroadcast: return broadcast_problem(kFloat32, count, 0, world, 4);
        case kRmsNorm: return norm_problem(kFloat32, 40, 1000, 1e-6f, 0.0f, world, 5);
        default: return barrier_problem(world);
    }
}

Way way_of(Path path) {
    Way way;
    way.symmetric = path == Path::kSymmetric || path == Path::kSymmetricInPlace;
    way.in_place = path == Path::kSymmetricInPlace;
    return way;
}

GroupOptions group_of(uint32_t world, uint64_t timeout_ns) {
    GroupOptions options;
    options.world = world;
    options.timeout_ns = timeout_ns;
    options.symmetric = kArena;
    return options;
}

// Waits here for what the parent does to this process.
void idle(const Rank& self, Board& board) {
    board.idle[self.rank] = true;
    for (;;) short_nap();
}

// Calls until one fails. Every call that did not fail has the right result.
int call_until_failure(Rank& self, Board& board, Solver& solver, const Problem& problem, const Way& way) {
    for (;;) {
        if (const int status = solver.make_call(problem, way)) return status;
        if (!solver.check(problem, way)) return 0;
        ++board.calls[self.rank];
    }
}

void check_survivor(const Rank& self, int status, uint64_t victims) {
    CHECK(status == COMMPLANE_CAR_EPEERDEAD || status == COMMPLANE_CAR_EABORTED);
    const commplane_car_detail detail = detail_of(self);
    CHECK(detail.status == status);
    CHECK(detail.missing_mask != 0 && (detail.missing_mask & ~victims) == 0);
    CHECK(detail.dead_mask == detail.missing_mask);
    CHECK((detail.abort_mask & victims) == 0);
    if (status == COMMPLANE_CAR_EPEERDEAD) {
        CHECK((detail.abort_mask >> self.rank & 1) != 0);  // so the others are told
        CHECK(strstr(commplane_car_last_error(), " has ended") != nullptr);
    }
    check_poisoned(self);
}

// False if the ranks may not read each other's memory here.
bool enable_single_copy(Rank& self, Board& board) {
    if (commplane_car_single_copy_probe(self.comm) != 0) ++board.refused;
    CHECK_STATUS(commplane_car_barrier(self.comm), 0);
    if (board.refused != 0) return false;
    CHECK_STATUS(commplane_car_single_copy_enable(self.comm, 1, UINT64_MAX), 0);
    return true;
}

bool single_copy_works = true;

// kill -9 of all ranks in `victims` at once.
void kill_ranks(int kind, Path path, When when, uint32_t world, uint64_t victims, Random& random) {
    const Problem problem = problem_of(kind, world);
    Processes processes(group_of(world, kLong), [&](Rank& self, Board& board) {
        Solver solver(self, kArena);
        const bool victim = (victims >> self.rank & 1) != 0;
        if (path == Path::kSingleCopy && !enable_single_copy(self, board)) {
            if (victim) idle(self, board);
            return;
        }
        if (victim && when == When::kBefore) idle(self, board);
        if (victim && when == When::kAfter) {
            for (int call = 0; call < 3; ++call) solver.solve(problem, way_of(path));
            idle(self, board);
        }
        const int status = call_until_failure(self, board, solver, problem, way_of(path));
        CHECK(!victim || when == When::kDuring);
        if (!victim) check_survivor(self, status, victims);
    });
    const auto every_victim = [&](const std::function<bool(uint32_t)>& is) {
        for (uint32_t rank = 0; rank < world; ++rank) {
            if ((victims >> rank & 1) != 0 && !is(rank)) return false;
        }
        return true;
    };
    Board& board = processes.board();
    wait_until([&] { return every_victim([&](uint32_t r) { return board.idle[r] || (when == When::kDuring && board.calls[r] >= 3); }); });
    if (when == When::kDuring) std::this_thread::sleep_for(std::chrono::microseconds(random.below(3000)));
    processes.murder(victims, random.one_in(2));
    if (board.refused != 0) single_copy_works = false;
}

void kills(Random& random) {
    for (const int kind : {kAllReduce, kBarrier, kAllGather, kReduceScatter, kBroadcast, kRmsNorm}) {
        for (const Path path : {Path::kStaged, Path::kSymmetric, Path::kSymmetricInPlace, Path::kSingleCopy}) {
            if (kind == kBarrier && path != Path::kStaged) continue;
            if (kind != kAllReduce && path > Path::kSymmetric) continue;
            for (const When when : {When::kBefore, When::kDuring, When::kAfter}) {
                for (const uint32_t world : {2u, 3u}) {
                    const int before = failures;
                    kill_ranks(kind, path, when, world, UINT64_C(1) << random.below(world), random);
                    if (failures == before) continue;
                    fprintf(stderr, "that was %s on path %d, killed at %d, world %u\n", name_of(kind), static_cast<int>(path),
                            static_cast<int>(when), world);
                }
            }
        }
    }
    for (const When when : {When::kBefore, When::kDuring, When::kAfter}) kill_ranks(kAllReduce, Path::kStaged, when, 4, 10, random);
}

// A stopped process has not ended: the others wait for it up to their deadline. When it goes on it learns that they gave up.
void stop(int kind, Path path, uint32_t world, Random& random) {
    const Problem problem = problem_of(kind, world);
    const auto victim = static_cast<uint32_t>(random.below(world));
    Processes processes(group_of(world, kShort), [&](Rank& self, Board& board) {
        Solver solver(self, kArena);
        const int status = call_until_failure(self, board, solver, problem, way_of(path));
        ++board.finished;
        const commplane_car_detail detail = detail_of(self);
        CHECK(detail.dead_mask == 0);
        if (self.rank == victim) {
            CHECK_STATUS(status, COMMPLANE_CAR_EABORTED);
        } else {
            CHECK(status == COMMPLANE_CAR_ETIMEDOUT || status == COMMPLANE_CAR_EABORTED);
            CHECK(detail.missing_mask == UINT64_C(1) << victim);
        }
        check_poisoned(self);
        wait_until([&] { return board.finished == world; });  // an ended process is another matter than one that gave up
    });
    Board& board = processes.board();
    wait_until([&] { return board.calls[victim] >= 3; });
    std::this_thread::sleep_for(std::chrono::microseconds(random.below(3000)));
    processes.send(victim, SIGSTOP);
    wait_until([&] { return board.finished == world - 1; });
    processes.send(victim, SIGCONT);
}

// A rank that was stopped in the middle of a call may find, when it goes on, that the others gave up long ago and use their
// memory for something else. Then its call fails: it never succeeds with something else than the sum.
void stop_while_reading(int kind, Path path, Random& random) {
    constexpr uint64_t kBig = 16 << 20;
    const uint32_t world = 2, victim = 1;
    const uint64_t count = kind == kAllGather || kind == kReduceScatter ? 500000 : 1000000;
    const Problem problem = kind == kAllGather ? gather_problem(kFloat32, count, world, 7)
                            : kind == kBroadcast ? broadcast_problem(kFloat32, count, 0, world, 7)
                            : kind == kRmsNorm ? norm_problem(kFloat32, count / 4000, 4000, 1e-6f, 0.0f, world, 7)
                                               : reduction_problem(kind, kFloat32, kSum, count, world, 7);
    GroupOptions options = group_of(world, 100000000);
    options.symmetric = kBig;
    for (int attempt = 0; attempt < 8; ++attempt) {
        Processes processes(options, [&](Rank& self, Board& board) {
            CHECK_STATUS(commplane_car_set_timeout(self.comm, kLong), 0);
            Solver solver(self, kBig);
            if (path == Path::kSingleCopy && !enable_single_copy(self, board)) {
                ++board.calls[self.rank];
                ++board.finished;
                return;
            }
            CHECK_STATUS(commplane_car_barrier(self.comm), 0);
            if (self.rank != victim) CHECK_STATUS(commplane_car_set_timeout(self.comm, 50000000), 0);
            const int status = call_until_failure(self, board, solver, problem, way_of(path));
            CHECK(status != 0);
            if (self.rank != victim) {
                solver.scribble();
                board.told = true;
            }
            ++board.finished;
            wait_until([&] { return board.finished == world; });
        });
        Board& board = processes.board();
        wait_until([&] { return board.calls[victim] >= 1 || board.finished != 0; });
        std::this_thread::sleep_for(std::chrono::microseconds(random.below(4000)));
        processes.send(victim, SIGSTOP);
        wait_until([&] { return board.told || board.refused != 0 || board.finished != 0; });
        processes.send(victim, SIGCONT);
    }
}

}  // namespace

int main() {
    deadline(590);
    Random random{static_cast<uint64_t>(getpid())};
    kills(random);
    for (const int kind : {kAllReduce, kBarrier, kRmsNorm}) stop(kind, Path::kStaged, 3, random);
    stop(kAllReduce, Path::kSymmetricInPlace, 3, random);
    stop(kBroadcast, Path::kSymmetric, 2, random);
    for (const int kind : {kAllReduce, kAllGather, kReduceScatter, kBroadcast, kRmsNorm}) stop_while_reading(kind, Path::kSymmetric, random);
    stop_while_reading(kAllReduce, Path::kSingleCopy, random);
    CHECK(names_left() == 0);
    if (!single_copy_works) printf("this process may not read its children's memory: single copy was not tested\n");
    return report("processes");
}
