"""The table of the data plane: which backend's bound call a tensor goes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from commplane.api import BackendSpec, BuildContext, Collective, CommBackend, GroupKey, ReduceOp
from commplane.errors import CommunicatorError, PeerError, UnsupportedOperation
from commplane.runtime.dispatch import DeadTable, DispatchTable, RecordingTable
from commplane.select import Candidate, Plan, compile_routes

ALL = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "barrier")


class Noted(CommBackend):
    """Notes its calls in a list that all backends of a test share."""

    def __init__(self, name: str, calls: list[tuple[object, ...]]) -> None:
        self.name = name
        self.calls = calls
        self.bound = 0

    def open(self, context: BuildContext) -> None:
        raise AssertionError("dispatch opens nothing")

    def close(self) -> None:
        raise AssertionError("dispatch closes nothing")

    def bind(
        self, collective: Collective, op: ReduceOp | None, dtype: torch.dtype | None, *, in_place: bool
    ) -> Callable[..., Any]:
        self.bound += 1
        return super().bind(collective, op, dtype, in_place=in_place)

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        self.calls.append((self.name, "all_reduce_", op))
        return tensor

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        self.calls.append((self.name, "all_reduce", op))
        return tensor.clone()

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self.calls.append((self.name, "all_gather"))
        return tensor

    def reduce_scatter(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        self.calls.append((self.name, "reduce_scatter", op))
        return tensor

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        self.calls.append((self.name, "broadcast", src))
        return tensor

    def barrier(self) -> None:
        self.calls.append((self.name, "barrier"))


class Bench:
    """A dispatch table over backends that note their calls."""

    def __init__(self, **limits: tuple[int, int | None]) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.backends = {name: Noted(name, self.calls) for name in limits}
        specs = tuple(
            BackendSpec(
                name=name,
                api=(1, 0),
                factory="m:C",
                probe="m:p",
                capabilities=ALL,  # type: ignore[arg-type]
                dtypes={"float32", "int8"},
                device="cpu",
                ops={"sum", "max"},
                min_bytes=low,
                max_bytes=high,
            )
            for name, (low, high) in limits.items()
        )
        ready = tuple(Candidate(name, "d 1", "ready") for name in limits)
        self.plan = Plan(GroupKey((0, 1), "cpu", "tp"), ready, compile_routes(specs), specs)
        self.table = DispatchTable("[tp rank 0/2]", self.plan, self.backends)


def of(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.int8)


REDUCE = ("all_reduce_", "sum", torch.int8)


@pytest.mark.parametrize(
    ("nbytes", "name"),
    [(0, "torch"), (99, "torch"), (100, "middle"), (199, "middle"), (200, "torch"), (5000, "torch")],
)
def test_a_tensor_goes_to_the_backend_of_its_size(nbytes: int, name: str) -> None:
    bench = Bench(middle=(100, 199), torch=(0, None))
    bench.table[REDUCE](of(nbytes))
    assert bench.calls == [(name, "all_reduce_", ReduceOp.SUM)]


def test_sizes_count_bytes_and_not_elements() -> None:
    bench = Bench(small=(0, 8), torch=(0, None))
    call = bench.table["all_reduce_", "sum", torch.float32]
    call(torch.zeros(2))
    call(torch.zeros(3))
    assert [c[0] for c in bench.calls] == ["small", "torch"]


@pytest.mark.parametrize("nbytes", [0, 9, 20, 29, 40, 1000])
def test_a_size_that_no_backend_covers_is_an_error_and_no_call(nbytes: int) -> None:
    bench = Bench(low=(10, 19), high=(30, 39))
    with pytest.raises(UnsupportedOperation, match=r"^\[tp rank 0/2\] all_reduce of .*int8 with op sum is served by no backend"):
        bench.table[REDUCE](of(nbytes))
    assert bench.calls == []


def test_a_size_below_a_backend_without_upper_limit_is_an_error_and_no_call() -> None:
    bench = Bench(large=(10, None))
    with pytest.raises(UnsupportedOperation):
        bench.table[REDUCE](of(9))
    bench.table[REDUCE](of(10))
    assert len(bench.calls) == 1


@pytest.mark.parametrize("nbytes", [10, 19, 30, 39])
def test_sizes_around_a_gap_are_served(nbytes: int) -> None:
    bench = Bench(low=(10, 19), high=(30, 39))
    bench.table[REDUCE](of(nbytes))
    assert [c[0] for c in bench.calls] == ["low" if nbytes < 20 else "high"]


def test_the_error_for_a_size_in_a_gap_gives_the_limit_of_each_backend() -> None:
    bench = Bench(low=(0, 19), high=(30, None))
    with pytest.raises(UnsupportedOperation) as caught:
        bench.table[REDUCE](of(25))
    text = str(caught.value)
    assert "low: is for messages up to 19 bytes" in text and "high: is for messages from 30 bytes" in text


def test_the_error_for_a_size_in_a_gap_names_the_size() -> None:
    with pytest.raises(UnsupportedOperation, match="25 bytes"):
        Bench(low=(0, 19), high=(30, None)).table[REDUCE](of(25))


def test_in_place_and_out_of_place_are_two_calls_of_the_backend() -> None:
    bench = Bench(torch=(0, None))
    x = of(4)
    assert bench.table["all_reduce_", "sum", torch.int8](x) is x
    assert bench.table["all_reduce", "max", torch.int8](x) is not x
    assert bench.calls == [("torch", "all_reduce_", ReduceOp.SUM), ("torch", "all_reduce", ReduceOp.MAX)]


@pytest.mark.parametrize("limits", [{"torch": (0, None)}, {"mine": (0, 100), "torch": (0, None)}], ids=["one", "by size"])
def test_every_collective_reaches_its_method(limits: dict[str, tuple[int, int | None]]) -> None:
    bench = Bench(**limits)
    first = next(iter(limits))
    bench.table["all_gather", None, torch.int8](of(4))
    bench.table["reduce_scatter", "sum", torch.int8](of(4))
    bench.table["broadcast", None, torch.int8](of(4), 1)
    assert bench.calls == [(first, "all_gather"), (first, "reduce_scatter", ReduceOp.SUM), (first, "broadcast", 1)]


@pytest.mark.parametrize("limits", [{"torch": (0, None)}, {"mine": (0, 100), "torch": (0, None)}], ids=["one", "by size"])
def test_a_barrier_reaches_the_first_backend_whatever_sizes_it_serves(
    limits: dict[str, tuple[int, int | None]],
) -> None:
    bench = Bench(**limits)
    bench.table["barrier", None, None]()
    assert bench.calls == [(next(iter(limits)), "barrier")]


def test_a_key_is_bound_when_it_is_first_met_and_not_again() -> None:
    bench = Bench(torch=(0, None))
    first = bench.table[REDUCE]
    assert bench.table[REDUCE] is first
    assert bench.backends["torch"].bound == 1


def test_a_backend_for_all_sizes_is_called_without_anything_between() -> None:
    bench = Bench(torch=(0, None))
    assert bench.table["all_gather", None, torch.int8] == bench.backends["torch"].all_gather


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (("all_reduce_", "prod", torch.int8), "wanted op sum, min, max, avg, found 'prod'"),
        (("all_reduce_", "min", torch.int8), "serves op max, sum, not min"),
        (("all_reduce_", "sum", torch.complex64), "serves float32, int8, not complex64"),
        (("all_gather", None, torch.complex64), "all_gather of complex64"),
    ],
)
def test_what_no_backend_serves_is_refused_and_not_remembered(key: tuple[str, str | None, torch.dtype], text: str) -> None:
    bench = Bench(torch=(0, None))
    with pytest.raises(UnsupportedOperation, match=text):
        bench.table[key]
    assert key not in bench.table
    assert bench.backends["torch"].bound == 0


def test_a_dead_table_raises_a_new_error_for_every_call() -> None:
    def gone() -> CommunicatorError:
        return PeerError("rank 1 is gone", [1])

    table = DeadTable(gone)
    raised = []
    for key in (REDUCE, REDUCE, ("barrier", None, None)):
        with pytest.raises(PeerError, match="rank 1 is gone") as caught:
            table[key]
        raised.append(caught.value)
    assert len(set(map(id, raised))) == 3
    assert not table


def test_a_recording_table_passes_calls_through_and_writes_them_down_in_order() -> None:
    bench = Bench(mine=(0, 8), torch=(0, None))
    recording = RecordingTable(bench.table)
    x = torch.zeros(4)
    assert recording["all_reduce_", "sum", torch.float32](x) is x
    recording["all_gather", None, torch.int8](of(3))
    recording["broadcast", None, torch.int8](of(3), 1)
    recording["all_reduce_", "sum", torch.float32](torch.zeros(1))
    assert bench.calls == [
        ("torch", "all_reduce_", ReduceOp.SUM),
        ("mine", "all_gather"),
        ("mine", "broadcast", 1),
        ("mine", "all_reduce_", ReduceOp.SUM),
    ]
    assert recording.records == [
        "all_reduce_(sum torch.float32 16 bytes)",
        "all_gather(torch.int8 3 bytes)",
        "broadcast(torch.int8 3 bytes src=1)",
        "all_reduce_(sum torch.float32 4 bytes)",
    ]


def test_a_recording_table_writes_down_a_barrier() -> None:
    bench = Bench(torch=(0, None))
    recording = RecordingTable(bench.table)
    recording["barrier", None, None]()
    assert (bench.calls, recording.records) == ([("torch", "barrier")], ["barrier()"])


def test_a_recording_table_refuses_what_the_live_one_refuses_and_writes_nothing_down() -> None:
    recording = RecordingTable(Bench(torch=(0, None)).table)
    with pytest.raises(UnsupportedOperation):
        recording["all_reduce_", "prod", torch.int8]
    assert recording.records == []


def test_a_method_that_is_not_overridden_refuses_by_its_name() -> None:
    class Bare(Noted):
        broadcast = CommBackend.broadcast

    with pytest.raises(UnsupportedOperation, match="Bare does not implement broadcast"):
        Bare("bare", []).bind(Collective.BROADCAST, None, torch.int8, in_place=False)(of(4), 0)
