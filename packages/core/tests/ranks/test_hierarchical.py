"""All-reduce in two levels over hosts that are told apart by their alias; inside of them torch, which is always there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch

from commplane.api import BackendSpec, Usable, hookimpl
from commplane.backends.torch_dist import TorchDistributed
from commplane.errors import CommplaneWarning, CommunicatorError, PeerError, UnsupportedOperation
from commplane.plugins import PluginHost
from commplane.runtime import Plane
from commplane.testing import run_threads

pytestmark = pytest.mark.timeout(90)

EVEN, THREE, UNEVEN, FOUR = (0, 0, 1, 1), (0, 0, 1, 1, 2, 2), (0, 1, 0, 2, 2), (0, 0, 1, 2, 3)
"""The host of each rank."""


def on_hosts(
    hosts: Sequence[int], function: Callable[[Plane], Any], plugins: Callable[[int], PluginHost] | None = None, **config: Any
) -> list[Any]:
    """`function` on a rank of each host; what each returned. Raises what the first one raised."""
    inside = {"hierarchical": {"inside": "torch", **config.pop("hierarchical", {})}}
    outcomes = run_threads(
        len(hosts),
        function,
        plugins=plugins or (lambda _rank: PluginHost()),
        config=lambda rank: {"host_alias": f"host{hosts[rank]}", **inside, **config},
        timeout=80,
    )
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


def reduced(plane: Plane, sizes: Sequence[int], dtypes: Sequence[torch.dtype], algorithm: str = "auto") -> list[Any]:
    """Compare sums, extremes and means with what they have to be; the bits of some that must be rounded, for the comparison."""
    comm = plane.communicator("tp", options={"hierarchical": {"algorithm": algorithm}})
    assert comm.plan.backends == ("hierarchical", "torch"), str(comm.plan)
    n, bits = plane.world_size, []
    for dtype in dtypes:
        for size in sizes:
            rows = torch.stack([(torch.arange(size) * (r + 1) + r) % 7 for r in range(n)]).to(dtype)
            mine = rows[plane.rank].clone()
            wide = rows.double()
            wanted = {"sum": wide.sum(0), "min": wide.amin(0), "max": wide.amax(0)}
            if dtype.is_floating_point:
                wanted["avg"] = (wide.sum(0).to(dtype) / n).double()
            for op, right in wanted.items():
                out = comm.all_reduce(mine, op)
                assert torch.equal(out.double(), right), f"{op} of {size} {dtype}"
                assert torch.equal(mine, rows[plane.rank]), "the input of an all-reduce out of place has changed"
                again = mine.clone()
                assert comm.all_reduce_(again, op) is again and torch.equal(again, out)
            if dtype.is_floating_point:
                torch.manual_seed(plane.rank)
                bits.append(comm.all_reduce(torch.randn(size).to(dtype)).double().tolist())
    comm.close()
    return bits


@pytest.mark.parametrize("hosts", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_every_dtype_and_op_is_right_and_equal_on_all_ranks(hosts: Sequence[int]) -> None:
    dtypes = [getattr(torch, d) for d in ["float32", "float64", "bfloat16", "float16", "int8", "uint8", "int32", "int64"]]
    outcomes = on_hosts(hosts, lambda plane: reduced(plane, (5, 1000), dtypes))
    assert all(o == outcomes[0] for o in outcomes)


@pytest.mark.parametrize("hosts", [EVEN, THREE], ids=["2x2", "3x2"])
def test_shards_are_right_where_nothing_divides_evenly_and_where_a_rank_has_nothing(hosts: Sequence[int]) -> None:
    outcomes = on_hosts(hosts, lambda plane: reduced(plane, (1, 3, 10_003), [torch.bfloat16], "shards"))
    assert all(o == outcomes[0] for o in outcomes)


@pytest.mark.parametrize("algorithm", ["leaders", "shards"])
def test_a_large_message_is_whole(algorithm: str) -> None:
    size = (1 << 19) + 17

    def rank_main(plane: Plane) -> bool:
        comm = plane.communicator("tp", options={"hierarchical": {"algorithm": algorithm}})
        ramp = torch.arange(size, dtype=torch.float32) % 1001
        wanted = 4 * ramp + 6
        whole = torch.equal(comm.all_reduce(ramp + plane.rank), wanted)
        wide = torch.zeros(size, 2)
        wide[:, 1] = ramp + plane.rank
        comm.all_reduce_(wide[:, 1])  # in place in every other element
        return whole and torch.equal(wide[:, 1], wanted) and not bool(wide[:, 0].any())

    assert on_hosts(EVEN, rank_main) == [True] * 4


def test_the_plan_says_the_way_and_what_runs_on_both_levels() -> None:
    def rank_main(plane: Plane) -> list[str]:
        plan = plane.communicator("tp").plan
        facts = next(c.facts for c in plan.candidates if c.name == "hierarchical")
        return [str(facts["hosts"]), *(plan.explain("all_reduce", nbytes=n).algorithm for n in (64, 1 << 26))]

    hosts = "ranks 0, 1 | ranks 2, 3"
    wanted = [hosts, *["leaders: torch inside, torch between"] * 2]
    assert on_hosts(EVEN, rank_main) == [wanted] * 4


def refusal(plane: Plane, **options: Any) -> str:
    comm = plane.communicator("tp", options={"hierarchical": options} if options else None)
    assert "hierarchical" not in comm.plan.backends
    assert comm.all_reduce(torch.ones(2)).tolist() == [float(plane.world_size)] * 2
    return next(f"{c.state}: {c.reason}" for c in comm.plan.candidates if c.name == "hierarchical")


@pytest.mark.parametrize(
    ("hosts", "options", "words"),
    [
        ((0, 0, 0), {}, "probe: the group is inside one host, which has one level"),
        ((0, 1, 2), {}, "probe: no host has more than one rank of the group (rank 0 | rank 1 | rank 2)"),
        (UNEVEN, {"algorithm": "shards"}, "wanted auto, leaders for this group, found 'shards'"),
        (EVEN, {"inside": "auto"}, "wanted shared memory inside the hosts, found only torch"),
    ],
    ids=["one host", "one rank a host", "shards on uneven hosts", "nothing faster than torch"],
)
def test_it_is_left_out_with_its_reason_and_the_group_runs_on_torch(
    hosts: Sequence[int], options: dict[str, Any], words: str
) -> None:
    for reason in on_hosts(hosts, lambda plane: refusal(plane, **options)):
        assert words in reason


def test_it_promises_no_order_so_a_group_that_wants_one_does_not_run_on_it() -> None:
    def rank_main(plane: Plane) -> str:
        try:
            plane.communicator("tp").all_reduce(torch.ones(3))
        except UnsupportedOperation as error:
            return str(error)
        return ""

    for text in on_hosts(EVEN, rank_main, numerics="rank_order"):
        assert "hierarchical: does not add in" in text and "numerics=rank_order demands" in text


class Inside(TorchDistributed):
    """A backend for inside a host that opens on all ranks but one of the second host, and refuses what is large."""

    opened: ClassVar[list[int]] = []
    closed: ClassVar[list[int]] = []
    fails_on: ClassVar[set[int]] = set()

    def open(self, context: Any) -> None:
        self.rank = context.ranks[context.rank]
        if self.rank in self.fails_on:
            raise OSError("no memory on this rank")
        super().open(context)
        self.opened.append(self.rank)

    def all_reduce_(self, tensor: Any, op: Any) -> Any:
        if tensor.numel() > 1 << 20 and self.rank < 2:
            raise UnsupportedOperation("too large on the first host")
        return super().all_reduce_(tensor, op)

    def close(self) -> None:
        self.closed.append(getattr(self, "rank", -1))
        super().close()


class OnlyInside:
    @hookimpl
    def commplane_register_comm_backends(self) -> list[BackendSpec]:
        spec = BackendSpec(
            name="inside",
            api=(1, 0),
            factory=f"{__name__}:Inside",
            probe=f"{__name__}:probe_inside",
            capabilities={"all_reduce", "broadcast"},
            dtypes={"float32"},
            device="cpu",
            max_world_size=2,
        )
        return [spec]


def probe_inside(request: Any, facts: Any) -> Any:
    return Usable()


def with_inside(_rank: int) -> PluginHost:
    host = PluginHost()
    host.register(OnlyInside(), "inside")
    return host


@pytest.fixture
def inside() -> Iterator[type[Inside]]:
    """Its account, new."""
    Inside.opened.clear()
    Inside.closed.clear()
    Inside.fails_on.clear()
    yield Inside
    assert set(Inside.opened) <= set(Inside.closed)


@pytest.mark.filterwarnings("ignore:backend 'inside' was asked for")
def test_what_fails_inside_one_host_is_rolled_back_there_and_the_other_host_goes_on_with_it(inside: type[Inside]) -> None:
    def rank_main(plane: Plane) -> list[str]:
        comm = plane.communicator("tp", options={"hierarchical": {"inside": "inside", "between": "torch"}})
        for size in (1, 4096):
            out = comm.all_reduce(torch.full((size,), float(plane.rank)))
            assert torch.equal(out, torch.full((size,), 6.0))
        return [comm.backends[0]._inside.backends[0], comm.plan.explain("all_reduce", nbytes=64).algorithm]

    inside.fails_on.add(3)
    level = "leaders: inside or torch inside, torch between"
    assert on_hosts(EVEN, rank_main, with_inside) == [["inside", level]] * 2 + [["torch", level]] * 2
    assert set(inside.opened) <= {0, 1, 2}


def test_what_one_host_refuses_ends_the_communicator_on_all_ranks_because_the_others_have_begun(inside: type[Inside]) -> None:
    told = threading.Barrier(4, timeout=45)

    def rank_main(plane: Plane) -> list[str]:
        comm = plane.communicator("tp", options={"hierarchical": {"inside": "inside", "between": "torch"}})
        assert comm.all_reduce_(torch.ones(8)).tolist() == [4.0] * 8
        said = []
        for size in ((1 << 20) + 1, 8):
            with pytest.raises(CommunicatorError) as caught:
                comm.all_reduce_(torch.ones(size))
            said.append(str(caught.value))
            told.wait()
        return said

    outcomes = on_hosts(EVEN, rank_main, with_inside, run_timeout=120.0, hierarchical={"patience": 1.0}, flight_records=0)
    for rank, (first, second) in enumerate(outcomes):
        assert (rank < 2) == ("refused inside the call: too large on the first host" in first)
        assert "is poisoned by an earlier fault" in second


def test_closing_and_making_it_again_works_and_workspaces_are_prepared_on_both_levels() -> None:
    def rank_main(plane: Plane) -> list[float]:
        out = []
        for _ in range(2):
            with plane.communicator("tp") as comm:
                comm.prepare("all_reduce", dtype=torch.float32, max_bytes=1 << 20)
                out.append(comm.all_reduce(torch.full((3,), float(plane.rank)))[0].item())
                with plane.capture():  # nothing in the plan captures: a capture passes by
                    out.append(comm.all_reduce(torch.ones(1)).item())
                assert len(plane.communicators) == 1, "inner groups are nobody's but the backend's"
        return out

    assert on_hosts(EVEN, rank_main) == [[6.0, 4.0, 6.0, 4.0]] * 4


@pytest.mark.parametrize(
    "absent", [3, pytest.param(0, marks=pytest.mark.long)], ids=["behind another rank of its host", "the first of its host"]
)
def test_a_rank_that_does_not_come_is_named_by_all_that_wait_also_on_the_other_host(absent: int) -> None:
    told = threading.Barrier(4, timeout=60)

    def rank_main(plane: Plane) -> list[int]:
        comm = plane.communicator("tp")
        comm.all_reduce_(torch.ones(4))
        missing: list[int] = []
        if plane.rank != absent:
            with pytest.raises(PeerError, match=f"lost rank {absent} ") as caught:
                comm.all_reduce_(torch.ones(4))
            missing = list(caught.value.missing_ranks)
            with pytest.raises(PeerError, match="is poisoned by an earlier fault"):
                comm.all_reduce_(torch.ones(4))
        told.wait()
        comm.poison(PeerError("this test is over", []))
        return missing

    outcomes = on_hosts(EVEN, rank_main, run_timeout=2.0, hierarchical={"patience": 2.5}, flight_records=0)
    assert outcomes == [[] if r == absent else [absent] for r in range(4)]


def test_who_lost_no_neighbour_stops_as_soon_as_those_who_did_although_nobody_leaves_or_drops_the_error() -> None:
    gone, told = 4, threading.Barrier(5, timeout=45)  # far less than a call may take

    def rank_main(plane: Plane) -> list[int]:
        comm = plane.communicator("tp")
        comm.all_reduce_(torch.ones(4))
        missing: list[int] = []
        if plane.rank == gone:
            comm.abort()  # closes its connections, as the end of its process would
            told.wait()
        else:
            with pytest.raises(PeerError) as caught:
                comm.all_reduce_(torch.ones(1 << 16))
            told.wait()
            missing = list(caught.value.missing_ranks)
        comm.poison(PeerError("this test is over", []))
        return missing

    outcomes = on_hosts(FOUR, rank_main, run_timeout=120.0, hierarchical={"patience": 1.0}, flight_records=0)
    assert outcomes == [[gone]] * 4 + [[]]


def test_who_asks_for_it_where_it_cannot_be_is_warned_once() -> None:
    with pytest.warns(CommplaneWarning, match="'hierarchical' was asked for but .* the group is inside one host"):
        outcomes = run_threads(3, lambda plane: plane.communicator("tp", backends=["hierarchical"]).plan.backends)
    assert outcomes == [("torch",)] * 3
