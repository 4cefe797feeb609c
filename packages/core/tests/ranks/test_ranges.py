"""Backends that say for which sizes they should be chosen, once they are open, on ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import devices
import pytest
import torch

from commplane import errors
from commplane.api import Capability, Collective, SizeRange
from commplane.runtime import Plane
from commplane.testing import run_threads

CAPTURES = devices.spec(capabilities={Capability.ALL_REDUCE, Capability.CAPTURE})


def run(function: Any, ranges: Any, spec: Any = CAPTURES) -> list[Any]:
    """`ranges` gets the rank before what a backend is asked."""
    return run_threads(
        2,
        function,
        plugins=lambda rank: devices.host(spec, ranges=lambda *asked: ranges(rank, *asked)),
        config=lambda _rank: {"timeout": 30},
        timeout=60,
    )


def sizes(_rank: int, collective: Collective, dtype: str, capturing: bool) -> Sequence[SizeRange]:
    return [SizeRange(0, 64, "registered")] if capturing else [SizeRange(0, 64, "one_shot"), SizeRange(128, None, "two_shot")]


def test_calls_and_captured_calls_go_where_the_answers_say() -> None:
    def rank_main(plane: Plane) -> list[str]:
        with plane.communicator("tp", device="cpu") as comm:
            twin: Any = comm.backends[0]
            seen: list[str] = []
            twin.all_reduce_ = lambda tensor, op: (seen.append(f"{tensor.nbytes}"), type(twin).all_reduce_(twin, tensor, op))[1]
            for count in (8, 16, 32):
                assert comm.all_reduce_(torch.ones(count)).sum() == 2 * count
            seen.append("capture")
            with plane.capture():
                for count in (8, 16, 32):
                    comm.all_reduce_(torch.ones(count))
            seen.append("after")
            comm.prepare(max_bytes=256)
            comm.all_reduce_(torch.ones(32))
            return seen

    assert run(rank_main, sizes) == [["32", "128", "capture", "32", "after", "128"]] * 2


def test_the_plan_and_its_explanation_are_equal_on_all_ranks_and_name_the_algorithms() -> None:
    def rank_main(plane: Plane) -> tuple[str, ...]:
        with plane.communicator("tp", device="cpu") as comm:
            asked = ({"nbytes": 8}, {"nbytes": 128}, {"nbytes": 8, "graph": True}, {"nbytes": 128, "graph": True})
            return tuple(str(comm.plan.explain(**a)).splitlines()[0].partition(" on cpu: ")[2] for a in asked)

    wanted = (
        "twin one_shot, 0 <= bytes < 64",
        "twin two_shot, 128 <= bytes < inf",
        "twin registered, 0 <= bytes < 64",
        "torch",
    )
    assert run(rank_main, sizes) == [wanted] * 2


@pytest.mark.parametrize("capturing", [False, True])
def test_ranks_whose_backends_answer_differently_get_an_error_that_shows_what_differs(capturing: bool) -> None:
    def differ(rank: int, collective: Collective, dtype: str, in_capture: bool) -> Sequence[SizeRange]:
        return [SizeRange(0, 64 + rank * (in_capture is capturing), "one_shot")]

    def rank_main(plane: Plane) -> str:
        with pytest.raises(errors.AgreementError) as caught:
            plane.communicator("tp", device="cpu")
        return str(caught.value)

    first, second = run(rank_main, differ)
    assert first == second
    asked = re.escape("twin all_reduce float32" + (" in a graph" if capturing else ""))
    assert re.search(
        rf"ranks disagree on the sizes that a backend offers: rank 0 has {asked}='0 <= bytes < 64 \(one_shot\)'; "
        rf"rank 1 has {asked}='0 <= bytes < 65 \(one_shot\)'",
        first,
    )


def test_a_backend_that_cannot_answer_on_one_rank_is_left_out_on_all_with_the_reason() -> None:
    def fail(rank: int, *_asked: Any) -> None:
        if rank == 1:
            raise OSError("the table of sizes cannot be read")

    def rank_main(plane: Plane) -> tuple[str, ...]:
        with plane.communicator("tp", device="cpu") as comm:
            twin = next(c for c in comm.plan.candidates if c.name == "twin")
            return (*comm.plan.backends, twin.state, twin.reason)

    first, second = run(rank_main, fail)
    assert first == second
    assert first[:2] == ("torch", "build")
    assert "rank 1" in first[2] and "the table of sizes cannot be read" in first[2]


def test_a_plugin_made_before_ranges_came_is_chosen_for_what_its_spec_says() -> None:
    def rank_main(plane: Plane) -> Any:
        with plane.communicator("tp", device="cpu") as comm:
            routes = [r for r in comm.plan.routes if r.dtype == "float32" and r.collective is Collective.ALL_REDUCE]
            return comm.plan.offers, {(r.low, r.high, r.backend, r.algorithm) for r in routes if str(r.op) == "sum"}

    old = devices.spec(api=(1, 1))
    out = run_threads(2, rank_main, plugins=lambda _rank: devices.host(old), config=lambda _rank: {"timeout": 30}, timeout=60)
    assert out == [((), {(0, None, "twin", "")})] * 2
