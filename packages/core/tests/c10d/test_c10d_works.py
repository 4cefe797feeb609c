"""Calls that go on in the background: when they end, what their work says, and who keeps their tensors."""

from __future__ import annotations

import gc
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from c10d_world import World, oracle

from commplane.c10d.work import HOLDS_WORK
from commplane.errors import PeerError

pytestmark = pytest.mark.timeout(90)

in_background = pytest.mark.skipif(
    not HOLDS_WORK, reason="wants torch 2.8 or newer: with older ones a collective has ended when its call returns"
)


def check_order(rank: int) -> float:
    """Rank 0 starts the sum, then sends what rank 1 waits for before it comes to the sum."""
    x, note = torch.full((4,), float(rank)), torch.zeros(1)
    begin = time.monotonic()
    if rank == 0:
        work = dist.all_reduce(x, async_op=True)
        started = time.monotonic() - begin
        assert not work.is_completed() and not work.is_success()
        dist.send(note, 1)
    else:
        dist.recv(note, 0)
        started = 0.0
        work = dist.all_reduce(x, async_op=True)
    assert work.wait() and work.is_completed() and work.is_success() and work.exception() is None
    assert x.tolist() == [1.0] * 4 and work.result()[0] is x
    return started


@in_background
def test_a_rank_goes_on_while_its_collective_waits_for_the_others(pair: World) -> None:
    pair.run(check_order)


def check_unwatched(rank: int) -> None:
    """Nobody waits for the works; they are dropped, and their tensors too."""
    kept = torch.full((2,), float(rank + 1))
    for _ in range(20):
        dist.all_reduce(torch.full((50_000,), 1.0), async_op=True)
    gc.collect()
    dist.all_reduce(kept, async_op=True)
    gc.collect()
    deadline = time.monotonic() + 10
    while kept[0] != 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert kept.tolist() == [3.0, 3.0]
    dist.barrier()


def test_a_work_that_nobody_waits_for_ends_and_its_tensors_live_so_long(pair: World) -> None:
    pair.run(check_unwatched)


def check_polling(rank: int) -> None:
    x = torch.ones(4)
    work = dist.all_reduce(x, async_op=True)
    deadline = time.monotonic() + 10
    while not work.is_completed() and time.monotonic() < deadline:
        time.sleep(0)
    assert work.is_completed() and x.tolist() == [2.0] * 4


def test_a_work_that_is_only_asked_ends(pair: World) -> None:
    pair.run(check_polling)


def check_sequence(rank: int) -> None:
    """Queued and waited-for calls mix: their order is that in which they were made."""
    x = torch.ones(1)
    works = []
    for step in range(30):
        if step % 3 == 2:
            dist.all_reduce(x)
        else:
            works.append(dist.all_reduce(x, async_op=True))
    other = torch.full((1,), float(rank))
    dist.broadcast(other, 1)
    assert x.item() == 2.0**30 and other.item() == 1
    for work in reversed(works):
        work.wait()


def test_calls_run_in_the_order_in_which_they_were_made(pair: World) -> None:
    pair.run(check_sequence)


def check_futures(rank: int) -> None:
    x = torch.full((3,), float(rank + 1))
    future = dist.all_reduce(x, async_op=True).get_future().then(lambda f: f.value()[0] * 10)
    assert future.wait().tolist() == [30.0] * 3
    work = dist.all_gather([torch.empty(3), torch.empty(3)], x, async_op=True)
    assert [t.tolist() for t in work.get_future().wait()] == [[3.0] * 3] * 2 == [t.tolist() for t in work.result()]
    called = []
    dist.all_reduce(x, async_op=True).get_future().add_done_callback(lambda f: called.append(f.value()[0].tolist()))
    dist.barrier()
    deadline = time.monotonic() + 10
    while not called and time.monotonic() < deadline:
        time.sleep(0.001)
    assert called == [[6.0] * 3]


def test_the_future_of_a_work_holds_its_outputs(pair: World) -> None:
    pair.run(check_futures)


def check_callback_that_communicates(rank: int) -> None:
    y = torch.ones(2)
    x = torch.ones(2)
    seen = dist.all_reduce(x, async_op=True).get_future().then(lambda f: dist.all_reduce(y))
    seen.wait()
    assert y.tolist() == [2.0, 2.0]


def test_a_callback_may_call_a_collective(pair: World) -> None:
    pair.run(check_callback_that_communicates)


def check_threads(rank: int) -> None:
    """The group is used from one thread after the other."""
    total = torch.ones(1)
    for _ in range(5):
        thread = threading.Thread(target=dist.all_reduce, args=(total,))
        thread.start()
        thread.join(20)
    assert total.item() == 32


def test_calls_may_come_from_other_threads(pair: World) -> None:
    pair.run(check_threads)


def check_coalescing(rank: int) -> None:
    from torch.distributed.distributed_c10d import _coalescing_manager

    for later in (False, True):
        tensors = [torch.full((n,), float(rank + n)) for n in (1, 5, 3)]
        with _coalescing_manager(async_ops=later) as manager:
            for tensor in tensors:
                dist.all_reduce(tensor)
        if later:
            manager.wait()
        assert [t.tolist() for t in tensors] == [[2.0 * n + 1] * n for n in (1, 5, 3)]

        outs, ins = [torch.zeros(2 * n) for n in (1, 4)], [torch.full((n,), float(rank)) for n in (1, 4)]
        with _coalescing_manager(async_ops=later) as manager:
            for out, tensor in zip(outs, ins, strict=True):
                dist.all_gather_into_tensor(out, tensor)
        if later:
            manager.wait()
        assert [o.tolist() for o in outs] == [[0.0, 1.0], [0.0] * 4 + [1.0] * 4]

        outs, ins = [torch.zeros(n) for n in (1, 4)], [torch.arange(2.0 * n) + rank for n in (1, 4)]
        with _coalescing_manager(async_ops=later) as manager:
            for out, tensor in zip(outs, ins, strict=True):
                dist.reduce_scatter_tensor(out, tensor)
        if later:
            manager.wait()
        assert [o.tolist() for o in outs] == [(torch.arange(2.0 * n) * 2 + 1).chunk(2)[rank].tolist() for n in (1, 4)]

        x = torch.ones(2)
        with _coalescing_manager(device=torch.device("cpu"), async_ops=later) as manager:
            dist.broadcast(x.mul_(rank), 1, async_op=True)
            work = dist.group.WORLD.allreduce([x])
        if later:
            manager.wait()
        assert work.is_completed() and x.tolist() == [2.0, 2.0]


def test_collectives_in_a_coalescing_manager_end_with_it(pair: World) -> None:
    pair.run(check_coalescing)


def check_coalescing_over_gloo(rank: int) -> None:
    """Rank 1 comes late: what Gloo does in the manager has ended with its work, and not before."""
    from torch.distributed.distributed_c10d import _coalescing_manager

    mine, theirs, product = torch.full((4,), float(rank)), torch.full((4,), -1.0), torch.full((4,), 3.0)
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.PRODUCT
    options.asyncOp = True
    if rank == 1:
        time.sleep(0.3)
    with _coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
        dist.isend(mine, 1 - rank)
        dist.irecv(theirs, 1 - rank)
        dist.group.WORLD.allreduce([product], options)
    manager.wait()
    assert theirs.tolist() == [1.0 - rank] * 4 and product.tolist() == [9.0] * 4


@in_background
def test_what_goes_to_gloo_in_a_coalescing_manager_ends_with_it(pair: World) -> None:
    pair.run(check_coalescing_over_gloo)


def check_point_to_point(rank: int) -> None:
    """What no communicator has goes to Gloo: also while a collective waits in the background."""
    peer = 1 - rank
    mine, theirs = torch.full((3,), float(rank)), torch.empty(3)
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, peer), dist.P2POp(dist.irecv, theirs, peer)]):
        work.wait()
    assert theirs.tolist() == [float(peer)] * 3
    pieces = [torch.zeros(2) for _ in range(2)]
    dist.all_to_all_single(out := torch.empty(4), torch.arange(4.0) + 10 * rank)
    assert out.tolist() == [2.0 * rank, 2.0 * rank + 1, 2.0 * rank + 10, 2.0 * rank + 11]
    dist.gather(torch.full((2,), float(rank)), pieces if rank == 0 else None, dst=0)
    assert rank or [p.tolist() for p in pieces] == [[0.0, 0.0], [1.0, 1.0]]
    dist.scatter(got := torch.empty(2), [torch.zeros(2), torch.ones(2)] if rank == 1 else None, src=1)
    assert got.tolist() == [float(rank)] * 2
    dist.reduce(total := torch.ones(2), dst=1)
    assert rank == 0 or total.tolist() == [2.0, 2.0]
    product = torch.full((2,), 3.0)
    dist.all_reduce(product, dist.ReduceOp.PRODUCT)
    assert product.tolist() == [9.0, 9.0]
    short = torch.full((2,), rank + 1, dtype=torch.bool)
    flags: list[object] = [None, None]
    dist.all_gather_object(flags, {"rank": rank, "flag": short})
    assert [f["rank"] for f in flags] == [0, 1]  # type: ignore[index]
    objects = [{"from": rank}] if rank == 1 else [None]
    dist.broadcast_object_list(objects, src=1)
    assert objects == [{"from": 1}]


def test_what_a_communicator_has_not_goes_to_gloo(pair: World) -> None:
    pair.run(check_point_to_point)


def check_wait_timeout(rank: int) -> str:
    x = torch.ones(1)
    said = "nothing"
    if rank == 0:
        work = dist.all_reduce(x, async_op=True)
        with pytest.raises(PeerError) as error:
            work.wait(timedelta(seconds=0.2))
        said = str(error.value)
    dist.barrier(group=oracle())
    if rank == 1:
        work = dist.all_reduce(x, async_op=True)
    assert work.wait() and x.item() == 2
    return said


@in_background
def test_a_wait_that_runs_out_of_time_raises_and_the_collective_goes_on(pair: World) -> None:
    assert "within 0.2 s" in pair.run(check_wait_timeout)[0]
