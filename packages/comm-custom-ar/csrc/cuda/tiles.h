// SPDX-License-Identifier: Apache-2.0
//
// Messages of any size through a ring of tiles: a block fills a tile of its peers' memory, raises a flag, and reads what the
// peers have put into its own. Data moves as it is, without an empty value, so every dtype passes bit by bit.
//
// Flags count tiles and are never reset. A block raises its flag of tile t after it has read all of tile t - 2; whoever has seen flag
// t - 2 of a peer therefore knows that the peer has done with tile t - 4, whose slot tile t takes: a ring of four needs no
// acknowledgements. This holds over the ends of calls too, because every call waits for all flags of its last tile, and for ranks that only receive: they
// raise their flags for empty tiles.
#pragma once

#include "numbers.h"
#include "session.h"

namespace car {
namespace gpu {

// Everything this block wrote before is visible to whoever sees the flag. The block meets in front of it.
template <class B>
CAR_FN void raise(Session<B>& s, uint32_t value) {
    const uint32_t r = s.b.thread();
    if (r < s.g.ranks && r != s.g.rank) store_release(s.flag(r, s.g.rank), value);
}

// Wait until all peers have raised their flags to `value`; false after a fault, for all threads alike.
template <class B>
CAR_FN bool await(Session<B>& s, uint32_t value) {
    const uint32_t r = s.b.thread();
    if (r < s.g.ranks && r != s.g.rank) {
        uint32_t* const at = s.flag(s.g.rank, r);
        Patience patience;
        while (int32_t(load_acquire(at) - value) < 0 && s.wait_on(patience, r)) {
        }
    }
    return !s.b.any(s.failed);
}

// The tiles of a block: `tile` is the t-th one's number in the message.
struct Tiles {
    uint32_t mine;   // how many this block has
    uint64_t first;  // number of its first one
    uint32_t stride;
    CAR_FN uint64_t number(uint32_t t) const { return first + uint64_t(t) * stride; }
};

// `vecs` vectors in tiles of `per_tile`, dealt out to the blocks in turn.
template <class B>
CAR_FN Tiles deal(const B& b, uint64_t vecs, uint32_t per_tile) {
    const uint64_t all = (vecs + per_tile - 1) / per_tile;
    const uint64_t mine = all > b.block() ? (all - b.block() + b.blocks() - 1) / b.blocks() : 0;
    return {uint32_t(mine), b.block(), b.blocks()};
}

// send(t) fills tile t of the peers, take(t) reads the own one after all have.
template <class B, class Send, class Take>
CAR_FN void exchange_tiles(Session<B>& s, uint32_t count, Send send, Take take) {
    s.enter();
    for (uint32_t t = 0; t <= count; ++t) {
        if (t < count) {
            send(t);
            s.b.sync();
            raise(s, s.tiles + t + 1);
        }
        if (t > 0) {
            if (!await(s, s.tiles + t)) return;
            take(t - 1);
        }
    }
    s.agree();
}

}  // namespace gpu
}  // namespace car
