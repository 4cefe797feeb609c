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

// T: dtype; N: bound of the ranks, for unrolling. One vector of a thread is under way while the next is loaded and sent: more of
// them cost registers, and two blocks on a multiprocessor hide more than a longer queue in each does.
template <class T, int N, class B>
CAR_FN void one_shot_push(const B& b, const Group& g, const void* in, void* out, uint64_t count, bool aligned) {
    Session<B> s(g, b);
    const uint32_t rank = g.rank, n = g.ranks;
    const uint64_t vecs = (count + T::kPerVec - 1) / T::kPerVec;
    const uint64_t stride = uint64_t(b.blocks()) * b.threads();
    const uint64_t first = uint64_t(b.block()) * b.threads() + b.thread();
    Vec *to[N], *from[N];
    CAR_UNROLL
    for (int r = 0; r < N; ++r) {
        const uint32_t peer = r != int(rank) && r < int(n) ? r : rank == 0;  // an address that exists
        to[r] = ready(s.lamport(peer, rank) + b.thread());
        from[r] = ready(s.lamport(rank, peer) + b.thread());
    }
    s.begin();
    if (b.thread() >= b.threads()) return s.control(b.thread() - b.threads(), 0);

    const auto send = [&](uint64_t v, uint32_t at) {
        Vec mine = {{0, 0, 0, 0}};
        if (v < vecs) {
            mine = load_some<T>(in, v * T::kPerVec, count, aligned);
            const Vec sent = without_empty(mine);
            CAR_UNROLL
            for (int r = 0; r < N; ++r) {
                if (r != int(rank) && r < int(n)) store_shared(to[r] + at, sent);
            }
        }
        return mine;
    };

    uint32_t at = s.odd();
    Vec mine = send(first, at);
    b.heard();
    for (uint64_t v = first; v < vecs; v += stride, at += b.threads()) {
        const Vec next = send(v + stride, at + b.threads());
        Vec got[N];
        CAR_UNROLL
        for (int r = 0; r < N; ++r) {
            if (r == int(rank)) got[r] = mine;
            else if (r < int(n)) got[r] = load_shared(from[r] + at);
        }
        CAR_UNROLL
        for (int r = 0; r < N; ++r) {
            if (r != int(rank) && r < int(n)) {
                Patience patience;
                while (has_empty(got[r]) && s.wait_on(patience, r)) got[r] = load_shared(from[r] + at);
                const Vec empty = {{kEmpty, kEmpty, kEmpty, kEmpty}};
                store(from[r] + at, empty);
            }
        }
        store_some<T>(out, v * T::kPerVec, count, aligned, sum<T, N>(got, n));
        mine = next;
    }
}

}  // namespace gpu
}  // namespace car
