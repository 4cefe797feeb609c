"""Ranks that call with different arguments: every rank raises `MismatchError` and says who called what. Threads as ranks."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

import pytest
import torch
from car_threads import run

from commplane import errors
from commplane.runtime import Communicator, Plane

ORDER = [2, 0, 1]  # group rank 1 is global rank 0, which makes the other call: a rank in an error is a global one
ODD = 0

Make = Callable[[Communicator, bool], object]


def norm(tp: Communicator, hidden: int = 8, eps: float = 1e-6, bias: float = 0.0, dtype: torch.dtype = torch.float32) -> object:
    x = torch.ones(48 // hidden, hidden, dtype=dtype)
    return tp.all_reduce_rms_norm(x, x, torch.ones(hidden, dtype=dtype), eps, bias)


# What the odd rank does (True) and what the others do. Texts: a part of what the odd rank's call is shown as.
CASES: dict[str, tuple[Make, str]] = {
    "count": (lambda tp, odd: tp.all_reduce(torch.ones(9 if odd else 8)), "all_reduce(sum, float32, count=9)"),
    "dtype": (
        lambda tp, odd: tp.all_reduce(torch.ones(8, dtype=torch.int32 if odd else torch.float32)),
        "all_reduce(sum, int32, count=8)",
    ),
    "dtype of the same width": (
        lambda tp, odd: tp.all_gather(torch.ones(8, dtype=torch.bfloat16 if odd else torch.float16)),
        "all_gather(bfloat16, count=8)",
    ),
    "op": (lambda tp, odd: tp.all_reduce_(torch.ones(8), "max" if odd else "sum"), "all_reduce(max, float32, count=8)"),
    "op of reduce_scatter": (lambda tp, odd: tp.reduce_scatter(torch.ones(9), "min" if odd else "avg"), "reduce_scatter(min"),
    "count of reduce_scatter": (lambda tp, odd: tp.reduce_scatter(torch.ones(6 if odd else 9)), "count=2"),
    "count of all_gather": (lambda tp, odd: tp.all_gather(torch.ones(1 if odd else 2)), "all_gather(float32, count=1)"),
    "nothing against something": (lambda tp, odd: tp.all_reduce(torch.ones(0 if odd else 1)), "count=0"),
    "root": (lambda tp, odd: tp.broadcast(torch.ones(8), src=2 if odd else 0), "broadcast(float32, count=8, src=2)"),
    "kind": (lambda tp, odd: tp.all_gather(torch.ones(8)) if odd else tp.all_reduce(torch.ones(8)), "all_gather(float32"),
    "kind, barrier": (lambda tp, odd: tp.barrier() if odd else tp.all_reduce(torch.ones(8)), "barrier"),
    "hidden": (lambda tp, odd: norm(tp, hidden=16 if odd else 8), "all_reduce_rms_norm(hidden=16, float32, count=48"),
    "eps": (lambda tp, odd: norm(tp, eps=1e-5 if odd else 1e-6), "eps=1e-05"),
    "weight bias": (lambda tp, odd: norm(tp, bias=1.0 if odd else 0.0), "weight_bias=1"),
    "norm against sum": (lambda tp, odd: norm(tp) if odd else tp.all_reduce(torch.ones(48)), "all_reduce_rms_norm("),
}


def everyone_raises(call: Make, shown: str) -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp", ORDER)
        with pytest.raises(errors.MismatchError) as caught:
            call(tp, plane.rank == ODD)
        text = str(caught.value)
        assert text.startswith(f"[tp rank {tp.rank}/3 custom_ar] ")
        named = sorted(int(r) for r in re.findall(r"rank (\d) called ", text))
        if plane.rank == ODD:  # it sees that both others differ
            assert named == [1, 2], text
        else:
            assert named == [ODD] and shown in text, text
        with pytest.raises(errors.MismatchError, match="poisoned"):
            tp.all_reduce_(torch.zeros(1))

    run(3, rank_main)


@pytest.mark.parametrize("what", CASES)
def test_every_rank_raises_and_names_the_ranks_that_made_another_call(what: str) -> None:
    everyone_raises(*CASES[what])


def test_a_difference_in_a_later_call_is_shown_with_its_number() -> None:
    """The canary's calls count, so the number is the same on every rank and above those made here."""
    seen = []

    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        for _ in range(5):
            tp.barrier()
        with pytest.raises(errors.MismatchError) as caught:
            tp.all_reduce(torch.ones(1 + plane.rank))
        found = re.search(r"all_reduce\(sum, float32, count=\d\) number (\d+): ranks called", str(caught.value))
        assert found is not None, str(caught.value)
        seen.append(int(found[1]))

    run(2, rank_main)
    assert len(seen) == 2 and len(set(seen)) == 1


@pytest.mark.parametrize("how", ["another place", "another buffer", "staged", "in place or not"])
def test_symmetric_calls_have_to_be_so_on_every_rank_at_the_same_place(how: str) -> None:
    def call(tp: Communicator, odd: bool) -> object:
        first, second = tp.empty(2000, dtype=torch.float32), tp.empty(2000, dtype=torch.float32)
        x = first[:1000]
        if odd and how == "another place":
            x = first[1:1001]
        if odd and how == "another buffer":
            x = second[:1000]
        if odd and how == "staged":
            x = torch.empty(1000)
        x.fill_(1.0)
        return tp.all_reduce(x) if odd and how == "in place or not" else tp.all_reduce_(x)

    everyone_raises(call, "all_reduce(sum, float32, count=1000")


def test_other_communicators_of_the_plane_go_on() -> None:
    def rank_main(plane: Plane) -> float:
        tp, other = plane.communicator("tp"), plane.communicator("other")
        with pytest.raises(errors.MismatchError):
            tp.all_reduce(torch.ones(1 + plane.rank))
        return other.all_reduce(torch.ones(1)).item()

    assert run(2, rank_main) == [2.0, 2.0]


def test_a_rank_that_comes_when_the_others_have_given_up_is_told_who_they_are() -> None:
    """Two ranks do not wait for a third to know that they differ; it finds the communicator given up."""
    differed = threading.Barrier(3)

    def rank_main(plane: Plane) -> tuple[str, tuple[int, ...]]:
        tp = plane.communicator("tp", ORDER)
        if plane.rank == 1:
            differed.wait(60)
        try:
            tp.all_reduce(torch.ones(8 if plane.rank == 2 else 9))
        except errors.MismatchError as error:
            differed.wait(60)
            return str(error), ()
        except errors.PeerError as error:
            return str(error), error.missing_ranks
        return "", ()

    first, late, second = run(3, rank_main)
    assert "rank 2 called all_reduce(sum, float32, count=8)" in first[0] and "rank 1 called" not in first[0]
    assert "rank 0 called all_reduce(sum, float32, count=9)" in second[0] and "rank 1 called" not in second[0]
    assert "gave up" in late[0] and sorted(late[1]) == [0, 2]


def test_equal_counts_of_different_shapes_are_no_mismatch() -> None:
    def rank_main(plane: Plane) -> list[int]:
        tp = plane.communicator("tp")
        return list(tp.all_reduce(torch.ones((2, 6) if plane.rank else (3, 4))).shape)

    assert run(2, rank_main) == [[3, 4], [2, 6]]
