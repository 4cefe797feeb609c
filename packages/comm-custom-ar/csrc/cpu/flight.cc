// SPDX-License-Identifier: Apache-2.0
#include "flight.h"

#include "wait.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace commplane_car {
namespace {

bool has_steady_counter() {
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(0x80000007, &a, &b, &c, &d) != 0 && (d >> 8 & 1) != 0;  // invariant TSC
#else
    return true;
#endif
}

struct Pair {
    uint64_t ticks;
    uint64_t ns;
};

Pair now_pair() {
    const uint64_t before = ticks(), ns = now_ns(), after = ticks();
    return {before + (after - before) / 2, ns};
}

}  // namespace

const bool kHasCounter = has_steady_counter();

uint64_t ticks_without_counter() { return now_ns(); }

namespace {

const Pair loaded = now_pair();  // after kHasCounter: same file, in order

// Nanoseconds of CLOCK_MONOTONIC from ticks, by the line through two moments at least 10 ms apart.
class Calibration {
  public:
    Calibration() : now_(now_pair()) {
        while (now_.ns - loaded.ns < 10000000) now_ = now_pair();
        ns_per_tick_ = static_cast<double>(now_.ns - loaded.ns) / static_cast<double>(now_.ticks - loaded.ticks);
    }
    uint64_t ns(uint64_t ticks) const {
        const double ago = (static_cast<double>(now_.ticks) - static_cast<double>(ticks)) * ns_per_tick_;
        return now_.ns - static_cast<uint64_t>(ago > 0 ? ago : 0);
    }

  private:
    Pair now_;
    double ns_per_tick_;
};

}  // namespace

uint64_t FlightRing::read(uint64_t newest, commplane_car_flight_record* records, uint64_t capacity) const {
    const Calibration clock;
    uint64_t most = capacity < COMMPLANE_CAR_FLIGHT_RECORDS ? capacity : COMMPLANE_CAR_FLIGHT_RECORDS;
    if (most > newest) most = newest;
    uint64_t found = 0;
    for (uint64_t sequence = newest - most + 1; sequence <= newest; ++sequence) {
        const FlightEntry& entry = entries_[sequence % COMMPLANE_CAR_FLIGHT_RECORDS];
        if (entry.sequence.load(std::memory_order_acquire) != sequence) continue;
        Descriptor descriptor;
        for (int i = 0; i < Descriptor::kWords; ++i) descriptor.words[i] = entry.words[i].load(std::memory_order_relaxed);
        const uint64_t begun = entry.begun.load(std::memory_order_relaxed);
        const uint64_t ended = entry.ended.load(std::memory_order_acquire);
        const uint64_t outcome = entry.outcome.load(std::memory_order_relaxed);
        std::atomic_thread_fence(std::memory_order_acquire);
        if (entry.sequence.load(std::memory_order_relaxed) != sequence) continue;  // overwritten meanwhile
        commplane_car_flight_record& out = records[found++];
        out = {};
        out.sequence = sequence;
        out.call = decode(descriptor);
        out.begun_ns = clock.ns(begun);
        out.status = 1;
        if (ended != 0) {
            out.status = static_cast<int32_t>(outcome & 0xffffffff);
            out.steps = static_cast<uint32_t>(outcome >> 32);
            out.ended_ns = clock.ns(ended);
        } else {
            out.waiting_mask = waiting_.load(std::memory_order_relaxed);
        }
    }
    return found;
}

}  // namespace commplane_car
