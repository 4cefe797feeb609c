// SPDX-License-Identifier: Apache-2.0
// Processes as ranks: forked from a process with a single thread, so that they may be killed and stopped. What they say goes over
// a board in shared memory; what fails in one of them is printed there and counted here.
#pragma once

#include <dirent.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include <new>

#include "harness.h"

struct Board {
    std::atomic<uint32_t> opened{0};
    std::atomic<uint32_t> failures{0};
    std::atomic<uint32_t> refused{0};  // ranks that may not read the others' memory
    std::atomic<uint32_t> finished{0};
    std::atomic<bool> idle[COMMPLANE_CAR_MAX_WORLD] = {};
    std::atomic<uint64_t> calls[COMMPLANE_CAR_MAX_WORLD] = {};
    std::atomic<bool> told{false};
};

inline void short_nap() { std::this_thread::sleep_for(std::chrono::microseconds(200)); }

template <class Condition>
void wait_until(Condition condition) {  // bounded by the process's deadline
    while (!condition()) short_nap();
}

class Processes {
  public:
    using Body = std::function<void(Rank&, Board&)>;

    // Starts the ranks; returns when all have opened. Each runs `body` and ends.
    Processes(const GroupOptions& options, const Body& body) : options_(options), name_(fresh_name()) {
        void* memory = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(memory != MAP_FAILED);
        board_ = new (memory) Board;
        base_.size = sizeof base_;
        base_.world_size = options.world;
        base_.oversubscribed = oversubscribed(options.world) ? 1 : 0;
        base_.staging_bytes = options.staging;
        base_.chunk_bytes = options.chunk;
        base_.timeout_ns = options.timeout_ns;
        info_.size = sizeof info_;
        CHECK_STATUS(commplane_car_layout(&base_, &info_), 0);
        CHECK_STATUS(commplane_car_segment_create(name_.c_str(), info_.total_bytes), 0);
        if (symmetric_total() != 0) CHECK_STATUS(commplane_car_segment_create(symmetric_name().c_str(), symmetric_total()), 0);
        fflush(stdout);
        fflush(stderr);
        for (uint32_t rank = 0; rank < options.world; ++rank) {
            const pid_t child = fork();
            CHECK(child >= 0);
            if (child == 0) {
                failures = 0;  // the parent has counted those
                deadline(kDeadline);
                be(rank, body);
                exit(failures == 0 ? 0 : 1);
            }
            children_.push_back(child);
        }
        wait_until([&] { return board_->opened == options_.world || ended() != 0; });
        CHECK_STATUS(commplane_car_segment_unlink(name_.c_str()), 0);
        CHECK_STATUS(commplane_car_segment_unlink(symmetric_name().c_str()), 0);
    }
    Processes(const Processes&) = delete;
    Processes& operator=(const Processes&) = delete;

    // Waits for the ranks that are left: they have to end by themselves and without a failure.
    ~Processes() {
        for (pid_t& child : children_) {
            if (child != 0) reap(child);
        }
        munmap(board_, sizeof(Board));
    }

    Board& board() { return *board_; }

    // How many ranks have ended. They are reaped later.
    uint32_t ended() const {
        uint32_t found = 0;
        for (const pid_t child : children_) {
            siginfo_t about = {};
            if (child == 0 || (waitid(P_PID, static_cast<id_t>(child), &about, WEXITED | WNOHANG | WNOWAIT) == 0 && about.si_pid == child)) ++found;
        }
        return found;
    }
    void send(uint32_t rank, int signal) { CHECK(kill(children_[rank], signal) == 0); }

    // kill -9 for all ranks of a mask. Without `reap_now` they stay zombies until the end.
    void murder(uint64_t ranks, bool reap_now) {
        murdered_ |= ranks;
        for (uint32_t rank = 0; rank < options_.world; ++rank) {
            if ((ranks >> rank & 1) != 0) send(rank, SIGKILL);
        }
        for (uint32_t rank = 0; rank < options_.world; ++rank) {
            if ((ranks >> rank & 1) != 0 && reap_now) reap(children_[rank]);
        }
    }

  private:
    static constexpr unsigned kDeadline = 120;

    uint64_t symmetric_total() const { return options_.symmetric * options_.world; }
    std::string symmetric_name() const { return name_ + "-symmetric"; }

    void be(uint32_t rank, const Body& body) {
        commplane_car_options own = base_;
        own.rank = rank;
        commplane_car_layout_info mine = {};
        mine.size = sizeof mine;
        commplane_car_segment* segment = nullptr;
        commplane_car_segment* symmetric = nullptr;
        commplane_car_comm* comm = nullptr;
        CHECK_STATUS(commplane_car_layout(&own, &mine), 0);
        CHECK_STATUS(commplane_car_segment_map(name_.c_str(), info_.total_bytes, mine.part_offset, mine.part_bytes, &segment), 0);
        CHECK_STATUS(commplane_car_comm_open(&own, segment, &comm), 0);
        Rank self = {rank, options_.world, comm, nullptr, options_.symmetric};
        if (symmetric_total() != 0) {
            CHECK_STATUS(commplane_car_segment_map(symmetric_name().c_str(), symmetric_total(), rank * options_.symmetric,
                                                   options_.symmetric, &symmetric), 0);
            auto* start = static_cast<unsigned char*>(commplane_car_segment_base(symmetric));
            CHECK_STATUS(commplane_car_register_symmetric(comm, start, options_.symmetric, options_.symmetric, 1), 0);
            self.symmetric = start + rank * options_.symmetric;
        }
        ++board_->opened;
        wait_until([&] { return board_->opened == options_.world; });
        body(self, *board_);
        CHECK_STATUS(commplane_car_comm_close(comm), 0);
        CHECK_STATUS(commplane_car_segment_unmap(segment), 0);
        if (symmetric != nullptr) CHECK_STATUS(commplane_car_segment_unmap(symmetric), 0);
    }


    void reap(pid_t& child) {
        int status = 0;
        CHECK(waitpid(child, &status, 0) == child);
        const auto rank = static_cast<uint32_t>(&child - children_.data());
        child = 0;
        if ((murdered_ >> rank & 1) != 0) {
            CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        } else if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
            ++failures;
            fprintf(stderr, "the process of rank %u ended with wait status %#x\n", rank, static_cast<unsigned>(status));
        }
    }

    GroupOptions options_;
    std::string name_;
    commplane_car_options base_ = {};
    commplane_car_layout_info info_ = {};
    Board* board_ = nullptr;
    std::vector<pid_t> children_;
    uint64_t murdered_ = 0;
};

// Names of this process and its children that are left in /dev/shm.
inline int names_left() {
    const std::string ours = "commplane-car-test-" + std::to_string(getpid()) + "-";
    int found = 0;
    DIR* folder = opendir("/dev/shm");
    if (folder == nullptr) return 0;
    while (const dirent* entry = readdir(folder)) found += std::string(entry->d_name).rfind(ours, 0) == 0 ? 1 : 0;
    closedir(folder);
    return found;
}
