"""Ranks that do not come, that die, that call something else: what reaches the user of torch.distributed."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from c10d_world import World

from commplane.c10d.work import HOLDS_WORK
from commplane.errors import CommunicatorError, MismatchError, PeerError

pytestmark = pytest.mark.timeout(90)


def die(rank: int, how: str) -> tuple[str, list[int]]:
    x = torch.ones(4)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    call = {
        "waited for": lambda: dist.all_reduce(x),
        "in the background": lambda: dist.all_reduce(x, async_op=True).wait(),
        "functional": lambda: funcol.wait_tensor(funcol.all_reduce(x, "sum", dist.group.WORLD)),
        "gathered": lambda: dist.all_gather_into_tensor(torch.empty(8), x),
        "barrier": dist.barrier,
    }[how]
    with pytest.raises(PeerError) as error:
        call()
    with pytest.raises(PeerError, match="poisoned"):  # and every later call at once
        dist.all_reduce(x)
    dist.destroy_process_group()
    return str(error.value), list(error.value.missing_ranks)


LONG = [pytest.param(how, marks=pytest.mark.long) for how in ("in the background", "gathered", "barrier")]


@pytest.mark.parametrize("how", ["waited for", "functional", *LONG])
def test_a_rank_that_died_is_named_by_the_error_of_a_collective(how: str) -> None:
    with World(2) as world:
        (text, missing), _ = world.run(die, how, but=(1,))
        pids = [process.pid for process in world.processes]
    assert missing == [1] and "[c10d_" in text
    assert not [n for n in os.listdir("/dev/shm") if n.startswith("commplane-") and any(f"-{pid}-" in n for pid in pids)]


def stay_away(rank: int) -> list[int]:
    if rank == 1:
        time.sleep(1)
        return []
    with pytest.raises(PeerError) as error:
        dist.all_reduce(torch.ones(1))
    return list(error.value.missing_ranks)


def test_the_timeout_of_the_group_is_the_deadline_of_a_collective() -> None:
    with World(2, seconds=0.5) as world:
        assert world.run(stay_away) == [[1], []]


def come_alone(rank: int) -> list[int]:
    if rank == 1:
        return []
    store = dist.HashStore()
    with pytest.raises(PeerError, match=r"ranks 1 did not come within 0\.3 s") as error:
        dist.init_process_group("commplane", store=store, rank=0, world_size=2, timeout=timedelta(seconds=0.3))
    return list(error.value.missing_ranks)


def test_a_rank_that_does_not_come_to_init_process_group_is_named() -> None:
    with World(2, backend=None) as world:
        assert world.run(come_alone) == [[1], []]


def differ(rank: int) -> str:
    with pytest.raises((MismatchError, PeerError)) as error:
        dist.all_reduce(torch.ones(3 + rank))
    with pytest.raises(CommunicatorError):
        dist.all_reduce(torch.ones(3))
    return type(error.value).__name__


def test_ranks_that_call_with_other_sizes_are_told() -> None:
    with World(2) as world:
        assert world.run(differ) == ["MismatchError"] * 2


def future_fails(rank: int) -> str:
    if rank == 1:
        os._exit(3)
    with pytest.raises((RuntimeError, PeerError)) as error:  # a future has RuntimeError, with torch 2.4 the call itself raises
        dist.all_reduce(torch.ones(4), async_op=True).get_future().wait()
    return f"{type(error.value).__name__}: {error.value}"


def test_the_future_of_a_collective_that_failed_fails_with_its_text() -> None:
    with World(2) as world:
        assert "PeerError" in world.run(future_fails, but=(1,))[0]


def die_in_training(rank: int) -> str:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    if rank == 1:
        os._exit(3)
    with pytest.raises((RuntimeError, PeerError)) as error:
        model(torch.ones(2, 4)).sum().backward()
    return f"{type(error.value).__name__}: {error.value}"


def test_a_rank_that_died_is_named_where_ddp_fails() -> None:
    with World(2) as world:
        said = world.run(die_in_training, but=(1,))[0]
    assert "PeerError" in said and "rank 1 has ended" in said


def give_up(rank: int) -> str:
    if rank == 1:
        time.sleep(1)
        return ""
    work = dist.all_reduce(torch.ones(4), async_op=True)
    time.sleep(0.1)  # it runs, and waits for rank 1
    begin = time.monotonic()
    dist.distributed_c10d._abort_process_group()
    assert time.monotonic() - begin < 10
    with pytest.raises(CommunicatorError, match="abort") as error:
        work.wait()
    return str(error.value)


def abort(rank: int) -> list[int]:
    if rank == 1:
        time.sleep(0.3)
        dist.distributed_c10d._abort_process_group()
        return []
    with pytest.raises(PeerError) as error:
        dist.all_reduce(torch.ones(1))
    return list(error.value.missing_ranks)


def test_a_rank_that_aborts_its_group_lets_the_others_go() -> None:
    if not hasattr(dist.distributed_c10d, "_abort_process_group"):
        pytest.skip("wants torch 2.6 or newer: older ones cannot abort a process group")
    with World(2) as world:
        assert world.run(abort) == [[1], []]


def ask_closed(rank: int) -> str:
    """A future of a call on a group that is closed: what waits for it is not this package's, and has no deadline."""
    group = dist.new_group([0, 1])
    x = torch.ones(3)
    dist.all_reduce(x, async_op=True, group=group).wait()
    dist.destroy_process_group(group)
    work = group.allreduce([x])
    assert work.is_completed() and not work.is_success()
    with pytest.raises(CommunicatorError, match="closed"):
        work.wait()
    said: list[str] = []
    told = threading.Event()

    def tell(future: torch.futures.Future[object]) -> None:
        try:
            future.value()
        except RuntimeError as error:
            said.append(str(error))
        told.set()

    work.get_future().add_done_callback(tell)
    assert told.wait(20)
    return said[0]


@pytest.mark.skipif(not HOLDS_WORK, reason="wants torch 2.8 or newer: with older ones the call itself raises")
def test_the_future_of_a_call_on_a_closed_group_fails() -> None:
    with World(2) as world:
        assert all("is closed" in said for said in world.run(ask_closed))


def train_on_aborted(rank: int) -> str:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    for _ in range(3):  # the second has a collective in its forward
        model(torch.ones(2, 4)).sum().backward()
    dist.barrier()
    dist.distributed_c10d._abort_process_group()
    said: list[str] = []

    def train() -> None:
        try:
            model(torch.ones(2, 4)).sum().backward()
        except RuntimeError as error:
            said.append(f"{error}")

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "backward hangs"
    return said[0]


def test_a_backward_of_ddp_on_a_group_that_was_aborted_raises() -> None:
    if not hasattr(dist.distributed_c10d, "_abort_process_group"):
        pytest.skip("wants torch 2.6 or newer: older ones cannot abort a process group")
    with World(2) as world:
        assert all("is closed" in said for said in world.run(train_on_aborted))


@pytest.mark.skipif(not HOLDS_WORK, reason="wants torch 2.8 or newer: older ones wait in the call")
def test_a_group_is_aborted_while_its_collective_waits_in_the_background() -> None:
    with World(2) as world:
        assert "aborted by rank 0" in world.run(give_up)[0]
