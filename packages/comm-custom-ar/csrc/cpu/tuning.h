// SPDX-License-Identifier: Apache-2.0
// The numbers that decide which algorithm runs: data, each with the measurement that it comes from. All of them are functions of
// what every rank knows to be equal; that includes the maker of the CPU, for a group lies on one host.
//
// Measured with csrc/benchmarks/algorithms.cc (`cmake --build BUILD --target algorithms`; us a call, float32 unless said otherwise) on two machines:
//   A  16 cores of an Intel Xeon (Sapphire Rapids class, 2 MiB of L2 a core, 300 MiB of L3), one rank a core
//   B  2 cores of an AMD EPYC (Zen 5, 1 MiB of L2 a core, 32 MiB of L3)
#pragma once

#include <stdint.h>

namespace commplane_car {

// What won on A and lost on B holds for CPUs of Intel alone.
inline bool is_intel() {
#if defined(__x86_64__)
    static const bool answer = (__builtin_cpu_init(), __builtin_cpu_is("intel") != 0);
    return answer;
#else
    return false;
#endif
}

// Symmetric messages up to this many bytes go through the staging slots: the copy costs less than a second hop.
constexpr uint64_t kTinyBytes = 2048;

// Staged one-shot messages up to this many bytes ask for the cache lines of the next call's slot while they wait for the peers'
// data. A, 2 ranks: 2 KiB 0.95 -> 0.77, 4 KiB 1.63 -> 1.25, 8 KiB 2.55 -> 2.26, but 32 KiB 4.8 -> 6.8.
// B: 4 KiB 0.28 -> 0.38, 8 KiB 0.37 -> 0.60.
inline uint64_t claim_bytes() { return is_intel() ? 8192 : 0; }

// Staged all-reduces from this many bytes on are two-shot. One-shot against two-shot:
//   A, 2 ranks   64 KiB 9.4/11.3, 1 MiB 151/174, 64 MiB 13494/14295: never; but bfloat16, which is bound by arithmetic,
//                32 KiB 7.3/8.6, 64 KiB 14.0/12.1, 1 MiB 216/179, 16 MiB 4553/3718
//   B, 2 ranks   64 KiB 2.7/3.9, 1 MiB 112/184, bfloat16 1 MiB 99/156: never
//   A, 3 ranks   32 KiB 7.4/10.9, 64 KiB 14.1/13.5, 1 MiB 233/204
//   A, 4 ranks   4 KiB 2.4/2.6, 8 KiB 4.1/4.0, 32 KiB 19.6/11.3, 1 MiB 363/234
//   A, 8 ranks   1 KiB 1.6/1.8, 2 KiB 2.5/2.1, 8 KiB 7.9/4.4, 1 MiB 1163/274 (5 to 7 ranks: between the two)
//   A, 4 ranks on 2 cores   16 KiB 10.2/11.8, 32 KiB 16.8/15.5, 1 MiB 546/415: every hop costs a turn of the scheduler
constexpr uint64_t two_shot_from(uint32_t world, uint64_t element_bytes, bool oversubscribed, bool intel) {
    if (world == 2) return element_bytes == 2 && intel ? 65536 : UINT64_MAX;
    if (world == 3) return 65536;
    if (oversubscribed) return 32768;
    return world == 4 ? 8192 : world < 8 ? 4096 : 2048;
}

// Messages of this size go by single copy where every rank may read the others' memory. Staged against single copy:
//   A, 2 ranks   1 MiB 165/226, 2 MiB 375/359, 4 MiB 745/584, 16 MiB 3034/2433, 64 MiB 13494/16263
//   A, 4 ranks   4 MiB 991/1017, 16 MiB 4079/4399: never
//   B, 2 ranks   1 MiB 112/268, 4 MiB 461/964, 64 MiB 8139/17177: never
struct SizeRange {
    uint64_t min_bytes;
    uint64_t max_bytes;  // 0: never
};
inline SizeRange single_copy_range(uint32_t world) {
    return world == 2 && is_intel() ? SizeRange{UINT64_C(2) << 20, UINT64_C(32) << 20} : SizeRange{0, 0};
}

}  // namespace commplane_car
