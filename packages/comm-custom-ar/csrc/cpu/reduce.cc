// SPDX-License-Identifier: Apache-2.0
#include "reduce.h"

#include <string.h>

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#include <xmmintrin.h>
#endif

#include "commplane_car.h"
#include "error.h"

namespace commplane_car {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1) != 0;  // bit 29: F16C
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1) != 0;
}
#endif

// Null if the CPU or the build lacks it. An unknown name is null too.
const ReduceTable* find(const char* name) {
    if (strcmp(name, "baseline") == 0) return &kReduceBaseline;
#if defined(__x86_64__)
    const bool best = strcmp(name, "auto") == 0;
    if ((best || strcmp(name, "avx512_bf16") == 0) && has_avx512_bf16()) return &kReduceAvx512Bf16;
    if ((best || strcmp(name, "avx512") == 0) && has_avx512()) return &kReduceAvx512;
    if ((best || strcmp(name, "avx2") == 0) && has_avx2()) return &kReduceAvx2;
    if (best) return &kReduceBaseline;
#else
    if (strcmp(name, "auto") == 0) return &kReduceBaseline;
#endif
    return nullptr;
}

std::atomic<const ReduceTable*> table_in_use{find("auto")};

}  // namespace

const ReduceTable& reduce_table() { return *table_in_use.load(std::memory_order_relaxed); }

int set_isa(const char* name) {
    const ReduceTable* table = name == nullptr ? nullptr : find(name);
    if (table == nullptr) {
        return fail(COMMPLANE_CAR_EUNSUPPORTED, "instruction set '%.32s' is unknown or not in this CPU; wanted baseline, avx2, "
                    "avx512, avx512_bf16 or auto", name == nullptr ? "" : name);
    }
    table_in_use.store(table, std::memory_order_relaxed);
    return COMMPLANE_CAR_OK;
}

#if defined(__x86_64__)
namespace {
constexpr unsigned kNotDefault = 0xe040;  // MXCSR: flush to zero, rounding control, denormals are zero
}
DefaultRounding::DefaultRounding() : saved_(_mm_getcsr()), changed_((saved_ & kNotDefault) != 0) {
    if (changed_) _mm_setcsr(static_cast<unsigned>(saved_) & ~kNotDefault);
}
DefaultRounding::~DefaultRounding() {
    if (changed_) _mm_setcsr(static_cast<unsigned>(saved_));
}
#elif defined(__aarch64__)
namespace {
constexpr uint64_t kNotDefault = UINT64_C(0x7c80000);  // FPCR: AHP, DN, FZ, RMode, FZ16
}
DefaultRounding::DefaultRounding() : saved_(0), changed_(false) {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    changed_ = (saved_ & kNotDefault) != 0;
    if (changed_) asm volatile("msr fpcr, %0" ::"r"(saved_ & ~kNotDefault) : "memory");
}
DefaultRounding::~DefaultRounding() {
    if (changed_) asm volatile("msr fpcr, %0" ::"r"(saved_) : "memory");
}
#else
DefaultRounding::DefaultRounding() : saved_(0), changed_(false) {}
DefaultRounding::~DefaultRounding() {}
#endif

}  // namespace commplane_car
