// SPDX-License-Identifier: Apache-2.0
// The flight recorder has the last calls as they were made, also while one runs, and never a half-written one.
#include <time.h>

#include "detail.h"
#include "problem.h"

namespace {

constexpr int kSum = COMMPLANE_CAR_SUM;
constexpr uint64_t kRing = COMMPLANE_CAR_FLIGHT_RECORDS;

uint64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<uint64_t>(t.tv_sec) * 1000000000u + static_cast<uint64_t>(t.tv_nsec);
}

std::vector<commplane_car_flight_record> records_of(const Rank& self, uint64_t capacity = 2 * kRing) {
    std::vector<commplane_car_flight_record> records(capacity + 1);
    uint64_t count = UINT64_MAX;
    CHECK_STATUS(commplane_car_flight(self.comm, records.data(), sizeof records[0], capacity, &count), 0);
    CHECK(count <= capacity && count <= kRing);
    records.resize(std::min(count, capacity));
    return records;
}

// The recorder's clock is a line through two readings of CLOCK_MONOTONIC: off by as long as the reader lost the core in one.
constexpr uint64_t kSlack = 100000000;

// What holds for every list of records, whenever it was taken.
void check_order(const std::vector<commplane_car_flight_record>& records) {
    for (size_t i = 0; i < records.size(); ++i) {
        const commplane_car_flight_record& record = records[i];
        CHECK(record.begun_ns != 0 && record.begun_ns <= now_ns() + kSlack);
        if (record.status == 1) {
            CHECK(record.ended_ns == 0 && i + 1 == records.size());  // only the last one may still run
        } else {
            CHECK(record.begun_ns <= record.ended_ns && record.ended_ns <= now_ns() + kSlack);
            CHECK(record.waiting_mask == 0);
        }
        if (i == 0) continue;
        CHECK(record.sequence == records[i - 1].sequence + 1);
        CHECK(record.begun_ns >= records[i - 1].ended_ns);
    }
}

// One call of every kind, and what the recorder has of it.
void every_kind() {
    GroupOptions options;
    options.symmetric = 65536;
    run_group(options, [](Rank& self) {
        CHECK(records_of(self).empty());
        const uint64_t begun = now_ns();
        float data[2000] = {}, out[4000] = {}, more[2000] = {}, weight[100] = {};
        auto* const region = reinterpret_cast<float*>(self.symmetric);
        CHECK_STATUS(commplane_car_barrier(self.comm), 0);
        CHECK_STATUS(commplane_car_all_reduce(self.comm, data, data, 600, kFloat32, kSum), 0);  // 3 chunks of 1024 bytes
        CHECK_STATUS(commplane_car_all_reduce(self.comm, region + 16, region + 16, 1000, kFloat32, COMMPLANE_CAR_MAX), 0);
        CHECK_STATUS(commplane_car_all_gather(self.comm, data, out, 7, COMMPLANE_CAR_INT64), 0);
        CHECK_STATUS(commplane_car_reduce_scatter(self.comm, data, out, 100, kBfloat16, COMMPLANE_CAR_AVG), 0);
        CHECK_STATUS(commplane_car_broadcast(self.comm, data, 1025, COMMPLANE_CAR_UINT8, 1), 0);
        CHECK_STATUS(commplane_car_all_reduce_rms_norm(self.comm, data, more, weight, out, more, 4, 100, kFloat32, 0.25f, 2.0f), 0);
        CHECK_STATUS(commplane_car_all_reduce(self.comm, nullptr, nullptr, 0, kFloat16, kSum), 0);
        const std::vector<commplane_car_flight_record> records = records_of(self);
        const struct {
            int kind, dtype, op;
            uint32_t symmetric;
            uint64_t count;
            uint32_t steps;
        } wanted[] = {
            {kBarrier, 0, 0, 0, 0, 1},
            {kAllReduce, kFloat32, kSum, 0, 600, 3},
            {kAllReduce, kFloat32, COMMPLANE_CAR_MAX, 1, 1000, 2},
            {kAllGather, COMMPLANE_CAR_INT64, 0, 0, 7, 1},
            {kReduceScatter, kBfloat16, COMMPLANE_CAR_AVG, 0, 100, 1},
            {kBroadcast, COMMPLANE_CAR_UINT8, 0, 0, 1025, 2},
            {kRmsNorm, kFloat32, kSum, 0, 400, 2},
            {kAllReduce, kFloat16, kSum, 0, 0, 1},
        };
        CHECK(records.size() == 8);
        check_order(records);
        for (size_t i = 0; i < records.size() && i < 8; ++i) {
            const commplane_car_flight_record& record = records[i];
            CHECK(record.sequence == i + 1 && record.status == 0);
            CHECK(record.steps == wanted[i].steps);
            CHECK(record.call.kind == static_cast<uint32_t>(wanted[i].kind));
            CHECK(record.call.dtype == static_cast<uint32_t>(wanted[i].dtype));
            CHECK(record.call.op == static_cast<uint32_t>(wanted[i].op));
            CHECK(record.call.symmetric == wanted[i].symmetric && record.call.count == wanted[i].count);
        }
        CHECK(records[0].begun_ns + kSlack >= begun);
        CHECK(records[2].call.region == 1 && records[2].call.offset == 64 && records[2].call.in_place == 1);
        CHECK(records[5].call.root == 1);
        CHECK(records[6].call.hidden == 100 && records[6].call.eps == 0.25f && records[6].call.weight_bias == 2.0f);
    });
}

// The last ones are kept, the oldest of them first; a reader with less room gets the latest.
void wraps() {
    run_group({}, [](Rank& self) {
        std::vector<unsigned char> data(4000);
        const uint64_t calls = 3 * kRing + 7;
        for (uint64_t call = 1; call <= calls; ++call) {
            CHECK_STATUS(commplane_car_all_reduce(self.comm, data.data(), data.data(), call, COMMPLANE_CAR_UINT8, kSum), 0);
            if (call != kRing - 1 && call != kRing && call != kRing + 1 && call != calls) continue;
            const std::vector<commplane_car_flight_record> records = records_of(self);
            CHECK(records.size() == std::min(call, kRing));
            CHECK(!records.empty() && records.back().sequence == call);
            check_order(records);
            for (const commplane_car_flight_record& record : records) CHECK(record.call.count == record.sequence);
        }
        const std::vector<commplane_car_flight_record> few = records_of(self, 3);
        CHECK(few.size() == 3 && few[0].sequence == calls - 2 && few[2].sequence == calls);
        CHECK(records_of(self, 0).empty());
    });
}

// Rank 2 does not come. Another thread of rank 0 sees the call run and whom it waits for, then how it ended.
void running_call() {
    GroupOptions options;
    options.world = 3;
    std::atomic<bool> seen{false};
    run_group(options, [&](Rank& self) {
        std::vector<float> data(2000);
        CHECK_STATUS(commplane_car_barrier(self.comm), 0);
        if (self.rank != 0) {
            if (self.rank == 2) {
                while (!seen) std::this_thread::sleep_for(std::chrono::milliseconds(1));
                CHECK_STATUS(commplane_car_abort(self.comm), 0);
            }
            CHECK_STATUS(commplane_car_all_reduce(self.comm, data.data(), data.data(), 2000, kFloat32, kSum), COMMPLANE_CAR_EABORTED);
            return;
        }
        std::thread watcher([&] {
            for (;;) {
                const std::vector<commplane_car_flight_record> records = records_of(self);
                check_order(records);
                if (!records.empty() && records.back().status == 1 && records.back().waiting_mask == 4) {
                    const commplane_car_flight_record& last = records.back();
                    CHECK(last.sequence == 2 && last.call.kind == kAllReduce && last.call.count == 2000);
                    break;
                }
                std::this_thread::sleep_for(std::chrono::milliseconds(1));
            }
            seen = true;
        });
        CHECK_STATUS(commplane_car_all_reduce(self.comm, data.data(), data.data(), 2000, kFloat32, kSum), COMMPLANE_CAR_EABORTED);
        watcher.join();
        const std::vector<commplane_car_flight_record> records = records_of(self);
        check_order(records);
        CHECK(records.size() == 2 && records[1].status == COMMPLANE_CAR_EABORTED);
        CHECK_STATUS(commplane_car_barrier(self.comm), COMMPLANE_CAR_EPOISONED);
        CHECK(records_of(self).size() == 2);  // what was refused was no call
    });
}

// A reader that races with the writer gets whole records, in order: the oldest of the ring is the next to be written over, and is
// left out then. What is in a record goes together.
void reader_races() {
    GroupOptions options;
    run_group(options, [](Rank& self) {
        std::atomic<bool> done{false};
        std::thread reader;
        uint64_t reads = 0, most = 0;
        if (self.rank == 0) {
            reader = std::thread([&] {
                while (!done) {
                    uint64_t before = 0;
                    for (const commplane_car_flight_record& record : records_of(self)) {
                        CHECK(record.call.count == record.sequence % 100);
                        CHECK(record.call.op == (record.sequence % 2 == 0 ? 1u : 3u));
                        CHECK(record.sequence > before);
                        CHECK(record.status == 0 || record.status == 1);
                        CHECK(record.status == 1 || record.ended_ns >= record.begun_ns);
                        before = record.sequence;
                    }
                    ++reads;
                    most = std::max(most, before);
                }
            });
        }
        std::vector<unsigned char> data(100);
        for (uint64_t call = 1; call <= 40000; ++call) {
            CHECK_STATUS(commplane_car_all_reduce(self.comm, data.data(), data.data(), call % 100, COMMPLANE_CAR_UINT8,
                                                  call % 2 == 0 ? COMMPLANE_CAR_SUM : COMMPLANE_CAR_MAX), 0);
        }
        if (self.rank != 0) return;
        done = true;
        reader.join();
        CHECK(reads != 0 && most != 0);
    });
}

void refused() {
    run_group({}, [](Rank& self) {
        commplane_car_flight_record record = {};
        uint64_t count = 0;
        CHECK_STATUS(commplane_car_flight(self.comm, &record, sizeof record - 8, 1, &count), COMMPLANE_CAR_EINVAL);
        CHECK_STATUS(commplane_car_flight(self.comm, &record, sizeof record + 8, 1, &count), COMMPLANE_CAR_EINVAL);
        CHECK_STATUS(commplane_car_flight(self.comm, nullptr, sizeof record, 1, &count), COMMPLANE_CAR_EINVAL);
        CHECK_STATUS(commplane_car_flight(self.comm, &record, sizeof record, 1, nullptr), COMMPLANE_CAR_EINVAL);
        CHECK_STATUS(commplane_car_barrier(self.comm), 0);
    });
}

}  // namespace

int main() {
    deadline(300);
    every_kind();
    wraps();
    running_call();
    reader_races();
    refused();
    return report("flight");
}
