// SPDX-License-Identifier: Apache-2.0
//
// All-reduce, one-shot push: every rank sends its vectors to all peers, waits for theirs and adds. One hop and no flag: a vector
// that has arrived shows by being there (after Lamport's "single-writer" argument; the same idea is NCCL's LL and TensorRT-LLM's
// min-latency all-reduce). (n - 1) times the message leaves each rank, so it is for small messages, and for two ranks for all that fit.
#pragma once

#include "numbers.h"
#include "session.h"

namespace car {
namespace gpu {

// T: dtype; N: bound of the ranks, for unrolling; U: vectors of a thread in flight.
template <class T, int N, int U, class B>
CAR_FN void one_shot_push(const B& b, const Group& g, const void* in, void* out, uint64_t count, bool aligned) {
    Session<B> s(g, b);
    const uint32_t rank = g.rank, n = g.ranks;
    const uint64_t vecs = (count + T::kPerVec - 1) / T::kPerVec;
    const uint64_t stride = uint64_t(b.blocks()) * b.threads();
    const uint64_t first = uint64_t(b.block()) * b.threads() + b.thread();
    Vec *to[N], *from[N];
    CAR_UNROLL
    for (int r = 0; r < N; ++r) {
        to[r] = ready(s.lamport(r < int(n) ? r : rank, rank) + b.thread());
        from[r] = ready(s.lamport(rank, r < int(n) ? r : rank) + b.thread());
    }
    s.begin();
    if (b.thread() >= b.threads()) return s.control(b.thread() - b.threads(), 0);

    auto send = [&](uint64_t v, uint32_t at, Vec* mine) {
        CAR_UNROLL
        for (int u = 0; u < U; ++u) {
            if (v + u * stride < vecs) mine[u] = load_some<T>(in, (v + u * stride) * T::kPerVec, count, aligned);
        }
        CAR_UNROLL
        for (int u = 0; u < U; ++u) {
            if (v + u * stride < vecs) {
                const Vec sent = without_empty(mine[u]);
                CAR_UNROLL
                for (int r = 0; r < N; ++r) {
                    if (r != int(rank) && r < int(n)) store_shared(to[r] + at + u * b.threads(), sent);
                }
            }
        }
    };

    Vec mine[U], next[U];
    uint32_t at = s.odd();
    send(first, at, mine);
    b.heard();
    for (uint64_t v = first; v < vecs; v += U * stride, at += U * b.threads()) {
        send(v + U * stride, at + U * b.threads(), next);
        Vec got[U][N];
        CAR_UNROLL
        for (int u = 0; u < U; ++u) {
            if (v + u * stride < vecs) {
                CAR_UNROLL
                for (int r = 0; r < N; ++r) {
                    if (r == int(rank)) got[u][r] = mine[u];
                    else if (r < int(n)) got[u][r] = load_shared(from[r] + at + u * b.threads());
                }
            }
        }
        CAR_UNROLL
        for (int u = 0; u < U; ++u) {
            if (v + u * stride < vecs) {
                CAR_UNROLL
                for (int r = 0; r < N; ++r) {
                    if (r != int(rank) && r < int(n)) {
                        Vec* const slot = from[r] + at + u * b.threads();
                        Patience patience;
                        while (has_empty(got[u][r]) && s.wait_on(patience, r)) got[u][r] = load_shared(slot);
                        const Vec empty = {{kEmpty, kEmpty, kEmpty, kEmpty}};
                        store(slot, empty);
                    }
                }
                store_some<T>(out, (v + u * stride) * T::kPerVec, count, aligned, sum<T, N>(got[u], n));
            }
        }
        CAR_UNROLL
        for (int u = 0; u < U; ++u) mine[u] = next[u];
    }
}

}  // namespace gpu
}  // namespace car
