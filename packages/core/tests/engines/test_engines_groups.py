"""What an adapter does with one group, on ranks as threads of one process: which sums are ours, and how captures nest."""

from __future__ import annotations

import logging
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from commplane.engines import Engine, Groups, Served
from commplane.errors import CommplaneError, CommunicatorError
from commplane.testing import run_threads

PURPOSES = frozenset({"tp"})
ENGINE = Engine("torch", "commplane", ">=2", (), "start without it", "MADEUP_REPEATABLE")


class Plan:
    """Routes as a plan has them: custom_ar up to 1 KiB, torch above; in a capture, custom_ar up to 2 KiB."""

    def find(self, collective, op, dtype, *, capturing=False):
        if dtype != "float32":
            return [SimpleNamespace(low=0, high=None, backend="torch")]
        edge = 2048 if capturing else 1024
        return [SimpleNamespace(low=0, high=edge, backend="custom_ar"), SimpleNamespace(low=edge, high=None, backend="torch")]


class Communicator:
    """One that writes down what it is asked for."""

    def __init__(self, plan, device="cpu"):
        self.plan, self.prepared, self.closed, self.device = plan, [], False, device

    def prepare(self, collective, *, dtype, max_bytes):
        self.prepared.append((collective, dtype, max_bytes))

    def all_reduce(self, tensor):
        return tensor * 2

    def all_reduce_(self, tensor):
        return tensor.mul_(2)

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
    groups._plane = Plane()
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


def test_a_group_closes_once_and_the_first_one_takes_the_plane_along():
    groups = at_work()
    plane, tp, ep, world = groups.plane, Group("tp"), Group("ep"), Group("world")
    groups._first = weakref.ref(world)
    for group in (tp, ep):
        group.commplane_served = Served(Communicator(Plan()))
        groups._served[group.commplane_served] = weakref.ref(group)
    served = tp.commplane_served
    assert groups.all_reduce(tp, torch.empty(4)) == served.communicator.all_reduce
    groups.detach(tp)
    groups.detach(tp)
    assert served.communicator.closed and not plane.closed and len(groups.served) == 1
    assert groups.all_reduce(tp, torch.empty(4)) is None and groups.all_reduce(ep, torch.empty(4)) is not None
    groups.detach(world)
    groups.detach(world)
    assert plane.closed and groups.plane is None and groups.served == () and groups.all_reduce(ep, torch.empty(4)) is None


class OnCuda:
    """As much of a tensor on CUDA as is looked at before a sum."""

    dtype, nbytes, is_cuda = torch.float32, 16, True

    def is_contiguous(self):
        return True


@pytest.mark.parametrize("raw", [True, False])
def test_a_graph_that_is_captured_past_the_groups_has_the_engines_own_sums(monkeypatch, raw):
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: raw)
    groups, tp = at_work(), Group("tp")
    tp.commplane_served = Served(Communicator(Plan(), "cuda:0"))
    assert (groups.all_reduce(tp, OnCuda()) is None) is raw and (groups.all_reduce_(tp, OnCuda()) is None) is raw
    with groups.capture():  # one that the groups know of
        assert groups.all_reduce(tp, OnCuda()) is not None


def test_a_tensor_that_is_not_where_the_group_is_stays_the_engines():
    groups, tp = at_work(), Group("tp")
    tp.commplane_served = Served(Communicator(Plan(), "cuda:0"))
    assert groups.all_reduce(tp, torch.empty(4)) is None
    tp.commplane_served = Served(Communicator(Plan(), "cpu"))
    assert groups.all_reduce(tp, OnCuda()) is None and groups.all_reduce(tp, torch.empty(4)) is not None


class World:
    """A default group."""


@pytest.fixture
def default_group(monkeypatch):
    """A default group of two, in which `met(groups)` says that the vote was taken."""
    world = World()
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.group", SimpleNamespace(WORLD=world))

    def met(groups, plane):
        groups._plane, groups._world = plane, weakref.ref(world)
        return groups

    return met


@pytest.mark.timeout(60)
def test_a_group_whose_plan_is_torch_alone_is_the_engines_on_all_ranks(default_group):
    def one(plane):
        groups = default_group(Groups(ENGINE, PURPOSES, logging.getLogger("test")), plane)
        tp, pp = Group("tp"), Group("pp")
        groups._first = weakref.ref(pp)
        out = [groups.attach(tp), groups.attach(pp), groups.all_reduce(tp, torch.empty(4)), plane.communicators]
        groups.detach(tp)
        groups.detach(pp)
        with pytest.raises(CommplaneError, match="a plane that is closed"):
            plane.communicator("again")
        return out

    assert run_threads(2, one) == [[None, None, None, ()]] * 2


@pytest.mark.timeout(60)
def test_a_communicator_that_cannot_be_formed_ends_the_start_of_the_engine(default_group):
    groups = default_group(at_work(), Plane())

    def communicator(name, ranks, device):
        raise CommunicatorError(f"[{name}] no")

    groups.plane.communicator = communicator
    with pytest.raises(CommunicatorError, match=r"\[tp:0\] no"):
        groups.attach(Group("tp"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("asked", "numerics", "at_work"), [("1", "any", False), ("2", "any", False), ("1", "rank_order", True), ("0", "any", True)]
)
def test_who_asks_for_the_same_bits_in_every_batch_gets_sums_in_rank_order_or_the_engines(
    monkeypatch, caplog, asked, numerics, at_work
):
    monkeypatch.setenv("MADEUP_REPEATABLE", asked)
    monkeypatch.setenv("COMMPLANE_NUMERICS", numerics)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", HashStore)
    with caplog.at_level(logging.WARNING):
        assert Groups(ENGINE, PURPOSES, logging.getLogger("test"))._vote() is at_work
    text = "all ranks go on without commplane: wanted numerics=rank_order, because MADEUP_REPEATABLE asks"
    assert (text in caplog.text) is not at_work
