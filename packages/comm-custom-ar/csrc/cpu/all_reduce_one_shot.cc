// SPDX-License-Identifier: Apache-2.0
// Pipelined one-shot all-reduce through the staging slots: a rank copies its input into its own slot, and reduces all slots
// (its own input is read where it is) into `out`.
//
// In place is safe: drain i writes chunk i of `out` only, and chunk i of `in` has been copied and read by then; the peers
// never read `in`.
#include <string.h>

#include "collective.h"
#include "pipeline.h"
#include "tuning.h"

namespace commplane_car {
namespace {

// The peers have read the slot of the next call long ago, but their caches still hold its lines.
void claim(unsigned char* slot, uint64_t bytes) {
    for (uint64_t at = 0; at < bytes; at += 64) {
#if defined(__x86_64__)  // the builtin would ask for a shared line; every x86-64 takes the instruction, some do nothing
        asm volatile("prefetchw %0" : : "m"(slot[at]));
#else
        __builtin_prefetch(slot + at, 1);
#endif
    }
}

}  // namespace

int all_reduce_one_shot(Comm& comm, const Call& call) {
    const uint64_t total = call.count * call.element_bytes;
    const uint64_t chunk = comm.slot_bytes;  // a multiple of 64, hence of the element
    return pipelined(
        comm, call.descriptor, total <= chunk ? 1 : ceil_div(total, chunk),
        [&](uint64_t i, unsigned char* to) {
            const uint64_t bytes = smaller(total - i * chunk, chunk);
            if (bytes != 0) memcpy(to, call.in + i * chunk, bytes);
        },
        [&](uint64_t i, uint64_t step) {
            const uint64_t at = i * chunk, bytes = smaller(total - at, chunk);
            const void* from[COMMPLANE_CAR_MAX_WORLD];
            for (uint32_t rank = 0; rank < comm.world; ++rank) from[rank] = slot(comm, rank, step);
            from[comm.rank] = call.in + at;
            void* to = call.out + at;
            if (total <= claim_bytes()) claim(slot(comm, comm.rank, step + 1), bytes);
            call.reduce(&to, 1, from, comm.world, bytes / call.element_bytes);
        });
}

}  // namespace commplane_car
