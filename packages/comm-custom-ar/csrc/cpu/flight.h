// SPDX-License-Identifier: Apache-2.0
// The flight recorder: the last calls of a communicator in a ring of this process's own memory. One writer, the thread in a
// call; any thread may read. What a call costs is two reads of the cycle counter and one cache line.
#pragma once

#include <stdint.h>

#include "commplane_car.h"
#include "descriptor.h"

#if defined(__x86_64__)
#include <x86intrin.h>
#endif

namespace commplane_car {

#ifdef COMMPLANE_CAR_NO_FLIGHT  // defined by benchmarks alone: what the recorder costs is the difference
constexpr bool kRecordFlight = false;
#else
constexpr bool kRecordFlight = true;
#endif

// A clock that is cheaper than clock_gettime, in units of its own; flight.cc turns it into nanoseconds.
uint64_t ticks_without_counter();
extern const bool kHasCounter;
inline uint64_t ticks() {
#if defined(__x86_64__)
    if (kHasCounter) [[likely]] return __rdtsc();
    return ticks_without_counter();
#elif defined(__aarch64__)
    uint64_t count;
    asm volatile("mrs %0, cntvct_el0" : "=r"(count));
    return count;
#else
    return ticks_without_counter();
#endif
}

struct alignas(64) FlightEntry {
    Word sequence;  // 0 while the rest is being written
    Word words[Descriptor::kWords];
    Word begun;
    Word ended;    // 0: running
    Word outcome;  // steps << 32 | status
};
static_assert(sizeof(FlightEntry) == 64, "one cache line a call");

class FlightRing {
  public:
    void begin(uint64_t sequence, const Descriptor& descriptor) {
        FlightEntry& entry = entries_[sequence % COMMPLANE_CAR_FLIGHT_RECORDS];
        entry.sequence.store(0, std::memory_order_relaxed);
        std::atomic_thread_fence(std::memory_order_release);
        for (int i = 0; i < Descriptor::kWords; ++i) entry.words[i].store(descriptor.words[i], std::memory_order_relaxed);
        entry.begun.store(ticks(), std::memory_order_relaxed);
        entry.ended.store(0, std::memory_order_relaxed);
        entry.sequence.store(sequence, std::memory_order_release);
    }
    void end(uint64_t sequence, int status, uint64_t steps) {
        FlightEntry& entry = entries_[sequence % COMMPLANE_CAR_FLIGHT_RECORDS];
        entry.outcome.store(steps << 32 | static_cast<uint32_t>(status), std::memory_order_relaxed);
        entry.ended.store(ticks(), std::memory_order_release);
        if (waiting_.load(std::memory_order_relaxed) != 0) waiting_.store(0, std::memory_order_relaxed);
    }
    // The ranks that the running call has waited for so long that it looks around.
    void waits_for(uint64_t mask) { waiting_.store(mask, std::memory_order_relaxed); }

    // The entries of the last calls up to number `newest`, oldest first, at most `capacity`; returns how many.
    uint64_t read(uint64_t newest, commplane_car_flight_record* records, uint64_t capacity) const;

  private:
    Word waiting_{0};
    FlightEntry entries_[COMMPLANE_CAR_FLIGHT_RECORDS];
};

}  // namespace commplane_car
