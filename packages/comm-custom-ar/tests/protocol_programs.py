# SPDX-License-Identifier: Apache-2.0
"""The collectives of csrc/cpu as programs of the model: the same fills, hops, reads and writes in the same order.

One function for each algorithm, named with the C++ file that it mirrors. It writes the program of rank `me`, and returns which
pieces of its buffers then hold the result, and what they hold. Slices that are empty on the last ranks of a small message are
not modelled: a rank with less to do does less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from protocol_model import Data, Program
from protocol_ranks import PRESENT, Call, Memory, Protocol, Rank, given, result, sent

Written = list[tuple[list[int], str]]


def barrier(me: Rank, call: Call) -> Written:
    """barrier.cc."""
    me.hop()
    return []


def all_reduce_one_shot(me: Rank, call: Call) -> Written:
    """all_reduce_one_shot.cc; all_reduce_rms_norm.cc's whole_rows and rows_in_pieces; small symmetric messages."""
    every, number, out = range(me.world), me.call, "x" if call.in_place else "y"

    def fill(i: int, step: int) -> None:
        mine = me.buffer("x", me.rank, [i], every)
        me.do(f"fills {i}", [(mine, given(number, me.rank))], [(me.slot(me.rank, step, every), sent(number, me.rank, i))])

    def drain(i: int, step: int) -> None:
        mine = (me.buffer("x", me.rank, [i], every), given(number, me.rank))
        theirs = [(me.slot(peer, step, every), sent(number, peer, i)) for peer in me.peers]
        me.do(f"reduces {i}", [mine, *theirs], [(me.buffer(out, me.rank, [i], every), result(number))])

    me.pipelined(call.chunks, fill, drain)
    return [(me.buffer(out, me.rank, range(call.chunks), every), result(number))]


def all_reduce_two_shot(me: Rank, call: Call) -> Written:
    """all_reduce_two_shot.cc; all_reduce_rms_norm.cc's after_two_shot."""
    if call.chunks == 0:
        me.hop()
        return []
    every, number, out = range(me.world), me.call, "x" if call.in_place else "y"
    first, apart = me.next_step, me.protocol.results_apart

    def fill(i: int) -> None:
        step = first + 2 * i
        mine = me.buffer("x", me.rank, [i], me.peers)  # all slices but the own one
        me.do(f"fills {i}", [(mine, given(number, me.rank))], [(me.slot(me.rank, step, every), sent(number, me.rank, i))])
        me.publish(step)

    fill(0)
    for i in range(call.chunks):
        step = first + 2 * i
        if me.protocol.wait_first:
            me.wait(step)
        own = (me.buffer("x", me.rank, [i], [me.rank]), given(number, me.rank))
        theirs = [(me.slot(peer, step, [me.rank]), sent(number, peer, i)) for peer in me.peers]
        to = me.slot(me.rank, step + 1, every) if apart else me.slot(me.rank, step, [0])
        reduced = (to, result(number, me.rank))
        kept = (me.buffer(out, me.rank, [i], [me.rank]), result(number, me.rank))
        me.do(f"reduces {i}", [own, *theirs], [reduced, kept])
        if not me.protocol.wait_first:
            me.wait(step)
        me.publish(step + 1)
        if i + 1 < call.chunks:
            fill(i + 1)
        me.wait(step + 1)
        for peer in me.peers:
            there = me.slot(peer, step + 1 if apart else step, [0])
            me.do(
                f"copies {i}",
                [(there, result(number, peer))],
                [(me.buffer(out, me.rank, [i], [peer]), result(number, peer))],
            )
    me.next_step = first + 2 * call.chunks
    return [(me.buffer(out, me.rank, range(call.chunks), [part]), result(number, part)) for part in every]


def first_hop(me: Rank) -> None:
    if me.protocol.first_hop:
        me.hop()


def last_hop(me: Rank) -> None:
    if me.protocol.last_hop:
        me.hop()


def all_reduce_symmetric(me: Rank, call: Call) -> Written:
    """all_reduce_symmetric.cc, in_place and out_of_place; the latter is all_reduce_rms_norm.cc's symmetric too."""
    every, number = range(me.world), me.call
    first_hop(me)
    pieces = [me.rank] if call.in_place else every
    inputs = [(me.buffer("x", rank, [0], pieces), given(number, rank)) for rank in every]
    if call.in_place:
        outputs = [(me.buffer("x", rank, [0], [me.rank]), result(number, me.rank)) for rank in every]
        after = [(me.buffer("x", me.rank, [0], [part]), result(number, part)) for part in every]
    else:
        outputs = after = [(me.buffer("y", me.rank, [0], every), result(number))]
    me.do("reduces", inputs, outputs)
    last_hop(me)
    return after


def all_reduce_single_copy(me: Rank, call: Call) -> Written:
    """all_reduce_single_copy.cc; process_vm_readv is a plain read of the peer's memory by this rank."""
    every, number, out = range(me.world), me.call, "x" if call.in_place else "y"
    me.publish(me.next_step)
    if me.protocol.wait_first:
        me.wait(me.next_step)
    for peer in me.peers:
        me.word("finds the input", "address", peer, me.next_step)
    inputs = [(me.buffer("x", rank, [0], [me.rank]), given(number, rank)) for rank in every]
    me.do("reduces", inputs, [(me.buffer(out, me.rank, [0], [me.rank]), result(number, me.rank))])
    if not me.protocol.wait_first:
        me.wait(me.next_step)

    me.publish(me.next_step + 1)
    me.wait(me.next_step + 1)
    for peer in me.peers:
        me.word("finds the output", "address", peer, me.next_step + 1)
        theirs, here = me.buffer(out, peer, [0], [peer]), me.buffer(out, me.rank, [0], [peer])
        me.do("copies", [(theirs, result(number, peer))], [(here, result(number, peer))])
    me.next_step += 2
    last_hop(me)
    return [(me.buffer(out, me.rank, [0], [part]), result(number, part)) for part in every]


def all_gather(me: Rank, call: Call) -> Written:
    """all_gather.cc, staged."""
    every, number, out = range(me.world), me.call, "x" if call.in_place else "y"

    def fill(i: int, step: int) -> None:
        mine = me.buffer("x", me.rank, [i], [me.rank])
        me.do(f"fills {i}", [(mine, given(number, me.rank))], [(me.slot(me.rank, step, every), sent(number, me.rank, i))])

    def drain(i: int, step: int) -> None:
        theirs = [(me.slot(peer, step, every), sent(number, peer, i)) for peer in me.peers]
        me.do(f"copies {i}", theirs, [(me.buffer(out, me.rank, [i], [p]), result(number, p)) for p in me.peers])

    me.pipelined(call.chunks, fill, drain)
    return copy_own(me, call, out) + [
        (me.buffer(out, me.rank, range(call.chunks), [peer]), result(number, peer)) for peer in me.peers
    ]


def copy_own(me: Rank, call: Call, out: str) -> Written:
    """The own part of an all-gather's output; in place it is the input."""
    chunks = range(call.chunks)
    mine = (me.buffer("x", me.rank, chunks, [me.rank]), given(me.call, me.rank))
    if call.in_place:
        return [mine]
    own = (me.buffer(out, me.rank, chunks, [me.rank]), result(me.call, me.rank))
    me.do("copies its own", [mine], [own])
    return [own]


def all_gather_symmetric(me: Rank, call: Call) -> Written:
    """all_gather.cc, symmetric."""
    number, out = me.call, "x" if call.in_place else "y"
    first_hop(me)
    after = []
    for peer in (*me.peers[me.rank :], *me.peers[: me.rank]):
        part = (me.buffer(out, me.rank, [0], [peer]), result(number, peer))
        me.do("copies", [(me.buffer("x", peer, [0], [peer]), given(number, peer))], [part])
        after.append(part)
    after += copy_own(me, call, out)
    last_hop(me)
    return after


def reduce_scatter(me: Rank, call: Call) -> Written:
    """reduce_scatter.cc, staged."""
    every, number, out = range(me.world), me.call, "x" if call.in_place else "y"

    def fill(i: int, step: int) -> None:
        mine = me.buffer("x", me.rank, [i], me.peers)
        me.do(f"fills {i}", [(mine, given(number, me.rank))], [(me.slot(me.rank, step, every), sent(number, me.rank, i))])

    def drain(i: int, step: int) -> None:
        own = (me.buffer("x", me.rank, [i], [me.rank]), given(number, me.rank))
        theirs = [(me.slot(peer, step, [me.rank]), sent(number, peer, i)) for peer in me.peers]
        me.do(f"reduces {i}", [own, *theirs], [(me.buffer(out, me.rank, [i], [me.rank]), result(number))])

    me.pipelined(call.chunks, fill, drain)
    return [(me.buffer(out, me.rank, range(call.chunks), [me.rank]), result(number))]


def reduce_scatter_symmetric(me: Rank, call: Call) -> Written:
    """reduce_scatter.cc, symmetric."""
    number, out = me.call, "x" if call.in_place else "y"
    first_hop(me)
    inputs = [(me.buffer("x", rank, [0], [me.rank]), given(number, rank)) for rank in range(me.world)]
    after = [(me.buffer(out, me.rank, [0], [me.rank]), result(number))]
    me.do("reduces", inputs, after)
    last_hop(me)
    return after


def broadcast(me: Rank, call: Call) -> Written:
    """broadcast.cc, staged."""
    every, number, root = range(me.world), me.call, call.root % me.world

    def fill(i: int, step: int) -> None:
        if me.rank == root:
            mine = me.buffer("x", root, [i], every)
            me.do(f"fills {i}", [(mine, given(number, root))], [(me.slot(root, step, every), sent(number, root, i))])

    def drain(i: int, step: int) -> None:
        if me.rank != root:
            there = (me.slot(root, step, every), sent(number, root, i))
            me.do(f"copies {i}", [there], [(me.buffer("x", me.rank, [i], every), result(number))])

    me.pipelined(call.chunks, fill, drain, awaits=me.rank != root or me.protocol.root_awaits)
    received = given(number, root) if me.rank == root else result(number)
    return [(me.buffer("x", me.rank, range(call.chunks), every), received)]


def broadcast_symmetric(me: Rank, call: Call) -> Written:
    """broadcast.cc, symmetric."""
    every, number, root = range(me.world), me.call, call.root % me.world
    first_hop(me)
    here = me.buffer("x", me.rank, [0], every)
    if me.rank != root:
        me.do("copies", [(me.buffer("x", root, [0], every), given(number, root))], [(here, result(number))])
    last_hop(me)
    return [(here, given(number, root) if me.rank == root else result(number))]


COLLECTIVES: dict[str, Callable[[Rank, Call], Written]] = {
    function.__name__: function
    for function in (
        barrier,
        all_reduce_one_shot,
        all_reduce_two_shot,
        all_reduce_symmetric,
        all_reduce_single_copy,
        all_gather,
        all_gather_symmetric,
        reduce_scatter,
        reduce_scatter_symmetric,
        broadcast,
        broadcast_symmetric,
    )
}


def program(world: int, calls: Sequence[Call], protocol: Protocol = PRESENT, *, careful: bool = True) -> Program:
    """`calls` back to back on one communicator of `world` ranks.

    Args:
        world: ranks.
        calls: in their order.
        protocol: with its mistakes.
        careful: every load of await() and bounded_wait() on its own, else one acquire load that waits for its value.
    """
    chunks = max(1, *(call.chunks for call in calls))
    memory = Memory(world, chunks, protocol)
    ranks = []
    for rank in range(world):
        me = Rank(rank, memory, protocol, careful)
        for number, call in enumerate(calls):
            me.call = number
            written = COLLECTIVES[call.kind](me, call)
            # The buffers are the caller's again.
            me.do("reads the result", written, [])
            everything = (range(chunks), range(world))
            inputs, outputs = me.buffer("x", rank, *everything), me.buffer("y", rank, *everything)
            spoiled = tuple((where, f"spoiled after call {number}") for where in outputs)
            me.operations.append(
                Data(
                    "returns, and its caller overwrites its buffers",
                    number,
                    writes=(*((where, given(number + 1, rank)) for where in inputs), *spoiled),
                    by_caller=True,
                )
            )
        ranks.append(me.operations)
    owners = [rank for rank in range(world) for _ in range(protocol.ring)]
    return Program(f"{world} ranks: {', '.join(map(str, calls))}", ranks, memory.locations, owners)
