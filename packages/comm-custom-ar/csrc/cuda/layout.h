// SPDX-License-Identifier: Apache-2.0
//
// What host and device share: where things lie in a rank's memory, and what a kernel is told.
#pragma once

#include <stdint.h>

#include "control.h"

namespace car {
namespace gpu {

struct alignas(16) Vec {
    uint32_t w[4];
};

constexpr uint32_t kEmpty = 0xffffffffu;
constexpr int kRing = 4;  // tiles of one source in flight: two that are read, two that are written (see tiles.h)

struct BlockState {
    uint32_t calls;
    uint32_t tiles;
    uint32_t reserved[2];
    uint32_t busy;  // 1 while a kernel is in this block's part: a second one would mix with it
    uint32_t stop;  // some thread of this block has seen that waiting is in vain
    uint32_t pad[26];
};

// Of a rank's memory; equal on all ranks. Counts are vectors of 16 bytes, offsets bytes.
struct Layout {
    uint32_t blocks;
    uint32_t lamport_vecs;  // of one source, for one call of a block
    uint32_t tile_vecs;     // of one source and one tile
    uint32_t ranks;
    uint64_t mailbox;  // [block][parity][source]: what the source calls
    uint64_t flags;    // [block][32] words: tiles that [source] has filled
    uint64_t lamport;  // [block][parity][peer][lamport_vecs]: a rank has no slot for itself
    uint64_t tiles;    // [block][ring][source][tile_vecs]
    uint64_t total;
};

struct Group {
    unsigned char* memory[kMaxRanks];
    BlockState* state;
    Control* control;
    Layout layout;
    uint32_t rank;
    uint32_t ranks;
    uint64_t timeout_ns;
    uint32_t call[kCallWords];  // what is called: equal on all ranks, never kEmpty
};

struct Norm {
    const void* residual;
    const void* weight;
    void* norm_out;
    void* residual_out;
    uint64_t rows;
    uint32_t hidden;
    float eps;
    float weight_bias;
};

}  // namespace gpu
}  // namespace car
