// SPDX-License-Identifier: Apache-2.0
//
// All-reduce through tiles, for messages of any size. In place is safe: what is written was read by the same block before.
//
// One-shot: each rank sends all of it to every peer. Two-shot: rank c adds up part c of each tile and sends the sum to all, which
// is 2 (n - 1) / n of the message a rank and one hop more.
#pragma once

#include "tiles.h"

namespace car {
namespace gpu {

// U: vectors that a thread loads before it stores them.
template <class T, int N, int U, class B>
CAR_FN void one_shot_tiled(const B& b, const Group& g, const void* in, void* out, uint64_t count, bool aligned) {
    Session<B> s(g, b);
    s.begin();
    const uint32_t rank = g.rank, n = g.ranks, width = g.layout.tile_vecs, step = b.threads() * U;
    const uint64_t vecs = (count + T::kPerVec - 1) / T::kPerVec;
    const Tiles tiles = deal(b, vecs, width);

    exchange_tiles(
        s, tiles.mine,
        [&](uint32_t t) {
            const uint64_t from = tiles.number(t) * width;
            Vec* to[N];
            CAR_UNROLL
            for (int r = 0; r < N; ++r) to[r] = s.tile(r < int(n) ? r : rank, rank, s.tiles + t);
            for (uint32_t i = b.thread(); i < width && from + i < vecs; i += step) {
                Vec v[U];
                CAR_UNROLL
                for (int u = 0; u < U; ++u) {
                    const uint32_t j = i + u * b.threads();
                    if (j < width && from + j < vecs) v[u] = load_some<T>(in, (from + j) * T::kPerVec, count, aligned);
                }
                CAR_UNROLL
                for (int u = 0; u < U; ++u) {
                    const uint32_t j = i + u * b.threads();
                    if (j < width && from + j < vecs) {
                        CAR_UNROLL
                        for (int r = 0; r < N; ++r) {
                            if (r != int(rank) && r < int(n)) store_shared(to[r] + j, v[u]);
                        }
                    }
                }
            }
        },
        [&](uint32_t t) {
            const uint64_t from = tiles.number(t) * width;
            const Vec* at[N];
            CAR_UNROLL
            for (int r = 0; r < N; ++r) at[r] = s.tile(rank, r < int(n) ? r : rank, s.tiles + t);
            for (uint32_t i = b.thread(); i < width && from + i < vecs; i += step) {
                Vec v[U][N];
                CAR_UNROLL
                for (int u = 0; u < U; ++u) {
                    const uint32_t j = i + u * b.threads();
                    if (j < width && from + j < vecs) {
                        CAR_UNROLL
                        for (int r = 0; r < N; ++r) {
                            if (r == int(rank)) v[u][r] = load_some<T>(in, (from + j) * T::kPerVec, count, aligned);
                            else if (r < int(n)) v[u][r] = load_shared(at[r] + j);
                        }
                    }
                }
                CAR_UNROLL
                for (int u = 0; u < U; ++u) {
                    const uint32_t j = i + u * b.threads();
                    if (j < width && from + j < vecs) store_some<T>(out, (from + j) * T::kPerVec, count, aligned, sum<T, N>(v[u], n));
                }
            }
        });
    s.leave(tiles.mine);
}

template <class T, int N, class B>
CAR_FN void two_shot_tiled(const B& b, const Group& g, const void* in, void* out, uint64_t count, bool aligned) {
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
