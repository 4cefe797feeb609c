// SPDX-License-Identifier: Apache-2.0
//
// The machine of machine.h for g++: threads stand in for those of a block, so the kernels themselves run in tests without a GPU.
//
// Memory of a communicator is accessed word by word with relaxed atomics, so a vector tears as it may between GPUs, and a thread
// sanitizer has nothing to say there. All else is plain, and so are tiles where that is asked for: that flags and meetings order
// them is then proved by the silence of a thread sanitizer. Not modelled: the order of memory of a GPU, which is weaker than that of the host (the
// models in tests/ are for that), launches that overlap, and warps.
#pragma once

#include <sched.h>
#include <string.h>
#include <time.h>

#include <atomic>
#include <vector>

#include "layout.h"

namespace car {
namespace gpu {

// What the threads of a test know of where words are shared: `bytes` of each rank's memory, one after the other from `base` on, and
// all in front of them from `head` on.
struct HostMemory {
    const unsigned char* head = nullptr;
    const unsigned char* base = nullptr;
    uint64_t bytes = 0;
    uint64_t tiles = 0;  // where they begin in a rank's memory; they are its last part
    uint32_t ranks = 0;
    bool plain_tiles = false;  // only where no kernel gives up: what is in flight then is in nobody's order

    bool has_words(const void* at) const {
        const auto* const p = static_cast<const unsigned char*>(at);
        if (p < head || p >= base + bytes * ranks) return false;
        return !plain_tiles || p < base || uint64_t(p - base) % bytes < tiles;
    }
};

// Of the thread that runs: the memory, and how it is held up. `delays` is how many accesses in 1024 are followed by a pause.
struct HostThread {
    HostMemory memory;
    uint32_t delays = 0;
    uint32_t random = 1;

    // A waiting thread lets others go on: there are many more of them than cores.
    void pause(bool waits) {
        if (waits) sched_yield();
        if (delays == 0) return;
        random = random * 1664525u + 1013904223u;
        if ((random >> 12 & 1023) >= delays) return;
        if ((random >> 22 & 15) == 0) {
            const timespec moment = {0, 20000};
            nanosleep(&moment, nullptr);
        } else {
            sched_yield();
        }
    }
};

inline HostThread& host_thread() {
    static thread_local HostThread own;
    return own;
}

inline Vec load(const void* at) {
    Vec v;
    if (host_thread().memory.has_words(at)) {
        for (int i = 0; i < 4; ++i) v.w[i] = __atomic_load_n(static_cast<const uint32_t*>(at) + i, __ATOMIC_RELAXED);
    } else {
        memcpy(&v, at, sizeof v);
    }
    return v;
}

inline void store(void* at, const Vec& v) {
    if (host_thread().memory.has_words(at)) {
        for (int i = 0; i < 4; ++i) __atomic_store_n(static_cast<uint32_t*>(at) + i, v.w[i], __ATOMIC_RELAXED);
    } else {
        memcpy(at, &v, sizeof v);
    }
}

inline Vec load_shared(const void* at) {
    const Vec v = load(at);
    host_thread().pause(v.w[0] == kEmpty || v.w[1] == kEmpty || v.w[2] == kEmpty || v.w[3] == kEmpty);
    return v;
}

inline void store_shared(void* at, const Vec& v) {
    if (!host_thread().memory.has_words(at)) return store(at, v);
    for (uint32_t i = 0; i < 4; ++i) {  // in pieces, and the last one first, as nobody may count on their order
        __atomic_store_n(static_cast<uint32_t*>(at) + 3 - i, v.w[3 - i], __ATOMIC_RELAXED);
        host_thread().pause(false);
    }
}

inline uint32_t load_acquire(const uint32_t* at) {
    const uint32_t v = __atomic_load_n(at, __ATOMIC_ACQUIRE);
    host_thread().pause(true);
    return v;
}

inline void store_release(uint32_t* at, uint32_t v) {
    host_thread().pause(false);
    __atomic_store_n(at, v, __ATOMIC_RELEASE);
}

inline uint32_t load_relaxed(const uint32_t* at) {
    host_thread().pause(false);
    return __atomic_load_n(at, __ATOMIC_RELAXED);
}

inline void store_relaxed(uint32_t* at, uint32_t v) { __atomic_store_n(at, v, __ATOMIC_RELAXED); }

inline uint32_t exchange(uint32_t* at, uint32_t v) {
    host_thread().pause(false);
    return __atomic_exchange_n(at, v, __ATOMIC_RELAXED);
}

inline uint64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return uint64_t(now.tv_sec) * 1000000000u + uint64_t(now.tv_nsec);
}

template <class P>
P* ready(P* p) {
    return p;
}

// Threads that meet again and again. The last one to come may do something before the others go on.
class HostMeeting {
  public:
    template <class F>
    void meet(uint32_t threads, F last) {
        const uint32_t round = round_.load(std::memory_order_acquire);
        if (come_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            last();
            come_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        while (round_.load(std::memory_order_acquire) == round) sched_yield();
    }
    void meet(uint32_t threads) {
        meet(threads, [] {});
    }

  private:
    std::atomic<uint32_t> come_{0}, round_{0};
};

// What the threads of one block in one launch have in common.
struct HostShared {
    explicit HostShared(uint32_t threads) : of_thread(threads) {}
    HostMeeting meeting;
    std::atomic<bool> any[2] = {{false}, {false}};
    std::atomic<uint32_t> heard{0};
    std::vector<float> of_thread;
};

// Block of machine.h. `control` threads behind the `count` others are those that talk about the call.
class HostBlock {
  public:
    HostBlock(HostShared& shared, uint32_t control, uint32_t count, uint32_t thread, uint32_t block, uint32_t blocks)
        : control(control), shared_(shared), count_(count), thread_(thread), block_(block), blocks_(blocks) {}
    HostBlock(const HostBlock&) = delete;
    HostBlock& operator=(const HostBlock&) = delete;

    const uint32_t control;

    uint32_t thread() const { return thread_; }
    uint32_t threads() const { return count_; }
    uint32_t block() const { return block_; }
    uint32_t blocks() const { return blocks_; }
    void sync() const { shared_.meeting.meet(count_); }
    bool any(bool mine) const {
        std::atomic<bool>& all = shared_.any[turn_];
        std::atomic<bool>& next = shared_.any[turn_ ^= 1];
        if (mine) all.store(true, std::memory_order_relaxed);
        // Of the next meeting nobody has said anything yet, and of its last use everybody knows.
        shared_.meeting.meet(count_, [&] { next.store(false, std::memory_order_relaxed); });
        return all.load(std::memory_order_relaxed);
    }
    void heard() const { shared_.heard.fetch_add(1, std::memory_order_release); }
    void heard_all() const {
        shared_.heard.fetch_add(1, std::memory_order_release);
        while (shared_.heard.load(std::memory_order_acquire) != count_ + control) sched_yield();
    }
    float add(float mine) const {
        sync();
        shared_.of_thread[thread_] = mine;
        sync();
        float total = 0.0f;
        for (uint32_t i = 0; i < count_; ++i) total += shared_.of_thread[i];
        return total;
    }
    void await_previous() const {}
    void let_next_start() const {}

  private:
    HostShared& shared_;
    const uint32_t count_, thread_, block_, blocks_;
    mutable uint32_t turn_ = 0;
};

}  // namespace gpu
}  // namespace car
