// SPDX-License-Identifier: Apache-2.0
//
// All-reduce, one-shot push of messages of any size, for few ranks. Half of a block's threads send, tile after tile, into a ring in
// the memory of the peers' block, and never wait for data: the link is busy all the time. The other half adds up what arrives.
//
// The ring's slots are Lamport slots: a vector that is not kEmpty has arrived. Who has read a tile empties it and then raises its
// flag; who sends tile t has seen the flags of tile t - (tiles of the ring). Flags count over calls and are never reset. The slots
// are no other algorithm's.
#pragma once

#include "numbers.h"
#include "session.h"
#include "tiles.h"

namespace car {
namespace gpu {

// U: vectors of a thread in a tile, at most.
template <class T, int N, int U, class B>
CAR_FN void one_shot_ring(const B& b, const Group& g, const void* in, void* out, uint64_t count, bool aligned) {
    Session<B> s(g, b);
    const uint32_t rank = g.rank, n = g.ranks, half = b.threads() / 2, width = g.layout.ring_vecs, depth = g.layout.ring_tiles;
    const uint64_t vecs = (count + T::kPerVec - 1) / T::kPerVec;
    const Tiles tiles = deal(b, vecs, width);
    const bool sends = b.thread() < half;
    const uint32_t me = sends ? b.thread() : b.thread() - half;
    uint32_t* const loaded = b.shared_word();
    if (b.thread() == 0) *loaded = 0;
    b.sync();
    s.begin();
    s.enter();

    if (sends) {
        Vec v[U];
        const auto load_tile = [&](uint32_t t) {
            const uint64_t from = tiles.number(t) * width + me;
            CAR_UNROLL
            for (int u = 0; u < U; ++u) {
                const uint32_t i = me + u * half;
                if (i < width && from + u * half < vecs) v[u] = load_some<T>(in, (from + u * half) * T::kPerVec, count, aligned);
            }
        };
        if (tiles.mine > 0) load_tile(0);
        for (uint32_t t = 0; t < tiles.mine; ++t) {
            if (me < n && me != rank) {
                uint32_t* const flag = s.flag(rank, me, 2);
                Patience patience;
                while (int32_t(load_acquire(flag) - (s.rings + t + 1 - depth)) < 0 && s.wait_on(patience, me)) {
                }
            }
            if (b.any_of_half(0, s.failed)) break;
            if (me == 0) store_local(loaded, t + 1);
            const uint64_t from = tiles.number(t) * width + me;
            CAR_UNROLL
            for (int u = 0; u < U; ++u) {
                const uint32_t i = me + u * half;
                if (i < width && from + u * half < vecs) {
                    const Vec sent = without_empty(v[u]);
                    CAR_UNROLL
                    for (int r = 0; r < N; ++r) {
                        if (r != int(rank) && r < int(n)) store_shared(s.ring(r, rank, t) + i, sent);
                    }
                }
            }
            if (t + 1 < tiles.mine) load_tile(t + 1);
        }
    } else {
        for (uint32_t t = 0; t < tiles.mine; ++t) {
            // In place, this half writes over what the other one has yet to read.
            Patience idle;
            while (load_local(loaded) < t + 1 && s.wait_on(idle, rank)) {
            }
            const uint64_t from = tiles.number(t) * width + me;
            Vec got[U][N];
            CAR_UNROLL
            for (int u = 0; u < U; ++u) {
                const uint32_t i = me + u * half;
                if (i < width && from + u * half < vecs) {
                    CAR_UNROLL
                    for (int r = 0; r < N; ++r) {
                        if (r == int(rank)) got[u][r] = load_some<T>(in, (from + u * half) * T::kPerVec, count, aligned);
                        else if (r < int(n)) got[u][r] = load_shared(s.ring(rank, r, t) + i);
                    }
                }
            }
            CAR_UNROLL
            for (int u = 0; u < U; ++u) {
                const uint32_t i = me + u * half;
                if (i < width && from + u * half < vecs) {
                    CAR_UNROLL
                    for (int r = 0; r < N; ++r) {
                        if (r != int(rank) && r < int(n)) {
                            Vec* const slot = s.ring(rank, r, t) + i;
                            Patience patience;
                            while (has_empty(got[u][r]) && s.wait_on(patience, r)) got[u][r] = load_shared(slot);
                            const Vec empty = {{kEmpty, kEmpty, kEmpty, kEmpty}};
                            store(slot, empty);
                        }
                    }
                    store_some<T>(out, (from + u * half) * T::kPerVec, count, aligned, sum<T, N>(got[u], n));
                }
            }
            if (b.any_of_half(1, s.failed)) break;
            if (me < n && me != rank) store_release(s.flag(me, rank, 2), s.rings + t + 1);
        }
    }
    b.sync();
    s.agree();
    s.leave(0, tiles.mine);
}

}  // namespace gpu
}  // namespace car
