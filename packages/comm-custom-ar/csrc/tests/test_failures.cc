// SPDX-License-Identifier: Apache-2.0
// What goes wrong between ranks is found, named on every rank, bounded in time, and stays found.
#include <string.h>
#include <sys/statvfs.h>

#include "harness.h"

namespace {

constexpr int kF32 = COMMPLANE_CAR_FLOAT32;
constexpr int kSum = COMMPLANE_CAR_SUM;
constexpr double kSlack = 20.0;  // seconds: a loaded machine, not the library

commplane_car_detail detail_of(const Rank& self) {
    commplane_car_detail detail = {};
    detail.size = sizeof detail;
    CHECK_STATUS(commplane_car_status_detail(self.comm, &detail), 0);
    return detail;
}

void check_poisoned(const Rank& self) {
    float value = 1;
    CHECK_STATUS(commplane_car_all_reduce(self.comm, &value, &value, 1, kF32, kSum), COMMPLANE_CAR_EPOISONED);
    CHECK_STATUS(commplane_car_barrier(self.comm), COMMPLANE_CAR_EPOISONED);
}

// `odd` is what rank 1 of 3 does while the others do all_reduce(sum, float32, 100) on staged memory, after one good call.
void mismatch(const std::function<int(Rank&, float*)>& odd, const std::function<void(const commplane_car_call&)>& look) {
    GroupOptions options;
    options.world = 3;
    options.symmetric = 4096;
    run_group(options, [&](Rank& self) {
        float data[200] = {};
        CHECK_STATUS(commplane_car_barrier(self.comm), 0);
        const int status = self.rank == 1 ? odd(self, data) : commplane_car_all_reduce(self.comm, data, data, 100, kF32, kSum);
        CHECK_STATUS(status, COMMPLANE_CAR_EMISMATCH);
        const commplane_car_detail detail = detail_of(self);
        CHECK(detail.sequence == 2);
        CHECK(detail.status == COMMPLANE_CAR_EMISMATCH);
        CHECK(detail.mismatch_mask == (self.rank == 1 ? 5u : 2u));
        CHECK(detail.missing_mask == 0);
        if (self.rank == 0) look(detail.peers[1]);
        if (self.rank == 1) CHECK(detail.peers[0].count == 100 && detail.peers[2].count == 100);
        for (const float value : data) CHECK(value == 0);
        check_poisoned(self);
    });
}

void mismatches() {
    mismatch([](Rank& self, float* data) { return commplane_car_all_reduce(self.comm, data, data, 101, kF32, kSum); },
             [](const commplane_car_call& call) { CHECK(call.count == 101 && call.dtype == kF32); });
    mismatch([](Rank& self, float* data) { return commplane_car_all_reduce(self.comm, data, data, 100, COMMPLANE_CAR_FLOAT16, kSum); },
             [](const commplane_car_call& call) { CHECK(call.dtype == COMMPLANE_CAR_FLOAT16); });
    mismatch([](Rank& self, float* data) { return commplane_car_all_reduce(self.comm, data, data, 100, kF32, COMMPLANE_CAR_MAX); },
             [](const commplane_car_call& call) { CHECK(call.op == COMMPLANE_CAR_MAX); });
    mismatch([](Rank& self, float*) { return commplane_car_barrier(self.comm); },
             [](const commplane_car_call& call) { CHECK(call.kind == COMMPLANE_CAR_KIND_BARRIER); });
    mismatch([](Rank& self, float*) { return commplane_car_all_reduce(self.comm, self.symmetric, self.symmetric, 100, kF32, kSum); },
             [](const commplane_car_call& call) { CHECK(call.symmetric == 1 && call.in_place == 1 && call.region == 1); });
    mismatch([](Rank& self, float*) { return commplane_car_all_reduce(self.comm, nullptr, nullptr, 0, kF32, kSum); },
             [](const commplane_car_call& call) { CHECK(call.count == 0 && call.kind == COMMPLANE_CAR_KIND_ALL_REDUCE); });
}

// Symmetric buffers at different offsets, or one in place and one not, are found before anybody writes.
void symmetric_mismatch(bool other_offset) {
    GroupOptions options;
    options.symmetric = 16384;
    run_group(options, [&](Rank& self) {
        memset(self.symmetric, 0, 16384);
        CHECK_STATUS(commplane_car_barrier(self.comm), 0);
        float* in = reinterpret_cast<float*>(self.symmetric + (other_offset ? self.rank * 64 : 0));
        float* out = !other_offset && self.rank == 1 ? in + 2048 : in;
        CHECK_STATUS(commplane_car_all_reduce(self.comm, in, out, 1024, kF32, kSum), COMMPLANE_CAR_EMISMATCH);
        const commplane_car_call peer = detail_of(self).peers[1 - self.rank];
        CHECK(peer.symmetric == 1);
        CHECK(peer.offset == (other_offset ? (1 - self.rank) * 64u : 0u));
        check_poisoned(self);
    });
}

void missing_rank() {
    GroupOptions options;
    options.world = 3;
    options.timeout_ns = 300000000;
    std::atomic<int> returned{0};
    run_group(options, [&](Rank& self) {
        float data[2000] = {};
        CHECK_STATUS(commplane_car_barrier(self.comm), 0);
        if (self.rank == 1) {
            while (returned != 2) std::this_thread::sleep_for(std::chrono::milliseconds(5));
            CHECK_STATUS(commplane_car_all_reduce(self.comm, data, data, 2000, kF32, kSum), COMMPLANE_CAR_EABORTED);
            CHECK((detail_of(self).abort_mask & ~UINT64_C(5)) == 0 && detail_of(self).abort_mask != 0);
            check_poisoned(self);
            return;
        }
        const auto begin = std::chrono::steady_clock::now();
        const int status = commplane_car_all_reduce(self.comm, data, data, 2000, kF32, kSum);
        CHECK(status == COMMPLANE_CAR_ETIMEDOUT || status == COMMPLANE_CAR_EABORTED);  // the other one may expire first
        CHECK(seconds_since(begin) >= 0.1 && seconds_since(begin) < 0.3 + kSlack);
        const commplane_car_detail detail = detail_of(self);
        CHECK(detail.missing_mask == 2);
        CHECK(detail.sequence == 2);
        CHECK(detail.mine.kind == COMMPLANE_CAR_KIND_ALL_REDUCE && detail.mine.count == 2000);
        if (status == COMMPLANE_CAR_ETIMEDOUT) CHECK(strstr(commplane_car_last_error(), "rank 1 did not arrive") != nullptr);
        check_poisoned(self);
        ++returned;
    });
}

void set_timeout() {
    GroupOptions options;
    run_group(options, [&](Rank& self) {
        CHECK_STATUS(commplane_car_set_timeout(self.comm, 0), COMMPLANE_CAR_EINVAL);
        CHECK_STATUS(commplane_car_set_timeout(self.comm, 50000000), 0);
        if (self.rank == 1) return;
        const auto begin = std::chrono::steady_clock::now();
        CHECK_STATUS(commplane_car_barrier(self.comm), COMMPLANE_CAR_ETIMEDOUT);
        CHECK(seconds_since(begin) < kSlack);
        CHECK(detail_of(self).missing_mask == 2);
    });
}

void aborts() {
    GroupOptions options;
    options.world = 3;
    run_group(options, [&](Rank& self) {  // somebody waits
        if (self.rank == 2) {
            std::this_thread::sleep_for(std::chrono::milliseconds(50));
            CHECK_STATUS(commplane_car_abort(self.comm), 0);
            CHECK_STATUS(commplane_car_barrier(self.comm), COMMPLANE_CAR_EABORTED);
        } else {
            CHECK_STATUS(commplane_car_barrier(self.comm), COMMPLANE_CAR_EABORTED);
            CHECK(detail_of(self).abort_mask == 4);
            CHECK(detail_of(self).missing_mask == 4);
        }
        check_poisoned(self);
    });
    std::atomic<bool> aborted{false};
    run_group(options, [&](Rank& self) {  // from another thread of the waiting rank
        if (self.rank == 0) {
            std::thread watchdog([&] {
                std::this_thread::sleep_for(std::chrono::milliseconds(50));
                CHECK_STATUS(commplane_car_abort(self.comm), 0);
            });
            CHECK_STATUS(commplane_car_barrier(self.comm), COMMPLANE_CAR_EABORTED);
            watchdog.join();
            aborted = true;
        } else {
            while (!aborted) std::this_thread::sleep_for(std::chrono::milliseconds(5));
            CHECK_STATUS(commplane_car_barrier(self.comm), COMMPLANE_CAR_EABORTED);
        }
        CHECK(detail_of(self).abort_mask == 1);
        CHECK(detail_of(self).missing_mask == (self.rank == 0 ? 0u : 1u));  // nobody's absence but its own
    });
}

void other_geometry(const std::function<void(commplane_car_options&)>& adjust) {
    GroupOptions options;
    options.adjust = adjust;
    run_group(options, [&](Rank& self) {
        float value = 1;
        CHECK_STATUS(commplane_car_all_reduce(self.comm, &value, &value, 1, kF32, kSum), COMMPLANE_CAR_EMISMATCH);
        CHECK(detail_of(self).mismatch_mask == UINT64_C(1) << (1 - self.rank));
        check_poisoned(self);
    });
}

void second_thread() {
    GroupOptions options;
    options.timeout_ns = 300000000;
    run_group(options, [&](Rank& self) {
        if (self.rank == 1) return;
        std::atomic<bool> started{false};
        std::thread waiting([&] {
            started = true;
            CHECK_STATUS(commplane_car_barrier(self.comm), COMMPLANE_CAR_ETIMEDOUT);
        });
        while (!started) std::this_thread::yield();
        std::this_thread::sleep_for(std::chrono::milliseconds(30));
        const int status = commplane_car_barrier(self.comm);
        CHECK(status == COMMPLANE_CAR_EBUSY || status == COMMPLANE_CAR_EPOISONED);  // the latter on a very slow machine
        waiting.join();
    });
}

void arguments() {
    GroupOptions options;
    run_group(options, [&](Rank& self) {
        float data[8] = {};
        CHECK_STATUS(commplane_car_all_reduce(self.comm, data, data + 1, 4, kF32, kSum), COMMPLANE_CAR_EINVAL);
        CHECK_STATUS(commplane_car_all_reduce(self.comm, nullptr, data, 4, kF32, kSum), COMMPLANE_CAR_EINVAL);
        CHECK_STATUS(commplane_car_all_reduce(self.comm, data, data, UINT64_C(1) << 48, kF32, kSum), COMMPLANE_CAR_EINVAL);
        CHECK_STATUS(commplane_car_all_reduce(self.comm, data, data, 4, 0, kSum), COMMPLANE_CAR_EUNSUPPORTED);
        CHECK_STATUS(commplane_car_all_reduce(self.comm, data, data, 4, kF32, 5), COMMPLANE_CAR_EUNSUPPORTED);
        CHECK_STATUS(commplane_car_register_symmetric(self.comm, data, 16, 32, 1), COMMPLANE_CAR_EINVAL);
        CHECK_STATUS(commplane_car_register_symmetric(self.comm, data, 16, 16, 0), COMMPLANE_CAR_EINVAL);
        CHECK_STATUS(commplane_car_unregister_symmetric(self.comm, 9), COMMPLANE_CAR_ENOENT);
        CHECK_STATUS(commplane_car_barrier(self.comm), 0);  // none of these was a collective step, and none poisons
    });
}

void lifecycle() {
    const std::string name = fresh_name();
    commplane_car_options options = {};
    options.size = sizeof options;
    options.world_size = 2;
    options.staging_bytes = 4096;
    options.timeout_ns = 1000000000;
    commplane_car_layout_info info = {};
    CHECK_STATUS(commplane_car_layout(&options, &info), COMMPLANE_CAR_EINVAL);  // no size
    info.size = sizeof info;
    CHECK_STATUS(commplane_car_layout(&options, &info), 0);
    CHECK(info.total_bytes == 2 * info.part_bytes);
    commplane_car_segment* segment = nullptr;
    CHECK_STATUS(commplane_car_segment_map(name.c_str(), info.total_bytes, 0, 0, &segment), COMMPLANE_CAR_ENOENT);
    CHECK_STATUS(commplane_car_segment_create(name.c_str(), info.total_bytes), 0);
    CHECK_STATUS(commplane_car_segment_create(name.c_str(), info.total_bytes), COMMPLANE_CAR_EEXIST);
    CHECK_STATUS(commplane_car_segment_map(name.c_str(), info.total_bytes + 1, 0, 0, &segment), COMMPLANE_CAR_ESIZE);
    CHECK_STATUS(commplane_car_segment_map(name.c_str(), info.total_bytes, 8, info.total_bytes, &segment), COMMPLANE_CAR_EINVAL);
    CHECK_STATUS(commplane_car_segment_map(name.c_str(), info.total_bytes, 0, info.part_bytes, &segment), 0);
    commplane_car_comm* comm = nullptr;
    options.chunk_bytes = 100;
    CHECK_STATUS(commplane_car_comm_open(&options, segment, &comm), COMMPLANE_CAR_EINVAL);
    options.chunk_bytes = 0;
    CHECK_STATUS(commplane_car_comm_open(&options, segment, &comm), 0);
    CHECK(commplane_car_chunk_bytes(comm) == 1024);  // the staging allows no more
    commplane_car_comm* again = nullptr;
    CHECK_STATUS(commplane_car_comm_open(&options, segment, &again), COMMPLANE_CAR_EBUSY);
    CHECK_STATUS(commplane_car_segment_unmap(segment), COMMPLANE_CAR_EBUSY);
    CHECK_STATUS(commplane_car_comm_close(comm), 0);
    CHECK_STATUS(commplane_car_comm_close(comm), 0);
    CHECK_STATUS(commplane_car_barrier(comm), COMMPLANE_CAR_ECLOSED);
    CHECK_STATUS(commplane_car_abort(comm), COMMPLANE_CAR_ECLOSED);
    CHECK_STATUS(commplane_car_segment_unmap(segment), 0);
    CHECK_STATUS(commplane_car_segment_unlink(name.c_str()), 0);
    CHECK_STATUS(commplane_car_segment_unlink(name.c_str()), 0);
    CHECK_STATUS(commplane_car_segment_create("a/b", 64), COMMPLANE_CAR_EINVAL);
    CHECK_STATUS(commplane_car_segment_create("", 64), COMMPLANE_CAR_EINVAL);
}

// A reservation larger than all of /dev/shm is refused by the kernel before it touches a page.
void full() {
    struct statvfs about;
    if (statvfs("/dev/shm", &about) != 0 || about.f_blocks == 0) return;
    const uint64_t bytes = (about.f_blocks * about.f_frsize + (1 << 20)) / 4096 * 4096;
    const std::string name = fresh_name();
    CHECK_STATUS(commplane_car_segment_create(name.c_str(), bytes), 0);
    commplane_car_segment* segment = nullptr;
    CHECK_STATUS(commplane_car_segment_map(name.c_str(), bytes, 0, bytes, &segment), COMMPLANE_CAR_ENOSPC);
    CHECK(strstr(commplane_car_last_error(), "No space left") != nullptr);
    CHECK_STATUS(commplane_car_segment_unlink(name.c_str()), 0);
}

}  // namespace

int main() {
    mismatches();
    symmetric_mismatch(true);
    symmetric_mismatch(false);
    missing_rank();
    set_timeout();
    aborts();
    other_geometry([](commplane_car_options& own) { own.chunk_bytes = own.rank == 0 ? 1024 : 512; });
    other_geometry([](commplane_car_options& own) { own.token = own.rank; });
    second_thread();
    arguments();
    lifecycle();
    full();
    return report("failures");
}
