"""What the adapter does with one group, on ranks as threads of one process: which sums are ours, and how captures nest."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from commplane.engines.groups import Groups, Served
from commplane.errors import CommplaneError, CommunicatorError
from commplane.testing import run_threads
from commplane_sglang.seams import ENGINE, PURPOSES


class Plan:
    """Routes as a plan has them: custom_ar up to 1 KiB, torch above; in a capture, custom_ar up to 2 KiB."""

    def find(self, collective, op, dtype, *, capturing=False):
        if dtype != "float32":
            return [SimpleNamespace(low=0, high=None, backend="torch")]
        edge = 2048 if capturing else 1024
        return [SimpleNamespace(low=0, high=edge, backend="custom_ar"), SimpleNamespace(low=edge, high=None, backend="torch")]


class Communicator:
    """One that writes down what it is asked for."""

    def __init__(self, plan):
        self.plan, self.prepared, self.closed = plan, [], False

    def prepare(self, collective, *, dtype, max_bytes):
        self.prepared.append((collective, dtype, max_bytes))

    def all_reduce(self, tensor):
        return tensor * 2

    def close(self):
        assert not self.closed
        self.closed = True


def test_sizes_that_the_plan_leaves_to_torch_are_the_engines():
    served = Served(Communicator(Plan()))
    floats = [torch.empty(n) for n in (1, 255, 256, 511, 512)]
    assert [served.takes(t, False) for t in floats] == [True, True, False, False, False]
    assert [served.takes(t, True) for t in floats] == [True, True, True, True, False]
    assert not served.takes(torch.empty(4, dtype=torch.int32), False)


def test_a_tuned_plan_is_followed():
    served = Served(Communicator(Plan()))
    small = torch.empty(4)
    assert served.takes(small, False)
    served.communicator.plan = SimpleNamespace(find=lambda *a, **k: [SimpleNamespace(low=0, high=None, backend="torch")])
    assert not served.takes(small, False)


def test_workspaces_are_made_for_what_is_ours_and_no_more():
    served = Served(Communicator(Plan()))
    served.prepare(8, 16, torch.float32)
    served.prepare(8192, 4096, torch.float32)
    served.prepare(8, 16, torch.bfloat16)
    assert served.communicator.prepared == [("all_reduce", torch.float32, 512), ("all_reduce", torch.float32, 2048)]


class Plane:
    def __init__(self):
        self.captures, self.closed = 0, False

    @contextmanager
    def capture(self):
        self.captures += 1
        yield

    def close(self):
        self.closed = True


def at_work():
    groups = Groups(ENGINE, PURPOSES, logging.getLogger("test"))
    groups._plane, groups._asked = Plane(), True
    return groups


def test_the_outermost_of_nested_captures_counts_also_after_an_error():
    groups = at_work()
    with groups.capture():
        with groups.capture(), groups.capture():
            assert groups.capturing
        assert groups.capturing and groups.plane.captures == 1
    assert not groups.capturing
    with pytest.raises(ZeroDivisionError), groups.capture(), groups.capture():
        raise ZeroDivisionError
    assert not groups.capturing and groups.plane.captures == 2


def test_without_a_plane_a_capture_is_the_engines_alone():
    groups = Groups(ENGINE, PURPOSES, logging.getLogger("test"))
    with groups.capture():
        assert not groups.capturing


class Group:
    def __init__(self, name):
        self.unique_name, self.ranks, self.world_size, self.device = f"{name}:0", [0, 1], 2, torch.device("cpu")


def test_a_group_closes_once_and_the_last_one_takes_the_plane_along():
    groups = at_work()
    plane, tp, world = groups.plane, Group("tp"), Group("world")
    served = Served(Communicator(Plan()))
    tp.commplane_served = served
    groups._served.append(served)
    groups._alive.update((tp, world))
    assert groups.all_reduce(tp, torch.empty(4)) == served.communicator.all_reduce
    groups.detach(tp)
    groups.detach(tp)
    assert served.communicator.closed and not plane.closed and groups.served == ()
    assert groups.all_reduce(tp, torch.empty(4)) is None
    groups.detach(world)
    assert plane.closed and groups.plane is None


@pytest.mark.timeout(60)
def test_a_group_whose_plan_is_torch_alone_is_the_engines_on_all_ranks(monkeypatch):
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)

    def one(plane):
        groups = Groups(ENGINE, PURPOSES, logging.getLogger("test"))
        groups._plane, groups._asked = plane, True
        tp, pp = Group("tp"), Group("pp")
        out = [groups.attach(tp), groups.attach(pp), groups.all_reduce(tp, torch.empty(4)), plane.communicators]
        groups.detach(tp)
        groups.detach(pp)
        with pytest.raises(CommplaneError, match="a plane that is closed"):
            plane.communicator("again")
        return out

    assert run_threads(2, one) == [[None, None, None, ()]] * 2


@pytest.mark.timeout(60)
def test_a_communicator_that_cannot_be_formed_ends_the_start_of_the_engine():
    groups = at_work()

    def communicator(name, ranks, device):
        raise CommunicatorError(f"[{name}] no")

    groups.plane.communicator = communicator
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.get_world_size", lambda: 2)
        with pytest.raises(CommunicatorError, match=r"\[tp:0\] no"):
            groups.attach(Group("tp"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("numerics", "at_work"), [("any", False), ("rank_order", True)])
def test_who_asks_for_the_same_bits_in_every_batch_gets_sums_in_rank_order_or_the_engines(monkeypatch, caplog, numerics, at_work):
    monkeypatch.setenv("SGLANG_ENABLE_DETERMINISTIC_INFERENCE", "1")
    monkeypatch.setenv("COMMPLANE_NUMERICS", numerics)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", HashStore)
    with caplog.at_level(logging.WARNING):
        assert Groups(ENGINE, PURPOSES, logging.getLogger("test"))._vote() is at_work
    text = (
        "all ranks go on without commplane-sglang: wanted numerics=rank_order, because SGLANG_ENABLE_DETERMINISTIC_INFERENCE asks"
    )
    assert (text in caplog.text) is not at_work
