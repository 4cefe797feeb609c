// SPDX-License-Identifier: Apache-2.0
//
// All-reduce, two-shot push, through tiles, for messages of any size: rank c adds up part c of each tile and sends the sum to all.
// 2 (n - 1) / n of the message leaves each rank. In place is safe: what is written was read by the same block before.
#pragma once

#include "tiles.h"

namespace car {
namespace gpu {

template <class T, int N, class B>
CAR_FN void two_shot_push(const B& b, const Group& g, const void* in, void* out, uint64_t count, bool aligned) {
    Session<B> s(g, b);
    s.begin();
    const uint32_t rank = g.rank, n = g.ranks, width = g.layout.tile_vecs / 2;  // a tile has a place for either phase
    const uint64_t vecs = (count + T::kPerVec - 1) / T::kPerVec;
    const Tiles tiles = deal(b, vecs, width * n);
    const auto part = [&](uint32_t t, uint32_t c) { return tiles.number(t) * width * n + uint64_t(c) * width; };

    exchange_twice(
        s, tiles.mine,
        [&](uint32_t t) {
            CAR_UNROLL
            for (int c = 0; c < N; ++c) {
                if (c == int(rank) || c >= int(n)) continue;
                Vec* const to = s.tile(c, rank, s.tiles + t);
                const uint64_t from = part(t, c);
                for (uint32_t i = b.thread(); i < width && from + i < vecs; i += b.threads()) {
                    store_shared(to + i, load_some<T>(in, (from + i) * T::kPerVec, count, aligned));
                }
            }
        },
        [&](uint32_t t) {
            const uint64_t from = part(t, rank);
            for (uint32_t i = b.thread(); i < width && from + i < vecs; i += b.threads()) {
                Vec v[N];
                CAR_UNROLL
                for (int r = 0; r < N; ++r) {
                    if (r == int(rank)) v[r] = load_some<T>(in, (from + i) * T::kPerVec, count, aligned);
                    else if (r < int(n)) v[r] = load_shared(s.tile(rank, r, s.tiles + t) + i);
                }
                const Vec total = sum<T, N>(v, n);
                store_some<T>(out, (from + i) * T::kPerVec, count, aligned, total);
                CAR_UNROLL
                for (int r = 0; r < N; ++r) {
                    if (r != int(rank) && r < int(n)) store_shared(s.tile(r, rank, s.tiles + t) + width + i, total);
                }
            }
        },
        [&](uint32_t t) {
            CAR_UNROLL
            for (int c = 0; c < N; ++c) {
                if (c == int(rank) || c >= int(n)) continue;
                const Vec* const at = s.tile(rank, c, s.tiles + t) + width;
                const uint64_t from = part(t, c);
                for (uint32_t i = b.thread(); i < width && from + i < vecs; i += b.threads()) {
                    store_some<T>(out, (from + i) * T::kPerVec, count, aligned, load_shared(at + i));
                }
            }
        });
    s.leave(tiles.mine);
}

}  // namespace gpu
}  // namespace car
