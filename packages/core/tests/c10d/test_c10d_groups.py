"""Process groups: their ranks, names, devices, and their end."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from c10d_world import World

from commplane.c10d import communicator_of
from commplane.errors import CommunicatorError, PeerError

pytestmark = pytest.mark.timeout(120)


def check_sub_groups(rank: int) -> list[object]:
    """Groups of four ranks, each summing its own global ranks."""
    said: list[object] = []
    for ranks in ([1, 3], [0, 2], [3, 2, 1], [2]):
        group = dist.new_group(ranks)
        if rank not in ranks:
            assert group == dist.GroupMember.NON_GROUP_MEMBER
            continue
        x = torch.tensor([float(rank)])
        dist.all_reduce(x, group=group)
        assert x.item() == sum(ranks)
        ordered = sorted(ranks)  # torch sorts them
        assert communicator_of(group).ranks == tuple(ordered)
        y = torch.tensor([float(rank)])
        dist.broadcast(y, src=ordered[-1], group=group)  # a global rank
        assert y.item() == ordered[-1]
        outs = [torch.empty(1) for _ in ranks]
        dist.all_gather(outs, torch.tensor([float(rank)]), group=group)
        assert [o.item() for o in outs] == ordered
        assert dist.get_process_group_ranks(group) == ordered and dist.get_group_rank(group, rank) == ordered.index(rank)
        dist.destroy_process_group(group)
    only = dist.new_group([rank // 2 * 2, rank // 2 * 2 + 1], use_local_synchronization=True)
    x = torch.ones(1)
    dist.all_reduce(x, group=only)
    assert x.item() == 2 and dist.get_backend(only) == dist.get_backend() == "commplane"
    mine, _ = dist.new_subgroups(2)
    dist.all_reduce(x, group=mine)
    assert x.item() == 4
    said.append(communicator_of().ranks)
    return said


def test_sub_groups_have_the_ranks_that_they_were_given_by_their_global_numbers(four: World) -> None:
    assert four.run(check_sub_groups) == [[(0, 1, 2, 3)]] * 4


def check_under_gloo(rank: int) -> tuple[int, ...]:
    """The default group is Gloo's; the plane of the sub-group has a count of its own."""
    group = dist.new_group([1, 2], backend="commplane")
    if rank == 0:
        return ()
    x = torch.tensor([rank])
    dist.all_reduce(x, group=group)
    assert x.item() == 3
    return communicator_of(group).ranks


def lose_a_member(rank: int) -> list[int]:
    if rank == 0:
        return []
    if rank == 2:
        os._exit(7)
    group = next(g for g in dist.distributed_c10d._world.pg_map if g.size() == 2)
    with pytest.raises(PeerError, match="in global ranks: lost 2") as error:
        dist.all_reduce(torch.ones(1), group=group)
    return list(error.value.missing_ranks)


def test_a_group_beside_a_default_group_of_gloo_names_lost_ranks_by_their_global_numbers() -> None:
    with World(3, backend="gloo") as world:
        assert world.run(check_under_gloo) == [(), (0, 1), (0, 1)]
        assert world.run(lose_a_member, but=(2,)) == [[], [2], None]


def check_split(rank: int) -> None:
    world = dist.group.WORLD
    half = world.split_group([0, 2] if rank % 2 == 0 else [1, 3], group_name=f"half{rank % 2}")
    assert half.size() == 2 and half.rank() == rank // 2
    x = torch.tensor([rank])
    half.allreduce([x]).wait()
    assert x.item() == (2 if rank % 2 == 0 else 4)
    assert world.split_group([1 if rank == 0 else 0], group_name="others") is None
    half.shutdown()


def test_split_group_makes_a_group_of_the_ranks_that_are_named(four: World) -> None:
    if not hasattr(dist.ProcessGroup, "split_group"):
        pytest.skip("wants torch 2.8 or newer: older ones have no split_group of a group")
    four.run(check_split)


def drop_on_one_rank(rank: int) -> list[str]:
    """Rank 0 loses its group to the collector while rank 1 is elsewhere, and holds it."""
    group = dist.group.WORLD.split_group([0, 1], group_name="dropped")
    x = torch.ones(1)
    group.allreduce([x]).wait()
    users, said = dist.group.WORLD.ground._users, []
    if rank == 0:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del group
            gc.collect()
        said = [str(w.message) for w in caught if w.category is ResourceWarning and "process group" in str(w.message)]
        assert dist.group.WORLD.ground._users == users - 1
    dist.all_reduce(x)
    assert x.item() == 4
    if rank == 1:
        with pytest.raises(PeerError, match="rank 0"):
            group.allreduce([x]).wait()
        group.abort()
    return said


def test_a_group_that_one_rank_drops_ends_there_and_leaves_the_default_group_alone() -> None:
    if not hasattr(dist.ProcessGroup, "split_group"):
        pytest.skip("wants torch 2.8 or newer: older ones have no split_group of a group")
    with World(2) as world:
        assert world.run(drop_on_one_rank) == [["process group dropped was never shut down"], []]


def fail_to_make(rank: int) -> list[str]:
    from commplane.c10d import group as groups

    users = dist.group.WORLD.ground._users
    said: list[str] = []
    before = sys.unraisablehook
    sys.unraisablehook = lambda found: said.append(f"{found.exc_value!r} in {found.object!r}")

    def refuses(*_: object) -> None:
        raise RuntimeError("no connection")

    was = {name: getattr(groups.fallback, name) for name in ("gloo", "nccl")}
    try:
        for name in was:
            setattr(groups.fallback, name, refuses)
            with pytest.raises(RuntimeError, match="no connection"):
                dist.new_group([0, 1])
            gc.collect()
            setattr(groups.fallback, name, was[name])
    finally:
        sys.unraisablehook = before
    assert dist.group.WORLD.ground._users == users
    x = torch.ones(1)
    dist.all_reduce(x)  # the plane is still there
    again = dist.new_group([0, 1])
    dist.all_reduce(x, group=again)
    assert x.item() == 4
    dist.destroy_process_group(again)
    return said


def test_a_group_that_could_not_be_made_leaves_the_plane_as_it_was_and_says_nothing_else() -> None:
    with World(2) as world:
        assert world.run(fail_to_make) == [[], []]


def check_name_and_devices(rank: int) -> None:
    group = dist.group.WORLD
    assert dist.get_backend() == "commplane" == group.name()
    assert torch.device("cpu") in group._device_types
    assert dist.get_world_size() == 2 and dist.get_rank() == rank == group.rank()
    assert communicator_of().plan.key.ranks == (0, 1)
    with pytest.raises(CommunicatorError, match="found those for cpu"):
        communicator_of(device="cuda")


def test_torch_finds_name_devices_and_rank_of_the_group(pair: World) -> None:
    pair.run(check_name_and_devices)


def again_and_again(rank: int) -> int:
    before = threads = 0
    for round_ in range(3):
        port = int(os.environ["C10D_TEST_PORT"])
        store = dist.TCPStore("127.0.0.1", port, is_master=False)  # the same one: its keys are from the last time
        dist.init_process_group("cpu:commplane", store=store, rank=rank, world_size=2)
        group = dist.new_group([0, 1])
        x = torch.full((3,), float(rank + round_))
        dist.all_reduce(x, async_op=True, group=group).wait()
        assert x.tolist() == [1.0 + 2 * round_] * 3
        dist.destroy_process_group()
        assert not dist.is_initialized()
        del group, store
        gc.collect()
        if round_ == 0:
            before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    assert not [n for n in os.listdir("/dev/shm") if n.startswith("commplane-") and f"-{os.getpid()}-" in n]
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)  # what was told to end does so soon
    assert threading.active_count() <= threads, threading.enumerate()
    return len(os.listdir("/proc/self/fd")) - before


def test_a_default_group_that_was_destroyed_can_be_made_again_and_leaves_nothing() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with World(2, backend=None, env={"C10D_TEST_PORT": str(store.port)}) as world:
        assert max(world.run(again_and_again)) <= 0


def from_a_file(rank: int, path: str, backend: str) -> float:
    dist.init_process_group(backend, init_method=f"file://{path}", rank=rank, world_size=2)
    x = torch.ones(1)
    dist.all_reduce(x)
    dist.barrier()
    dist.destroy_process_group()
    return x.item()


def test_ranks_may_meet_by_a_file_and_name_devices(tmp_path: Path) -> None:
    with World(2, backend=None) as world:
        for number, backend in enumerate(("commplane", "cpu:commplane,cuda:commplane", "cpu:commplane,cuda:nccl")):
            assert world.run(from_a_file, str(tmp_path / f"store{number}"), backend) == [2.0, 2.0]
