// SPDX-License-Identifier: Apache-2.0
// The one wait loop of the library: every wait for a peer is bounded by it.
#pragma once

#include <sched.h>
#include <stdint.h>
#include <time.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace commplane_car {

inline void cpu_relax() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield" ::: "memory");
#endif
}

inline uint64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<uint64_t>(t.tv_sec) * 1000000000u + static_cast<uint64_t>(t.tv_nsec);
}

enum class Waited { kReady, kAborted, kExpired };

// Polls `ready` until it holds, `aborted` holds or `timeout_ns` has passed. `ready` does a relaxed load; who needs the data
// behind the flag loads it once more with acquire. The clock and the abort words are looked at every 1024 polls (some tens
// of us), so the common wait makes no call at all. After the first 1024 polls the core is probably wanted elsewhere: each
// poll then yields, and the clock is read every 16 of them, for one yield can take a whole scheduler slice. With more ranks
// than cores (`oversubscribed`) spinning only keeps the peer from running, so it yields from the first poll on.
template <class Ready, class Aborted>
Waited bounded_wait(bool oversubscribed, uint64_t timeout_ns, Ready ready, Aborted aborted) {
    bool yielding = oversubscribed;
    uint32_t left = yielding ? 16 : 1024;
    uint64_t begun = 0;
    for (;;) {
        if (ready()) return Waited::kReady;
        if (yielding) {
            sched_yield();
        } else {
            cpu_relax();
        }
        if (--left != 0) continue;
        if (aborted()) return ready() ? Waited::kReady : Waited::kAborted;
        const uint64_t now = now_ns();
        if (begun == 0) begun = now;
        if (now - begun >= timeout_ns) return ready() ? Waited::kReady : Waited::kExpired;
        yielding = true;
        left = 16;
    }
}

}  // namespace commplane_car
