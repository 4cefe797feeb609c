// SPDX-License-Identifier: Apache-2.0
//
// All-reduce of tensors that every rank can read: nothing is staged. `row` has the address of each rank's tensor.
//
// One-shot: read all, write the sum to an own tensor. Two-shot: in place; rank c reads part c of all, and writes the sum to all.
// A block waits for the peers' blocks of its number: their tensor is then ready, since a kernel runs after what made it; and
// again at the end: then nobody reads the own tensor any more, and what others write to it is there.
#pragma once

#include "tiles.h"

namespace car {
namespace gpu {

template <class T, int N, int U, class B>
CAR_FN void one_shot_pull(const B& b, const Group& g, const void* const* row, void* out, uint64_t count) {
    Session<B> s(g, b);
    s.begin();
    const uint32_t n = g.ranks;
    const uint64_t vecs = (count + T::kPerVec - 1) / T::kPerVec;
    const uint64_t stride = uint64_t(b.blocks()) * b.threads();
    const void* of[N];
    CAR_UNROLL
    for (int r = 0; r < N; ++r) of[r] = row[r < int(n) ? r : 0];
    s.enter();
    raise(s, s.tiles + 1);
    if (await(s, s.tiles + 1)) {
        for (uint64_t v = uint64_t(b.block()) * b.threads() + b.thread(); v < vecs; v += U * stride) {
            Vec got[U][N];
            CAR_UNROLL
            for (int u = 0; u < U; ++u) {
                if (v + u * stride < vecs) {
                    CAR_UNROLL
                    for (int r = 0; r < N; ++r) {
                        if (r < int(n)) got[u][r] = load_some<T>(of[r], (v + u * stride) * T::kPerVec, count, true);
                    }
                }
            }
            CAR_UNROLL
            for (int u = 0; u < U; ++u) {
                if (v + u * stride < vecs) store_some<T>(out, (v + u * stride) * T::kPerVec, count, true, sum<T, N>(got[u], n));
            }
        }
        s.b.sync();
        raise(s, s.tiles + 2);
        await(s, s.tiles + 2);
        s.agree();
    }
    s.leave(2);
}

template <class T, int N, int U, class B>
CAR_FN void two_shot_pull(const B& b, const Group& g, void* const* row, uint64_t count) {
    Session<B> s(g, b);
    s.begin();
    const uint32_t rank = g.rank, n = g.ranks;
    const uint64_t vecs = (count + T::kPerVec - 1) / T::kPerVec;
    const uint64_t part = (vecs + n - 1) / n;
    const uint64_t stop = (rank + 1) * part < vecs ? (rank + 1) * part : vecs;
    const uint64_t stride = uint64_t(b.blocks()) * b.threads();
    void* of[N];
    CAR_UNROLL
    for (int r = 0; r < N; ++r) of[r] = row[r < int(n) ? r : 0];
    s.enter();
    raise(s, s.tiles + 1);
    if (await(s, s.tiles + 1)) {
        for (uint64_t v = rank * part + uint64_t(b.block()) * b.threads() + b.thread(); v < stop; v += U * stride) {
            Vec got[U][N];
            CAR_UNROLL
            for (int u = 0; u < U; ++u) {
                if (v + u * stride < stop) {
                    CAR_UNROLL
                    for (int r = 0; r < N; ++r) {
                        if (r < int(n)) got[u][r] = load_some<T>(of[r], (v + u * stride) * T::kPerVec, count, true);
                    }
                }
            }
            CAR_UNROLL
            for (int u = 0; u < U; ++u) {
                if (v + u * stride < stop) {
                    const Vec total = sum<T, N>(got[u], n);
                    CAR_UNROLL
                    for (int r = 0; r < N; ++r) {
                        if (r < int(n)) store_some<T>(of[r], (v + u * stride) * T::kPerVec, count, true, total);
                    }
                }
            }
        }
        s.b.sync();
        raise(s, s.tiles + 2);
        await(s, s.tiles + 2);
        s.agree();
    }
    s.leave(2);
}

}  // namespace gpu
}  // namespace car
