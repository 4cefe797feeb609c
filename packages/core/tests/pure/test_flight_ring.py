"""What core writes down around a call of a backend that keeps no records."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from commplane.api import BuildContext, Collective, CommBackend, FlightRecord, GroupKey, ReduceOp
from commplane.errors import PeerError, UnsupportedOperation
from commplane.flight import GroupFlight
from commplane.flight.ring import FlightRing, bindable

LABEL = ("all_reduce", "sum", "float32")


class Tensor:
    """What a ring looks at."""

    def __init__(self, nbytes: int = 64, layout: str = "torch.strided") -> None:
        self.nbytes = nbytes
        self.layout = layout


def same(tensor: Tensor) -> Tensor:
    return tensor


def seqs(ring: FlightRing) -> list[int]:
    return [r.seq for r in ring.records()]


def test_a_new_ring_holds_nothing() -> None:
    assert FlightRing(4).records() == []


@pytest.mark.parametrize("wrap", ["wrap", "wrap_one"])
def test_a_call_goes_through_and_leaves_a_record(wrap: str) -> None:
    ring, x = FlightRing(4), Tensor(48)
    assert getattr(ring, wrap)(same, LABEL)(x) is x
    (record,) = ring.records()
    assert (record.seq, record.collective, record.op, record.dtype, record.nbytes) == (1, "all_reduce", "sum", "float32", 48)
    assert (record.state, record.detail, record.waiting_for) == ("done", "", ())
    assert record.finished_ns is not None and 0 < record.started_ns <= record.finished_ns


@pytest.mark.parametrize("calls", [1, 3, 4, 5, 8, 9, 41])
def test_the_last_calls_are_held_oldest_first_and_numbered_from_the_very_first(calls: int) -> None:
    ring = FlightRing(4)
    recorded = ring.wrap_one(same, LABEL)
    for n in range(1, calls + 1):
        recorded(Tensor(n))
    wanted = list(range(max(1, calls - 3), calls + 1))
    assert seqs(ring) == wanted
    assert [r.nbytes for r in ring.records()] == wanted


def test_wrapped_calls_of_one_ring_share_its_numbers() -> None:
    ring = FlightRing(8)
    reduce, gather = ring.wrap_one(same, LABEL), ring.wrap(same, ("all_gather", None, "int8"))
    barrier = ring.wrap(lambda: None, ("barrier", None, None))
    reduce(Tensor()), gather(Tensor()), barrier(), reduce(Tensor())
    assert [(r.seq, r.collective, r.nbytes) for r in ring.records()] == [
        (1, "all_reduce", 64),
        (2, "all_gather", 64),
        (3, "barrier", 0),
        (4, "all_reduce", 64),
    ]


@pytest.mark.parametrize("wrap", ["wrap", "wrap_one"])
def test_a_call_that_has_not_returned_is_running(wrap: str) -> None:
    ring = FlightRing(4)
    seen: list[FlightRecord] = []

    def look(tensor: Tensor) -> None:
        seen.extend(ring.records())

    getattr(ring, wrap)(look, LABEL)(Tensor())
    assert [(r.state, r.finished_ns) for r in seen] == [("running", None)]


@pytest.mark.parametrize("wrap", ["wrap", "wrap_one"])
@pytest.mark.parametrize("error", [PeerError("rank 1 is lost", [1]), KeyboardInterrupt("stop")])
def test_a_call_that_raised_is_failed_and_says_what_it_raised(wrap: str, error: BaseException) -> None:
    ring = FlightRing(4)

    def fail(_tensor: Tensor) -> None:
        raise error

    with pytest.raises(type(error)):
        getattr(ring, wrap)(fail, LABEL)(Tensor())
    (record,) = ring.records()
    assert (record.state, record.detail) == ("failed", f"{type(error).__name__}: {error}")
    assert record.finished_ns is not None


@pytest.mark.parametrize("wrap", ["wrap", "wrap_one"])
@pytest.mark.parametrize(
    ("error", "layout"), [(UnsupportedOperation("no"), "torch.strided"), (RuntimeError("sparse"), "torch.sparse_coo")]
)
def test_a_call_that_was_refused_before_anything_was_sent_has_no_number(wrap: str, error: Exception, layout: str) -> None:
    ring = FlightRing(4)

    def refuse(_tensor: Tensor) -> None:
        raise error

    recorded, refused = ring.wrap_one(same, LABEL), getattr(ring, wrap)(refuse, LABEL)
    for _ in range(3):
        recorded(Tensor())
        with pytest.raises(type(error)):
            refused(Tensor(layout=layout))
    recorded(Tensor())
    assert seqs(ring) == [3, 4]  # of four rows, two were of refused calls
    for _ in range(4):
        recorded(Tensor())
    assert seqs(ring) == [5, 6, 7, 8]


def test_what_has_no_size_raises_its_own_error_and_leaves_nothing() -> None:
    ring = FlightRing(4)
    with pytest.raises(AttributeError, match="nbytes"):
        ring.wrap_one(same, LABEL)([1.0])
    assert ring.records() == []


def test_neither_tensors_nor_exceptions_are_kept_alive() -> None:
    ring = FlightRing(4)

    class Lost(Exception):
        pass

    def fail(_tensor: Tensor) -> None:
        raise Lost("now")

    x, y = Tensor(), Tensor()
    ring.wrap_one(same, LABEL)(x)
    gone: list[weakref.ref[Any]] = [weakref.ref(x), weakref.ref(y)]
    try:
        ring.wrap(fail, LABEL)(y)
    except Lost as error:
        gone.append(weakref.ref(error))
    del x, y
    gc.collect()
    assert [r() for r in gone] == [None, None, None]
    assert [r.detail for r in ring.records()] == ["", "Lost: now"]


def test_records_read_while_another_thread_calls_are_whole_and_in_order() -> None:
    ring, stop = FlightRing(32), threading.Event()
    recorded = ring.wrap_one(same, LABEL)

    def calls() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            recorded(Tensor(n))  # its size is its number

    thread = threading.Thread(target=calls, daemon=True)
    thread.start()
    try:
        looks = 0
        while looks < 300:
            records = ring.records()
            if not records:
                continue
            looks += 1
            assert [r.nbytes for r in records] == [r.seq for r in records]
            numbers = [r.seq for r in records]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            assert all(r.state == "done" for r in records[:-1])
    finally:
        stop.set()
        thread.join()


class Plain(CommBackend):
    """Keeps no records."""

    def open(self, context: BuildContext) -> None:
        raise AssertionError("a ring opens nothing")

    def close(self) -> None:
        raise AssertionError("a ring closes nothing")

    def all_reduce_(self, tensor: Any, op: ReduceOp) -> Any:
        return tensor

    def barrier(self) -> None:
        return None

    def broadcast(self, tensor: Any, src: int) -> Any:
        return tensor

    def bind(self, collective: Collective, op: ReduceOp | None, dtype: Any, *, in_place: bool) -> Callable[..., Any]:
        return super().bind(collective, op, dtype, in_place=in_place)


class Keeper(Plain):
    """Keeps records."""

    keeps_flight_records = True

    def flight_records(self) -> list[FlightRecord]:
        return [FlightRecord(n, "barrier", None, None, 0, "done", n, n) for n in range(1, 6)]


def flight(length: int, **backends: CommBackend) -> GroupFlight:
    key = GroupKey((0, 1), "cpu", "tp")
    return GroupFlight(key, 1, 0, "plan", backends, length, lambda _error, _reason: None, lambda _group: None)


def test_a_backend_that_keeps_records_is_bound_as_it_is() -> None:
    keeper, plain = Keeper(), Plain()
    assert bindable({"keeper": keeper}, {}) == {"keeper": keeper}
    bound = flight(8, keeper=keeper, plain=plain).bindable()
    assert bound["keeper"] is keeper and bound["plain"] is not plain


def test_with_a_length_of_0_every_backend_is_bound_as_it_is_and_nothing_is_read() -> None:
    plain, keeper = Plain(), Keeper()
    off = flight(0, plain=plain, keeper=keeper)
    assert off.bindable() == {"plain": plain, "keeper": keeper}
    assert off.to_json()["records"] == {}


def test_bound_calls_are_written_down_with_op_and_dtype() -> None:
    group = flight(8, plain=Plain())
    table = group.bindable()
    x = Tensor(8)
    table["plain"].bind(Collective.ALL_REDUCE, ReduceOp.MAX, "torch.int8", in_place=True)(x)
    table["plain"].bind(Collective.BROADCAST, None, "torch.int8", in_place=False)(x, 1)
    table["plain"].bind(Collective.BARRIER, None, None, in_place=False)()
    said = group.to_json()["records"]["plain"]
    assert [(r["seq"], r["collective"], r["op"], r["dtype"], r["nbytes"]) for r in said] == [
        (1, "all_reduce", "max", "int8", 8),
        (2, "broadcast", None, "int8", 8),
        (3, "barrier", None, None, 0),
    ]


def test_of_records_that_a_backend_keeps_as_many_are_taken_as_the_setting_says() -> None:
    assert [r["seq"] for r in flight(3, keeper=Keeper()).to_json()["records"]["keeper"]] == [3, 4, 5]


def test_a_backend_that_cannot_tell_is_noted_and_hides_no_other() -> None:
    class Broken(Keeper):
        def flight_records(self) -> list[FlightRecord]:
            raise ValueError("torn")

    said = flight(4, broken=Broken(), keeper=Keeper()).to_json()
    assert said["problems"] == {"broken": "ValueError: torn"}
    assert list(said["records"]) == ["keeper"]
