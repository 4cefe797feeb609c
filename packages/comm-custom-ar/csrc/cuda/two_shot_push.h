// SPDX-License-Identifier: Apache-2.0
//
// All-reduce, two-shot push: every rank sends each peer the vectors of that peer's part, adds up what it gets for its own, and sends
// the sums to all. Two hops and no flag: as in the one-shot push, a vector that has arrived shows by being there. 2 (n - 1) / n of
// the message leaves each rank. In place is safe: a thread has read what it writes, or the sum of it, before.
#pragma once

#include "numbers.h"
#include "session.h"

namespace car {
namespace gpu {

// T: dtype; N: bound of the ranks, for unrolling. The slots of a source hold parts in their first half and sums in the second. A
// thread has one vector of each part at a time: while it waits for one round's, the next round's are under way, and sums are
// taken a round after they were sent.
template <class T, int N, class B>
CAR_FN void two_shot_push(const B& b, const Group& g, const void* in, void* out, uint64_t count, bool aligned) {
    Session<B> s(g, b);
    const uint32_t rank = g.rank, n = g.ranks, sums = g.layout.lamport_vecs / 2;
    const uint64_t vecs = (count + T::kPerVec - 1) / T::kPerVec, part = (vecs + n - 1) / n;
    const uint64_t stride = uint64_t(b.blocks()) * b.threads();
    const uint64_t first = uint64_t(b.block()) * b.threads() + b.thread();
    // Addresses are put together where they are used: as arrays they would take the registers that hide the waits.
    const auto to = [&](uint32_t r, uint32_t at) { return s.lamport(r, rank) + b.thread() + at; };
    const auto from = [&](uint32_t r, uint32_t at) { return s.lamport(rank, r) + b.thread() + at; };
    s.begin();
    if (b.thread() >= b.threads()) return s.control(b.thread() - b.threads(), 0);

    // The last part may be shorter, or empty.
    const auto has = [&](uint32_t c, uint64_t v) { return c < n && v < part && c * part + v < vecs; };
    const auto element = [&](uint32_t c, uint64_t v) { return (c * part + v) * T::kPerVec; };
    const auto take = [&](Vec got, Vec* at, int source, bool relayed) {
        Patience patience;
        patience.relayed = relayed;
        while (has_empty(got) && s.wait_on(patience, source)) got = load_shared(at);
        const Vec empty = {{kEmpty, kEmpty, kEmpty, kEmpty}};
        store(at, empty);
        return got;
    };

    const auto send = [&](uint64_t v, uint32_t at) {
        Vec mine = {{0, 0, 0, 0}}, read[N];
        CAR_UNROLL
        for (int c = 0; c < N; ++c) {
            if (has(c, v)) read[c] = load_some<T>(in, element(c, v), count, aligned);
        }
        CAR_UNROLL
        for (int c = 0; c < N; ++c) {
            if (!has(c, v)) continue;
            if (c == int(rank)) mine = read[c];
            else store_shared(to(c, at), without_empty(read[c]));
        }
        return mine;
    };
    const auto add = [&](uint64_t v, uint32_t at, const Vec& mine) {
        if (!has(rank, v)) return;
        Vec got[N];
        CAR_UNROLL
        for (int r = 0; r < N; ++r) {
            if (r == int(rank)) got[r] = mine;
            else if (r < int(n)) got[r] = load_shared(from(r, at));
        }
        CAR_UNROLL
        for (int r = 0; r < N; ++r) {
            if (r != int(rank) && r < int(n)) got[r] = take(got[r], from(r, at), r, false);
        }
        const Vec total = without_empty(sum<T, N>(got, n));
        CAR_UNROLL
        for (int r = 0; r < N; ++r) {
            if (r != int(rank) && r < int(n)) store_shared(to(r, sums + at), total);
        }
        store_some<T>(out, element(rank, v), count, aligned, total);
    };
    const auto gather = [&](uint64_t v, uint32_t at) {
        Vec got[N];
        CAR_UNROLL
        for (int c = 0; c < N; ++c) {
            if (c != int(rank) && has(c, v)) got[c] = load_shared(from(c, sums + at));
        }
        CAR_UNROLL
        for (int c = 0; c < N; ++c) {
            if (c != int(rank) && has(c, v)) {
                store_some<T>(out, element(c, v), count, aligned, take(got[c], from(c, sums + at), c, true));
            }
        }
    };

    uint32_t at = s.odd();
    Vec mine = send(first, at);
    b.heard();
    uint64_t v = first;
    for (; v < part; v += stride, at += b.threads()) {
        const Vec next = send(v + stride, at + b.threads());
        add(v, at, mine);
        if (v != first) gather(v - stride, at - b.threads());
        mine = next;
    }
    if (v != first) gather(v - stride, at - b.threads());
}

}  // namespace gpu
}  // namespace car
