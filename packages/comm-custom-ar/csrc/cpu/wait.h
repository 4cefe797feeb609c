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

enum class Waited { kReady, kAborted, kExpired, kStopped };

// Polls `ready` until it holds, `aborted` or `stopped` holds, or `timeout_ns` has passed since `begun`. `ready` does a relaxed
// load; who needs the data behind the flag loads it once more with acquire.
//
// `begun` is 0 before the first of several waits that share one deadline; the first that is not over at once sets it.
//
//   spin    1024 polls (some tens of us) with neither clock nor system call: the common wait ends here.
//   yield   up to 10 ms: the core is probably wanted elsewhere. The abort words and the clock are looked at every 16 polls, for
//           one yield can take a whole scheduler slice. With more ranks than cores (`oversubscribed`) spinning only keeps the
//           peer from running: then it begins here, and lasts 300 us, for whoever the peer waits for, such as the network's
//           threads, wants the core too.
//   sleep   50 us a poll: whoever waits this long waits for something slow, and leaves the core to it.
//
// `stopped` may make system calls; it is asked about every 20 ms of the last phase, and its yes is final: it may have used up what
// it was told, such as a signal.
template <class Ready, class Aborted, class Stopped>
Waited bounded_wait(bool oversubscribed, uint64_t timeout_ns, uint64_t& begun, Ready ready, Aborted aborted, Stopped stopped) {
    constexpr uint64_t kAskNs = 20000000;
    const uint64_t yield_ns = oversubscribed ? 300000 : 10000000;
    constexpr timespec kNap = {0, 50000};
    enum { kSpin, kYield, kSleep } phase = oversubscribed ? kYield : kSpin;
    uint32_t left = oversubscribed ? 16 : 1024;
    uint64_t asked = 0;
    for (;;) {
        if (ready()) return Waited::kReady;
        if (phase == kSpin) {
            cpu_relax();
        } else if (phase == kYield) {
            sched_yield();
        } else {
            nanosleep(&kNap, nullptr);
        }
        if (--left != 0) continue;
        if (aborted()) return ready() ? Waited::kReady : Waited::kAborted;
        const uint64_t now = now_ns();
        if (begun == 0) begun = now;
        if (now - begun >= timeout_ns) return ready() ? Waited::kReady : Waited::kExpired;
        if (phase == kSpin) phase = kYield;
        if (phase == kYield && now - begun >= yield_ns) phase = kSleep;
        left = phase == kYield ? 16 : 1;
        if (phase == kSleep && now - asked >= kAskNs) {
            asked = now;
            if (stopped()) return Waited::kStopped;
        }
    }
}

}  // namespace commplane_car
