// SPDX-License-Identifier: Apache-2.0
//
// One block's part in one call: where its slots are, what it says to the same block of the other ranks, and how it waits for them.
//
// A block only ever talks to the block of the same number on the other ranks, so blocks need no order among themselves. Its state,
// a number of calls and a number of tiles, lies in device memory and not in the arguments: a replayed graph goes on where the
// last call stopped, and replays and calls mix.
//
// Lamport slots hold kEmpty wherever nothing has arrived: the data is its own flag. kEmpty is a NaN in every dtype that is summed
// (as float32, and as either half of a word), so no number is taken for it; a NaN that happens to have its bits is sent with
// others. Slots alternate with the parity of the block's calls: a rank that writes to a slot for the second time has heard from
// the peer in the call between, which the peer began after the kernel that emptied the slot had ended.
#pragma once

#include "machine.h"

namespace car {
namespace gpu {

CAR_FN bool has_empty(const Vec& v) {
    return v.w[0] == kEmpty || v.w[1] == kEmpty || v.w[2] == kEmpty || v.w[3] == kEmpty;
}

// The same numbers without the bits of kEmpty.
CAR_FN Vec without_empty(Vec v) {
    CAR_UNROLL
    for (int i = 0; i < 4; ++i) v.w[i] = v.w[i] == kEmpty ? 0xfffffffeu : v.w[i];
    return v;
}

// The rest of a wait is out of line, and takes values only: a thread that waits keeps what it knows in registers.
#if defined(__CUDACC__)
#define CAR_SLOW static __device__ __noinline__
#else
#define CAR_SLOW inline
#endif

// Each cause has a word of its own, so that threads that come here at the same time for different ones lose none.
CAR_SLOW void give_up(const Group& g, uint32_t number, uint32_t cause) {
    ControlRank& mine = g.control->rank[g.rank];
    if (cause != kStopped) {
        store_relaxed(&mine.number, number);
        for (uint32_t i = 0; i < kCallWords; ++i) store_relaxed(&mine.mine[i], g.call[i]);
    }
    store_release(&mine.causes[cause], 1);
    store_release(&g.control->stop, 1);
}

// Whether rank `r` called what is called here, by its words.
CAR_SLOW bool same_call(const Group& g, const Vec& heard, uint32_t calls, uint32_t r) {
    if (heard.w[0] == g.call[0] && heard.w[1] == g.call[1] && heard.w[2] == g.call[2] && heard.w[3] == (calls & 0x7fffffffu)) return true;
    if (load_relaxed(&g.control->stop) != 0) {  // after a fault ranks run through what they have queued, not all as far
        give_up(g, calls + 1, kStopped);
        return false;
    }
    ControlRank& mine = g.control->rank[g.rank];
    for (uint32_t i = 0; i < kCallWords; ++i) store_relaxed(&mine.theirs[r][i], heard.w[i]);
    store_relaxed(&mine.other[r], 1);
    give_up(g, calls + 1, kOtherCall);
    return false;
}

// Since when this wait lasts, or 0 if it is over in vain. `look`: at the page of control too. That is a read over PCIe, about one
// microsecond in all for each warp that asks at the same time: thousands of them would hold up the call that they wait in, and with it the peers.
CAR_SLOW uint64_t wait_slowly(const Group& g, const Vec* mail, BlockState* state, uint32_t calls, uint32_t r, uint64_t since,
                              uint64_t limit, bool look) {
    // Perhaps what is waited for will never come, because the peer does something else.
    const Vec heard = load_shared(mail);
    if (!has_empty(heard) && !same_call(g, heard, calls, r)) {
        store_relaxed(&state->stop, 1);
        return 0;
    }
    const uint64_t now = now_ns();
    if (since == 0) since = now;
    const bool stopped = load_relaxed(&state->stop) != 0 || (look && load_relaxed(&g.control->stop) != 0);
    if (!stopped && now - since < limit) return since;
    store_relaxed(&state->stop, 1);
    if (!stopped) store_relaxed(&g.control->rank[g.rank].missing[r], 1);
    give_up(g, calls + 1, stopped ? kStopped : kTimedOut);
    return 0;
}

// `relayed`: what is waited for comes after its sender has waited too. If that is in vain the sender says for whom, and this wait must
// not blame the sender: who begins later than the timeout is found missing by what it has not said, and whoever begins in time has given
// up its own waits by twice the timeout.
struct Patience {
    uint64_t since = 0;
    uint32_t turns = 0;
    bool relayed = false;
};

template <class B>
class Session {
   public:
    CAR_FN Session(const Group& group, const B& block) : g(group), b(block) {}

    // Wait for the kernel before this one, and learn where this block stands. What needs neither is done before.
    CAR_FN void begin() {
        b.let_next_start();
        b.await_previous();
        const Vec state = load_shared(&g.state[b.block()]);
        calls = state.w[0];
        tiles = state.w[1];
    }

    // All that is not data, by one warp (`lane`) while the others move it: tell the peers what is called here, see that they call the
    // same, and put the state forward by a call and `done` tiles.
    CAR_FN void control(uint32_t lane, uint32_t done) {
        uint32_t before = 0, was = calls;
        if (lane == 0) before = exchange(&g.state[b.block()].busy, 1);
        say_call(lane);
        b.heard_all();
        if (lane == 0) was = put_forward(done);
        hear_calls(lane);
        if (lane == 0) give_busy(before != 0 || was != calls);
    }

    // The same in three parts, for kernels without a control warp.
    CAR_FN void enter() {
        if (b.thread() == 0 && exchange(&g.state[b.block()].busy, 1) != 0) give_up(g, calls + 1, kTwoAtOnce);
        say_call(b.thread());
    }
    CAR_FN void agree() { hear_calls(b.thread()); }
    CAR_FN void leave(uint32_t done) {
        b.sync();
        if (b.thread() == 0) give_busy(put_forward(done) != calls);
    }

    // Once for each look at something that rank `r` has not sent yet; false: stop looking. Seldom does more than count.
    CAR_FN bool wait_on(Patience& patience, uint32_t r) {
        if (failed) return false;
        if (++patience.turns & 127) return true;
        // A turn takes about half a microsecond. One warp of a block looks about every millisecond for all; the others in case that it has left.
        const bool look = (patience.turns & (b.thread() < 32 ? 2047u : 65535u)) == 0;
        const uint64_t limit = patience.relayed ? 2 * g.timeout_ns + g.timeout_ns / 4 : g.timeout_ns;
        patience.since = wait_slowly(g, mail(g.rank, r), &g.state[b.block()], calls, r, patience.since, limit, look);
        failed = patience.since == 0;
        return !failed;
    }

    // What `owner` gets from `source`, another rank, in calls of even number; that of odd ones begins `odd()` vectors behind it.
    CAR_FN Vec* lamport(uint32_t owner, uint32_t source) const {
        const uint64_t slot = uint64_t(b.block()) * 2 * (g.ranks - 1) + source - (source > owner);
        return reinterpret_cast<Vec*>(g.memory[owner] + g.layout.lamport) + slot * g.layout.lamport_vecs;
    }
    CAR_FN uint32_t odd() const { return (calls & 1) * (g.ranks - 1) * g.layout.lamport_vecs; }
    CAR_FN Vec* tile(uint32_t owner, uint32_t source, uint32_t number) const {
        const uint64_t slot = (uint64_t(b.block()) * kRing + number % kRing) * g.ranks + source;
        return reinterpret_cast<Vec*>(g.memory[owner] + g.layout.tiles) + slot * g.layout.tile_vecs;
    }
    CAR_FN uint32_t* flag(uint32_t owner, uint32_t source) const {
        return reinterpret_cast<uint32_t*>(g.memory[owner] + g.layout.flags) + b.block() * 32 + source;
    }

    const Group& g;
    const B& b;
    uint32_t calls = 0;
    uint32_t tiles = 0;
    bool failed = false;

   private:
    // What the number of calls was. Another one than this kernel began with: some other kernel was here in between.
    CAR_FN uint32_t put_forward(uint32_t done) {
        if (done != 0) store_relaxed(&g.state[b.block()].tiles, tiles + done);
        return exchange(&g.state[b.block()].calls, calls + 1);
    }
    CAR_FN void give_busy(bool mixed) {
        if (mixed) give_up(g, calls + 1, kTwoAtOnce);
        store_relaxed(&g.state[b.block()].busy, 0);
    }
    CAR_FN void say_call(uint32_t r) {
        if (r < g.ranks && r != g.rank) {
            const Vec said = {{g.call[0], g.call[1], g.call[2], calls & 0x7fffffffu}};
            store_shared(mail(r, g.rank), said);
        }
    }
    CAR_FN void hear_calls(uint32_t r) {
        if (r >= g.ranks || r == g.rank) return;
        Vec* const at = mail(g.rank, r);
        Vec heard = load_shared(at);
        Patience patience;
        while (has_empty(heard)) {
            if (!wait_on(patience, r)) return;
            heard = load_shared(at);
        }
        const Vec empty = {{kEmpty, kEmpty, kEmpty, kEmpty}};
        store_shared(at, empty);
        if (!same_call(g, heard, calls, r)) failed = true;
    }
    CAR_FN Vec* mail(uint32_t owner, uint32_t source) const {
        return reinterpret_cast<Vec*>(g.memory[owner] + g.layout.mailbox) +
               (uint64_t(b.block()) * 2 + (calls & 1)) * g.ranks + source;
    }
};

}  // namespace gpu
}  // namespace car
