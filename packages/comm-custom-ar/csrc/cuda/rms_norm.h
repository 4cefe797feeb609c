// SPDX-License-Identifier: Apache-2.0
//
// v = round(sum + residual) and round(v * rsqrt(mean(v^2) + eps) * (weight_bias + weight)), fused with the one-shot push that
// gives the sum, and alone for sums that came another way. The sum is rounded as an all-reduce rounds it. A block has whole rows,
// so all ranks add up the squares of a row in one order and have the same bits.
#pragma once

#include "numbers.h"
#include "session.h"

namespace car {
namespace gpu {

CAR_FN float inverse_root(float x) {
#if defined(__CUDACC__)
    return __frsqrt_rn(x);
#else
    return 1.0f / __builtin_sqrtf(x);
#endif
}

// The new residual, and its squares on top of `squares`.
template <class T>
CAR_FN Vec add_residual(const Vec& total, const Vec& residual, float& squares) {
    float a[T::kPerVec], r[T::kPerVec];
    T::widen(total, a);
    T::widen(residual, r);
    CAR_UNROLL
    for (int i = 0; i < T::kPerVec; ++i) a[i] += r[i];
    const Vec v = T::narrow(a);
    T::widen(v, a);
    CAR_UNROLL
    for (int i = 0; i < T::kPerVec; ++i) squares += a[i] * a[i];
    return v;
}

template <class T>
CAR_FN Vec scaled(const Vec& v, const Vec& weight, float inverse, float weight_bias) {
    float a[T::kPerVec], w[T::kPerVec];
    T::widen(v, a);
    T::widen(weight, w);
    CAR_UNROLL
    for (int i = 0; i < T::kPerVec; ++i) a[i] = a[i] * inverse * (weight_bias + w[i]);
    return T::narrow(a);
}

// V: vectors of a row that a thread has. All tensors are aligned and rows are whole vectors.
template <class T, int N, int V, class B>
CAR_FN void all_reduce_rms_norm(const B& b, const Group& g, const void* in, const Norm& norm) {
    typedef typename T::Raw Raw;
    Session<B> s(g, b);
    const uint32_t rank = g.rank, n = g.ranks, row_vecs = norm.hidden / T::kPerVec;
    const Raw* const from = static_cast<const Raw*>(in);
    const Raw* const residual = static_cast<const Raw*>(norm.residual);
    const Raw* const weight = static_cast<const Raw*>(norm.weight);

    Vec *to[N], *arrived[N];
    CAR_UNROLL
    for (int r = 0; r < N; ++r) {
        const uint32_t peer = r != int(rank) && r < int(n) ? r : rank == 0;  // an address that exists
        to[r] = ready(s.lamport(peer, rank));
        arrived[r] = ready(s.lamport(rank, peer));
    }
    s.begin();
    if (b.thread() >= b.threads()) return s.control(b.thread() - b.threads(), 0);

    auto send = [&](uint64_t row, uint32_t at, Vec* mine) {
        if (row >= norm.rows) return;
        CAR_UNROLL
        for (int u = 0; u < V; ++u) {
            const uint32_t i = b.thread() + u * b.threads();
            if (i < row_vecs) mine[u] = load(from + row * norm.hidden + i * T::kPerVec);
        }
        CAR_UNROLL
        for (int u = 0; u < V; ++u) {
            const uint32_t i = b.thread() + u * b.threads();
            if (i < row_vecs) {
                const Vec sent = without_empty(mine[u]);
                CAR_UNROLL
                for (int r = 0; r < N; ++r) {
                    if (r != int(rank) && r < int(n)) store_shared(to[r] + at + i, sent);
                }
            }
        }
    };

    Vec mine[V], next[V];
    uint32_t at = s.odd();
    send(b.block(), at, mine);
    b.heard();
    for (uint64_t row = b.block(); row < norm.rows; row += b.blocks(), at += row_vecs) {
        send(row + b.blocks(), at + row_vecs, next);
        Vec v[V];
        CAR_UNROLL
        for (int u = 0; u < V; ++u) {
            const uint32_t i = b.thread() + u * b.threads();
            if (i < row_vecs) v[u] = load(residual + row * norm.hidden + i * T::kPerVec);
        }
        float squares = 0.0f;
        CAR_UNROLL
        for (int u = 0; u < V; ++u) {
            const uint32_t i = b.thread() + u * b.threads();
            if (i < row_vecs) {
                Vec got[N];
                CAR_UNROLL
                for (int r = 0; r < N; ++r) {
                    if (r == int(rank)) got[r] = mine[u];
                    else if (r < int(n)) got[r] = load_shared(arrived[r] + at + i);
                }
                CAR_UNROLL
                for (int r = 0; r < N; ++r) {
                    if (r != int(rank) && r < int(n)) {
                        Vec* const slot = arrived[r] + at + i;
                        Patience patience;
                        while (has_empty(got[r]) && s.wait_on(patience, r)) got[r] = load_shared(slot);
                        const Vec empty = {{kEmpty, kEmpty, kEmpty, kEmpty}};
                        store(slot, empty);
                    }
                }
                v[u] = add_residual<T>(sum<T, N>(got, n), v[u], squares);
                store(static_cast<Raw*>(norm.residual_out) + row * norm.hidden + i * T::kPerVec, v[u]);
            }
        }
        const float inverse = inverse_root(b.add(squares) / float(norm.hidden) + norm.eps);
        CAR_UNROLL
        for (int u = 0; u < V; ++u) {
            const uint32_t i = b.thread() + u * b.threads();
            if (i < row_vecs) {
                const Vec w = load(weight + i * T::kPerVec);
                store(static_cast<Raw*>(norm.norm_out) + row * norm.hidden + i * T::kPerVec,
                      scaled<T>(v[u], w, inverse, norm.weight_bias));
            }
        }
        CAR_UNROLL
        for (int u = 0; u < V; ++u) mine[u] = next[u];
    }
}

// The same for sums that are in `total`, which may be `norm_out`. Local. Any hidden size and alignment.
template <class T, class B>
CAR_FN void add_rms_norm(const B& b, const void* total, const Norm& norm, bool aligned) {
    typedef typename T::Raw Raw;
    b.let_next_start();
    b.await_previous();
    const uint64_t hidden = norm.hidden;
    for (uint64_t row = b.block(); row < norm.rows; row += b.blocks()) {
        const Raw* const a = static_cast<const Raw*>(total) + row * hidden;
        const Raw* const r = static_cast<const Raw*>(norm.residual) + row * hidden;
        Raw* const to = static_cast<Raw*>(norm.residual_out) + row * hidden;
        Raw* const out = static_cast<Raw*>(norm.norm_out) + row * hidden;
        float squares = 0.0f;
        for (uint64_t i = uint64_t(b.thread()) * T::kPerVec; i < hidden; i += uint64_t(b.threads()) * T::kPerVec) {
            const Vec v = add_residual<T>(load_some<T>(a, i, hidden, aligned), load_some<T>(r, i, hidden, aligned), squares);
            store_some<T>(to, i, hidden, aligned, v);
        }
        const float inverse = inverse_root(b.add(squares) / float(norm.hidden) + norm.eps);
        for (uint64_t i = uint64_t(b.thread()) * T::kPerVec; i < hidden; i += uint64_t(b.threads()) * T::kPerVec) {
            const Vec w = load_some<T>(norm.weight, i, hidden, aligned);
            store_some<T>(out, i, hidden, aligned, scaled<T>(load_some<T>(to, i, hidden, aligned), w, inverse, norm.weight_bias));
        }
    }
}

}  // namespace gpu
}  // namespace car
