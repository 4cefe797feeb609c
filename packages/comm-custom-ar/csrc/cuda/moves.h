// SPDX-License-Identifier: Apache-2.0
//
// All-gather, reduce-scatter and broadcast through tiles, and the barrier, which is the words about a call alone.
#pragma once

#include "tiles.h"

namespace car {
namespace gpu {

// Any dtype: 16 bytes that are only moved.
struct Bytes {
    static constexpr int kPerVec = 16;
    typedef uint8_t Raw;
};

// `count` bytes of each rank, to out[rank * count].
template <class B>
CAR_FN void all_gather(const B& b, const Group& g, const void* in, void* out, uint64_t count, bool aligned) {
    Session<B> s(g, b);
    s.begin();
    const uint32_t width = g.layout.tile_vecs;
    const uint64_t vecs = (count + 15) / 16;
    const bool even = aligned && count % 16 == 0;
    const Tiles tiles = deal(b, vecs, width);
    unsigned char* const to = static_cast<unsigned char*>(out);
    exchange_tiles(
        s, tiles.mine,
        [&](uint32_t t) {
            const uint64_t from = tiles.number(t) * width;
            for (uint32_t i = b.thread(); i < width && from + i < vecs; i += b.threads()) {
                const Vec v = load_some<Bytes>(in, (from + i) * 16, count, aligned);
                for (uint32_t r = 0; r < g.ranks; ++r) {
                    if (r != g.rank) store_shared(s.tile(r, g.rank, s.tiles + t) + i, v);
                }
                store_some<Bytes>(to + g.rank * count, (from + i) * 16, count, even, v);
            }
        },
        [&](uint32_t t) {
            const uint64_t from = tiles.number(t) * width;
            for (uint32_t i = b.thread(); i < width && from + i < vecs; i += b.threads()) {
                for (uint32_t r = 0; r < g.ranks; ++r) {
                    if (r == g.rank) continue;
                    store_some<Bytes>(to + r * count, (from + i) * 16, count, even, load_shared(s.tile(g.rank, r, s.tiles + t) + i));
                }
            }
        });
    s.leave(tiles.mine);
}

// Part `rank` of the sum of n parts of `count` elements.
template <class T, int N, class B>
CAR_FN void reduce_scatter(const B& b, const Group& g, const void* in, void* out, uint64_t count, bool aligned) {
    typedef typename T::Raw Raw;
    Session<B> s(g, b);
    s.begin();
    const uint32_t rank = g.rank, n = g.ranks, width = g.layout.tile_vecs;
    const uint64_t vecs = (count + T::kPerVec - 1) / T::kPerVec;
    const bool even = aligned && count % T::kPerVec == 0;
    const Tiles tiles = deal(b, vecs, width);
    const Raw* const parts = static_cast<const Raw*>(in);
    exchange_tiles(
        s, tiles.mine,
        [&](uint32_t t) {
            const uint64_t from = tiles.number(t) * width;
            for (uint32_t c = 0; c < n; ++c) {
                if (c == rank) continue;
                Vec* const to = s.tile(c, rank, s.tiles + t);
                for (uint32_t i = b.thread(); i < width && from + i < vecs; i += b.threads()) {
                    store_shared(to + i, load_some<T>(parts + c * count, (from + i) * T::kPerVec, count, even));
                }
            }
        },
        [&](uint32_t t) {
            const uint64_t from = tiles.number(t) * width;
            for (uint32_t i = b.thread(); i < width && from + i < vecs; i += b.threads()) {
                Vec v[N];
                CAR_UNROLL
                for (int r = 0; r < N; ++r) {
                    if (r == int(rank)) v[r] = load_some<T>(parts + rank * count, (from + i) * T::kPerVec, count, even);
                    else if (r < int(n)) v[r] = load_shared(s.tile(rank, r, s.tiles + t) + i);
                }
                store_some<T>(out, (from + i) * T::kPerVec, count, aligned, sum<T, N>(v, n));
            }
        });
    s.leave(tiles.mine);
}

// `count` bytes of rank `root`, in place. The others raise flags for tiles that they do not fill, so that the root does not run ahead.
template <class B>
CAR_FN void broadcast(const B& b, const Group& g, void* data, uint64_t count, bool aligned, uint32_t root) {
    Session<B> s(g, b);
    s.begin();
    const uint32_t width = g.layout.tile_vecs;
    const uint64_t vecs = (count + 15) / 16;
    const Tiles tiles = deal(b, vecs, width);
    exchange_tiles(
        s, tiles.mine,
        [&](uint32_t t) {
            if (g.rank != root) return;
            const uint64_t from = tiles.number(t) * width;
            for (uint32_t i = b.thread(); i < width && from + i < vecs; i += b.threads()) {
                const Vec v = load_some<Bytes>(data, (from + i) * 16, count, aligned);
                for (uint32_t r = 0; r < g.ranks; ++r) {
                    if (r != root) store_shared(s.tile(r, root, s.tiles + t) + i, v);
                }
            }
        },
        [&](uint32_t t) {
            if (g.rank == root) return;
            const uint64_t from = tiles.number(t) * width;
            for (uint32_t i = b.thread(); i < width && from + i < vecs; i += b.threads()) {
                store_some<Bytes>(data, (from + i) * 16, count, aligned, load_shared(s.tile(g.rank, root, s.tiles + t) + i));
            }
        });
    s.leave(tiles.mine);
}

template <class B>
CAR_FN void barrier(const B& b, const Group& g) {
    Session<B> s(g, b);
    s.begin();
    s.enter();
    s.agree();
    s.leave(0);
}

}  // namespace gpu
}  // namespace car
