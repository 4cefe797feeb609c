// SPDX-License-Identifier: Apache-2.0
// Threads as ranks. Each rank maps the segments itself, so the same memory lies at another address for each, as between
// processes. With CAR_TEST_SHARE_MAPPING set all ranks use one mapping: then a thread sanitizer sees the sharing.
#pragma once

#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "commplane_car.h"

inline std::atomic<int> failures{0};

#define CHECK(condition)                                                                             \
    do {                                                                                             \
        if (!(condition) && ++failures < 20) fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    } while (false)
#define CHECK_STATUS(expression, wanted)                                                             \
    do {                                                                                             \
        const int got_ = (expression);                                                               \
        if (got_ != (wanted) && ++failures < 20)                                                     \
            fprintf(stderr, "%s:%d: %s is %s (%s), wanted %s\n", __FILE__, __LINE__, #expression,    \
                    commplane_car_status_name(got_), commplane_car_last_error(), commplane_car_status_name(wanted)); \
    } while (false)

// Ends the process if it is still there after so many seconds: a call that hangs is a failure with a name.
inline void deadline(unsigned seconds) {
    signal(SIGALRM, [](int) {
        static const char text[] = "the test has not ended within its deadline\n";
        const ssize_t written = write(STDERR_FILENO, text, sizeof text - 1);
        _exit(written > 0 ? 3 : 4);
    });
    alarm(seconds);
}

inline int report(const char* name) {
    printf("%s: %d failures\n", name, failures.load());
    return failures == 0 ? 0 : 1;
}

inline double seconds_since(std::chrono::steady_clock::time_point begin) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

struct GroupOptions {
    uint32_t world = 2;
    uint64_t staging = 4096;
    uint64_t chunk = 1024;
    uint64_t timeout_ns = UINT64_C(60000000000);
    uint64_t symmetric = 0;  // bytes a rank of a registered region; 0: none
    std::function<void(commplane_car_options&)> adjust;  // per rank, before open
};

// More ranks than cores, so a wait yields at once.
inline bool oversubscribed(uint32_t world) { return world > std::thread::hardware_concurrency(); }

struct Rank {
    uint32_t rank;
    uint32_t world;
    commplane_car_comm* comm;
    unsigned char* symmetric;  // this rank's part of the region
    uint64_t symmetric_bytes;
};

inline std::string fresh_name() {
    static std::atomic<int> number{0};
    return "commplane-car-test-" + std::to_string(getpid()) + "-" + std::to_string(++number);
}

// Runs `body` on `world` threads, each with its own communicator; unlinks and closes everything.
inline void run_group(const GroupOptions& options, const std::function<void(Rank&)>& body) {
    const bool share = getenv("CAR_TEST_SHARE_MAPPING") != nullptr;
    const std::string name = fresh_name();
    const std::string symmetric_name = name + "-symmetric";
    commplane_car_options base = {};
    base.size = sizeof base;
    base.world_size = options.world;
    base.oversubscribed = oversubscribed(options.world) ? 1 : 0;
    base.staging_bytes = options.staging;
    base.chunk_bytes = options.chunk;
    base.timeout_ns = options.timeout_ns;
    commplane_car_layout_info info = {};
    info.size = sizeof info;
    CHECK_STATUS(commplane_car_layout(&base, &info), 0);
    CHECK_STATUS(commplane_car_segment_create(name.c_str(), info.total_bytes), 0);
    const uint64_t symmetric_total = options.symmetric * options.world;
    if (symmetric_total != 0) CHECK_STATUS(commplane_car_segment_create(symmetric_name.c_str(), symmetric_total), 0);
    commplane_car_segment* common = nullptr;
    commplane_car_segment* common_symmetric = nullptr;
    if (share) {
        CHECK_STATUS(commplane_car_segment_map(name.c_str(), info.total_bytes, 0, info.total_bytes, &common), 0);
        if (symmetric_total != 0) {
            CHECK_STATUS(commplane_car_segment_map(symmetric_name.c_str(), symmetric_total, 0, symmetric_total, &common_symmetric), 0);
        }
    }
    std::atomic<uint32_t> mapped{0};  // the last one to map removes the names: a killed test leaves nothing behind
    std::vector<std::thread> threads;
    for (uint32_t rank = 0; rank < options.world; ++rank) {
        threads.emplace_back([&, rank] {
            commplane_car_options own = base;
            own.rank = rank;
            if (options.adjust) options.adjust(own);
            commplane_car_layout_info mine = {};
            mine.size = sizeof mine;
            CHECK_STATUS(commplane_car_layout(&own, &mine), 0);
            commplane_car_segment* segment = common;
            commplane_car_segment* symmetric = common_symmetric;
            if (!share) {
                CHECK_STATUS(commplane_car_segment_map(name.c_str(), info.total_bytes, mine.part_offset, mine.part_bytes, &segment), 0);
            }
            commplane_car_comm* comm = nullptr;
            CHECK_STATUS(commplane_car_comm_open(&own, segment, &comm), 0);
            Rank self = {rank, options.world, comm, nullptr, options.symmetric};
            if (symmetric_total != 0) {
                if (!share) {
                    CHECK_STATUS(commplane_car_segment_map(symmetric_name.c_str(), symmetric_total, rank * options.symmetric,
                                                           options.symmetric, &symmetric), 0);
                }
                auto* start = static_cast<unsigned char*>(commplane_car_segment_base(symmetric));
                CHECK_STATUS(commplane_car_register_symmetric(comm, start, options.symmetric, options.symmetric, 1), 0);
                self.symmetric = start + rank * options.symmetric;
            }
            if (++mapped == options.world) {
                CHECK_STATUS(commplane_car_segment_unlink(name.c_str()), 0);
                CHECK_STATUS(commplane_car_segment_unlink(symmetric_name.c_str()), 0);
            }
            body(self);
            CHECK_STATUS(commplane_car_comm_close(comm), 0);
            if (!share) {
                CHECK_STATUS(commplane_car_segment_unmap(segment), 0);
                if (symmetric != nullptr) CHECK_STATUS(commplane_car_segment_unmap(symmetric), 0);
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    if (common != nullptr) CHECK_STATUS(commplane_car_segment_unmap(common), 0);
    if (common_symmetric != nullptr) CHECK_STATUS(commplane_car_segment_unmap(common_symmetric), 0);
}

// The instruction sets of this CPU.
inline std::vector<std::string> instruction_sets() {
    std::vector<std::string> found;
    for (const char* name : {"baseline", "avx2", "avx512", "avx512_bf16"}) {
        if (commplane_car_set_isa(name) == 0) found.push_back(name);
    }
    commplane_car_set_isa("auto");
    return found;
}
