// SPDX-License-Identifier: Apache-2.0
// A rank that does not come, gives up or is interrupted is named on every rank, the wait for it is bounded, and the communicator
// stays poisoned.
#include <pthread.h>
#include <string.h>

#include "detail.h"
#include "solve.h"

namespace {

constexpr int kSum = COMMPLANE_CAR_SUM;
constexpr uint64_t kLong = UINT64_C(600000000000);
constexpr uint64_t kShort = UINT64_C(1000000000);  // enough for ranks that come at once to meet, also on a loaded machine
constexpr uint64_t kArena = 512 << 10;

void nap(int milliseconds) { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); }

// The interrupt check runs in a thread that has waited for peers for a while, so it also tells who waits.
thread_local uint32_t own_rank = 0;
thread_local bool wants_to_stop = false;
std::atomic<uint64_t> waiting{0};  // bit r: rank r has waited

int note_wait() {
    waiting |= UINT64_C(1) << own_rank;
    return wants_to_stop && (waiting & 1) != 0 ? 1 : 0;  // rank 0 waits, too: so only the late rank is missing
}

bool waits(uint32_t rank) { return (waiting >> rank & 1) != 0; }

// One problem of every kind, small or of many hops.
std::vector<Problem> every_kind(uint32_t world, bool small) {
    const uint64_t count = small ? 10 : 12000;
    return {reduction_problem(kAllReduce, kFloat32, kSum, count, world, 1), barrier_problem(world),
            gather_problem(kFloat32, count / 2, world, 2), reduction_problem(kReduceScatter, kFloat16, kSum, count, world, 3),
            broadcast_problem(kFloat32, count, 0, world, 4), norm_problem(kBfloat16, count / 10, 10, 1e-6f, 0.0f, world, 5)};
}

// Rank 1 never comes. Rank 2 expires and tells rank 0, which waits already and names rank 1 just as well.
void missing_rank() {
    commplane_car_set_interrupt_check(note_wait);
    for (const bool small : {true, false}) {
        for (const Problem& problem : every_kind(3, small)) {
            GroupOptions options;
            options.world = 3;
            options.timeout_ns = kLong;
            options.symmetric = kArena;
            std::atomic<int> returned{0};
            run_group(options, [&](Rank& self) {
                own_rank = self.rank;
                Solver solver(self, kArena);
                CHECK_STATUS(commplane_car_barrier(self.comm), 0);
                if (self.rank == 0) waiting = 0;
                CHECK_STATUS(commplane_car_barrier(self.comm), 0);
                while (self.rank == 1 && returned != 2) nap(2);
                while (self.rank == 2 && !waits(0)) nap(2);
                if (self.rank == 2) CHECK_STATUS(commplane_car_set_timeout(self.comm, 50000000), 0);
                const int status = solver.make_call(problem, {});
                CHECK_STATUS(status, self.rank == 2 ? COMMPLANE_CAR_ETIMEDOUT : COMMPLANE_CAR_EABORTED);
                const char* const wanted = self.rank == 2 ? "#3: rank 1 did not arrive within 0.050 s" : "#3: aborted by rank 2";
                CHECK(strstr(commplane_car_last_error(), wanted) != nullptr);
                CHECK(strstr(commplane_car_last_error(), name_of(problem.kind)) == commplane_car_last_error());
                const commplane_car_detail detail = detail_of(self);
                CHECK(detail.status == status);
                CHECK(detail.sequence == 3);
                CHECK(detail.missing_mask == (self.rank == 1 ? 0u : 2u));  // the late rank waits for nobody
                CHECK(detail.abort_mask == 4);
                CHECK(detail.mismatch_mask == 0 && detail.dead_mask == 0);
                CHECK(detail.mine.kind == static_cast<uint32_t>(problem.kind) && detail.mine.count == problem.count);
                check_poisoned(self);
                ++returned;
            });
        }
    }
    commplane_car_set_interrupt_check(nullptr);
}

// The last one to time out may be told by any other: whoever it is, all name the rank that never came, and it alone.
void all_name_the_missing() {
    for (const uint32_t world : {2u, 4u, 6u}) {
        GroupOptions options;
        options.world = world;
        options.timeout_ns = kShort;
        std::atomic<uint32_t> returned{0};
        run_group(options, [&](Rank& self) {
            CHECK_STATUS(commplane_car_barrier(self.comm), 0);
            const uint32_t absent = world - 1;
            while (self.rank == absent && returned != world - 1) nap(5);
            const auto begin = std::chrono::steady_clock::now();
            const int status = commplane_car_barrier(self.comm);
            if (self.rank == absent) {
                CHECK_STATUS(status, COMMPLANE_CAR_EABORTED);
                return;
            }
            CHECK(status == COMMPLANE_CAR_ETIMEDOUT || status == COMMPLANE_CAR_EABORTED);
            if (status == COMMPLANE_CAR_ETIMEDOUT) CHECK(seconds_since(begin) >= 1e-9 * kShort);  // a lower bound is no race
            CHECK(detail_of(self).missing_mask == UINT64_C(1) << absent);
            ++returned;
        });
    }
}

// Ranks that come one after the other do not renew the deadline of one that waits for them. Rank 1 comes within it, rank 2 only
// when rank 0 has given up (or would have, had rank 1 renewed its deadline), rank 3 last: rank 0 names those that were not there.
void one_deadline_for_all_peers() {
    for (const Problem& problem : every_kind(4, true)) {
        GroupOptions options;
        options.world = 4;
        options.timeout_ns = kShort;
        std::atomic<int> returned{0};
        run_group(options, [&](Rank& self) {
            Solver solver(self, kArena);
            CHECK_STATUS(commplane_car_barrier(self.comm), 0);
            const auto begin = std::chrono::steady_clock::now();
            if (self.rank == 1) nap(kShort / 1000000 * 3 / 4);
            while (self.rank == 2 && returned == 0 && seconds_since(begin) < 1.5e-9 * kShort) nap(2);
            while (self.rank == 3 && returned < 3) nap(2);
            const int status = solver.make_call(problem, {});
            const uint64_t missing = detail_of(self).missing_mask;
            CHECK_STATUS(status, self.rank == 0 ? COMMPLANE_CAR_ETIMEDOUT : COMMPLANE_CAR_EABORTED);
            CHECK(missing == (UINT64_C(12) & ~(UINT64_C(1) << self.rank)));  // the same on all, but for the rank itself
            check_poisoned(self);
            ++returned;
        });
    }
}

void set_timeout() {
    run_group({}, [&](Rank& self) {
        CHECK_STATUS(commplane_car_set_timeout(self.comm, 0), COMMPLANE_CAR_EINVAL);
        CHECK_STATUS(commplane_car_set_timeout(self.comm, 50000000), 0);
        if (self.rank == 1) return;
        CHECK_STATUS(commplane_car_barrier(self.comm), COMMPLANE_CAR_ETIMEDOUT);
        CHECK(detail_of(self).missing_mask == 2);
    });
}

void aborts() {
    GroupOptions options;
    options.world = 3;
    options.timeout_ns = kLong;
    run_group(options, [&](Rank& self) {  // somebody waits
        if (self.rank == 2) {
            nap(50);
            CHECK_STATUS(commplane_car_abort(self.comm), 0);
        }
        CHECK_STATUS(commplane_car_barrier(self.comm), COMMPLANE_CAR_EABORTED);
        CHECK(detail_of(self).abort_mask == 4);
        CHECK(detail_of(self).missing_mask == (self.rank == 2 ? 0u : 4u));
        check_poisoned(self);
    });
    std::atomic<bool> aborted{false};
    run_group(options, [&](Rank& self) {  // from another thread of the waiting rank
        if (self.rank == 0) {
            std::thread watchdog([&] {
                nap(50);
                CHECK_STATUS(commplane_car_abort(self.comm), 0);
            });
            CHECK_STATUS(commplane_car_barrier(self.comm), COMMPLANE_CAR_EABORTED);
            watchdog.join();
            aborted = true;
        } else {
            while (!aborted) nap(5);
            CHECK_STATUS(commplane_car_barrier(self.comm), COMMPLANE_CAR_EABORTED);
        }
        CHECK(detail_of(self).abort_mask == 1);
        CHECK(detail_of(self).missing_mask == (self.rank == 0 ? 0u : 1u));  // nobody's absence but its own
    });
}

// Somewhere between the first and the last hop of a call. Each rank may have one call more behind it than another.
void abort_in_the_middle() {
    for (const bool symmetric : {false, true}) {
        for (const Problem& problem : every_kind(3, false)) {
            GroupOptions options;
            options.world = 3;
            options.timeout_ns = kLong;
            options.symmetric = kArena;
            options.chunk = 256;
            std::atomic<uint32_t> calls{0};
            run_group(options, [&](Rank& self) {
                Solver solver(self, kArena);
                Way way;
                way.symmetric = symmetric;
                std::thread watchdog;
                if (self.rank == 1) {
                    watchdog = std::thread([&] {
                        while (calls < 10) std::this_thread::yield();
                        std::this_thread::sleep_for(std::chrono::microseconds(Random{problem.count}.below(2000)));
                        CHECK_STATUS(commplane_car_abort(self.comm), 0);
                    });
                }
                int status = 0;
                while ((status = solver.make_call(problem, way)) == 0) ++calls;
                CHECK_STATUS(status, COMMPLANE_CAR_EABORTED);
                CHECK(detail_of(self).abort_mask == 2);
                CHECK(detail_of(self).missing_mask == (self.rank == 1 ? 0u : 2u));
                if (watchdog.joinable()) watchdog.join();
                check_poisoned(self);
            });
        }
    }
}

std::atomic<bool> hold{false};
std::atomic<bool> held{false};

// A rank stops in the middle of a call, as a process does on SIGSTOP: its thread sits in a signal handler.
void timeout_in_the_middle() {
    struct sigaction action = {};
    action.sa_handler = [](int) {
        held = true;
        const timespec tick = {0, 1000000};
        while (hold) nanosleep(&tick, nullptr);
    };
    sigaction(SIGUSR1, &action, nullptr);
    for (const Problem& problem : every_kind(3, false)) {
        GroupOptions options;
        options.world = 3;
        options.timeout_ns = kShort;
        options.chunk = 256;
        std::atomic<uint32_t> calls{0}, returned{0};
        hold = true;
        held = false;
        run_group(options, [&](Rank& self) {
            Solver solver(self, kArena);
            std::thread stopper;
            if (self.rank == 1) {
                stopper = std::thread([&, target = pthread_self()] {
                    while (calls < 10) std::this_thread::yield();
                    pthread_kill(target, SIGUSR1);
                    while (returned != 2) nap(2);
                    hold = false;
                });
            }
            int status = 0;
            while ((status = solver.make_call(problem, {})) == 0) ++calls;
            const commplane_car_detail detail = detail_of(self);
            if (self.rank == 1) {
                CHECK_STATUS(status, COMMPLANE_CAR_EABORTED);
                CHECK(held);
                stopper.join();
            } else {
                CHECK(status == COMMPLANE_CAR_ETIMEDOUT || status == COMMPLANE_CAR_EABORTED);
                CHECK(detail.missing_mask == 2);
                ++returned;
            }
            check_poisoned(self);
        });
    }
    signal(SIGUSR1, SIG_DFL);
}

// Ctrl-C on rank 1, which waits for rank 2: rank 0 and the late rank 2 learn that it is rank 1 that will not come.
void interrupted_rank() {
    commplane_car_set_interrupt_check(note_wait);
    for (const bool small : {true, false}) {
        for (const Problem& problem : every_kind(3, small)) {
            GroupOptions options;
            options.world = 3;
            options.timeout_ns = kLong;
            std::atomic<int> returned{0};
            run_group(options, [&](Rank& self) {
                own_rank = self.rank;
                Solver solver(self, kArena);
                CHECK_STATUS(commplane_car_barrier(self.comm), 0);
                if (self.rank == 0) waiting = 0;
                CHECK_STATUS(commplane_car_barrier(self.comm), 0);
                wants_to_stop = self.rank == 1;
                while (self.rank == 2 && returned != 2) nap(2);
                CHECK_STATUS(solver.make_call(problem, {}), self.rank == 1 ? COMMPLANE_CAR_EINTERRUPTED : COMMPLANE_CAR_EABORTED);
                const commplane_car_detail detail = detail_of(self);
                CHECK(detail.abort_mask == 2);
                CHECK(detail.missing_mask == (self.rank == 1 ? 4u : 2u));
                if (self.rank == 1) CHECK(strstr(commplane_car_last_error(), "interrupted while it waited for rank 2") != nullptr);
                check_poisoned(self);
                ++returned;
            });
        }
    }
    commplane_car_set_interrupt_check(nullptr);
    waiting = 1;
    run_group({}, [](Rank& self) {  // taken back: nobody asks, however long the wait
        wants_to_stop = true;
        if (self.rank == 1) nap(100);
        CHECK_STATUS(commplane_car_barrier(self.comm), 0);
    });
}

std::atomic<bool> peer_may_come{false};
std::atomic<bool> peer_came{false};

// A check that says "stop" has been told something, for once: that counts, also if the peer comes at that very moment.
void interrupt_at_the_last_moment() {
    commplane_car_set_interrupt_check([] {
        if (!wants_to_stop) return 0;
        wants_to_stop = false;
        peer_may_come = true;
        while (!peer_came) nap(1);
        return 1;
    });
    GroupOptions options;
    options.timeout_ns = kLong;
    run_group(options, [](Rank& self) {
        CHECK_STATUS(commplane_car_barrier(self.comm), 0);
        if (self.rank == 0) {
            wants_to_stop = true;
            CHECK_STATUS(commplane_car_barrier(self.comm), COMMPLANE_CAR_EINTERRUPTED);
            CHECK(detail_of(self).abort_mask == 1);
        } else {
            while (!peer_may_come) nap(1);
            CHECK_STATUS(commplane_car_barrier(self.comm), 0);  // rank 0 was there
            peer_came = true;
            CHECK_STATUS(commplane_car_barrier(self.comm), COMMPLANE_CAR_EABORTED);
            CHECK(detail_of(self).missing_mask == 1);
        }
        check_poisoned(self);
    });
    commplane_car_set_interrupt_check(nullptr);
}

// While one thread waits in a call, every other call of another thread is refused and harms nothing; abort is not refused.
void second_thread() {
    GroupOptions options;
    options.timeout_ns = kLong;
    commplane_car_set_interrupt_check(note_wait);
    std::atomic<bool> refused{false};
    waiting = 0;
    run_group(options, [&](Rank& self) {
        if (self.rank == 1) {
            while (!refused) nap(1);
            CHECK_STATUS(commplane_car_barrier(self.comm), 0);
            CHECK_STATUS(commplane_car_barrier(self.comm), COMMPLANE_CAR_EABORTED);
            return;
        }
        std::thread waiting([&] { CHECK_STATUS(commplane_car_barrier(self.comm), 0); });
        while (!waits(0)) nap(1);
        float data[8] = {}, more[8] = {}, norm[8], sum[8];
        constexpr int kBusy = COMMPLANE_CAR_EBUSY;
        CHECK_STATUS(commplane_car_barrier(self.comm), kBusy);
        CHECK_STATUS(commplane_car_all_reduce(self.comm, data, data, 8, kFloat32, kSum), kBusy);
        CHECK_STATUS(commplane_car_all_gather(self.comm, data, more, 4, kFloat32), kBusy);
        CHECK_STATUS(commplane_car_reduce_scatter(self.comm, data, more, 4, kFloat32, kSum), kBusy);
        CHECK_STATUS(commplane_car_broadcast(self.comm, data, 8, kFloat32, 0), kBusy);
        CHECK_STATUS(commplane_car_all_reduce_rms_norm(self.comm, data, more, more, norm, sum, 1, 8, kFloat32, 1e-6f, 0.0f), kBusy);
        CHECK_STATUS(commplane_car_register_symmetric(self.comm, data, 16, 16, 1), kBusy);
        CHECK_STATUS(commplane_car_unregister_symmetric(self.comm, 1), kBusy);
        CHECK_STATUS(commplane_car_single_copy_enable(self.comm, 0, 0), kBusy);
        CHECK_STATUS(commplane_car_comm_close(self.comm), kBusy);
        refused = true;
        waiting.join();
        CHECK(detail_of(self).status == 0);
        CHECK(detail_of(self).sequence == 1);
        CHECK_STATUS(commplane_car_abort(self.comm), 0);
    });
    commplane_car_set_interrupt_check(nullptr);
}

}  // namespace

int main() {
    deadline(590);
    missing_rank();
    all_name_the_missing();
    one_deadline_for_all_peers();
    set_timeout();
    aborts();
    abort_in_the_middle();
    timeout_in_the_middle();
    interrupted_rank();
    interrupt_at_the_last_moment();
    second_thread();
    return report("failures");
}
