"""`custom_ar` in a plan: what it serves and what not, groups, layouts, a capture that fails. Threads as ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from car_oracle import DTYPES, INTEGERS
from car_threads import host, run

from commplane import errors
from commplane.runtime import Plane
from commplane.testing import run_threads


def test_every_collective_and_dtype_that_it_declares_is_routed_to_it() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        assert tp.plan.backends == ("custom_ar", "torch")
        for dtype in DTYPES:
            for collective in ("all_reduce", "all_gather", "reduce_scatter", "broadcast"):
                for nbytes in (0, 64, 1 << 30):
                    assert tp.plan.explain(collective, nbytes=nbytes, dtype=dtype).chosen == "custom_ar", (collective, dtype)
            chosen = tp.plan.explain("all_reduce_rms_norm", dtype=dtype).chosen
            assert chosen == ("custom_ar" if dtype.is_floating_point else None), dtype
        assert tp.plan.explain("barrier").chosen == "custom_ar"
        for collective in ("all_reduce", "all_gather", "reduce_scatter", "broadcast"):
            getattr(tp, collective)(torch.ones(2))
        records = tp.backends[0].flight_records()[-4:]
        assert [r.collective for r in records] == ["all_reduce", "all_gather", "reduce_scatter", "broadcast"]
        assert [r.nbytes for r in records] == [8] * 4 and {r.state for r in records} == {"done"}

    run(2, rank_main)


NOT_SERVED = [
    torch.int16,
    torch.bool,
    torch.complex64,
    *(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64") if hasattr(torch, name)),
]


def test_dtypes_that_no_backend_serves_are_refused_before_anything_is_sent() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        for dtype in NOT_SERVED:
            x = torch.zeros(4, dtype=dtype)
            name = str(dtype).removeprefix("torch.")
            for call in (tp.all_reduce, tp.all_reduce_, tp.all_gather, tp.reduce_scatter, tp.broadcast):
                with pytest.raises(errors.UnsupportedOperation, match=rf"{name}.*served by no backend"):
                    call(x)
            assert tp.plan.explain("all_gather", dtype=dtype).chosen is None
        for dtype in INTEGERS:
            x = torch.zeros(4, dtype=dtype)
            with pytest.raises(errors.UnsupportedOperation, match="avg"):
                tp.all_reduce(x, "avg")
            with pytest.raises(errors.UnsupportedOperation, match="floating-point"):
                tp.all_reduce_rms_norm(x, x, x)
        assert tp.all_reduce(torch.ones(1)).item() == 2.0

    run(2, rank_main)


def test_unsupported_calls_say_so_and_do_no_harm() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        with pytest.raises(errors.UnsupportedOperation, match="wanted op sum, min, max, avg, found 'mean'"):
            tp.all_reduce(torch.zeros(3), "mean")
        with pytest.raises(errors.UnsupportedOperation, match="wanted a tensor on cpu, found one on meta"):
            tp.all_reduce(torch.zeros(3, device="meta"))
        with pytest.raises(errors.UnsupportedOperation, match="group rank below 2, found 2"):
            tp.broadcast(torch.zeros(3), src=2)
        with pytest.raises(errors.UnsupportedOperation, match="2 ranks divide"):
            tp.reduce_scatter(torch.zeros(3))
        assert tp.all_reduce(torch.ones(1)).item() == 2.0

    run(2, rank_main)


def test_overlapping_groups_have_segments_of_their_own() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        pairs = [plane.communicator("pair", g) for g in ([0, 1], [1, 2], [2, 0]) if plane.rank in g]
        for _ in range(20):
            assert tp.all_reduce(torch.tensor([2.0**plane.rank])).item() == 7.0
            for pair in pairs:
                wanted = sum(2.0**r for r in pair.ranks)
                assert pair.all_reduce(torch.tensor([2.0**plane.rank])).item() == wanted

    run(3, rank_main)


def test_a_group_of_one_rank_runs_on_torch() -> None:
    def rank_main(plane: Plane) -> None:
        alone = plane.communicator("alone", [plane.rank])
        assert alone.plan.backends == ("torch",)
        assert alone.all_reduce(torch.tensor([5.0])).item() == 5.0

    run(2, rank_main)


def test_layouts_that_cannot_be_read_or_written_are_refused_and_do_no_harm() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        with pytest.raises(errors.UnsupportedOperation, match="wanted a dense tensor"):
            tp.all_reduce(torch.eye(3).to_sparse())
        calls: list[Callable[[torch.Tensor], torch.Tensor]] = [tp.all_reduce_, tp.broadcast]
        for call in calls:
            with pytest.raises(errors.UnsupportedOperation, match="can be written in place, found one expanded"):
                call(torch.ones(1).expand(3))
        cuts: list[Callable[[torch.Tensor], torch.Tensor]] = [tp.all_gather, tp.reduce_scatter]
        for cut in cuts:
            with pytest.raises(errors.UnsupportedOperation, match="found a scalar"):
                cut(torch.tensor(1.0))
        assert tp.all_reduce(torch.tensor(1.0)).item() == 2.0
        assert tp.all_reduce(torch.ones(1)).item() == 2.0

    run(2, rank_main)


def test_a_failed_capture_reaches_ranks_that_wait_in_any_communicator() -> None:
    def rank_main(plane: Plane) -> str:
        plane.communicator("a")
        b = plane.communicator("b")
        try:
            with plane.capture():
                if plane.rank == 1:
                    raise ValueError("out of luck")
                b.all_reduce(torch.ones(3))
        except (ValueError, errors.CommplaneError) as error:
            return str(error)
        return ""

    # Rank 0 waits in b while rank 1 leaves: not for the deadline, which is longer than the test.
    out = run_threads(2, rank_main, plugins=lambda _rank: host(), config=lambda _rank: {"timeout": 300}, timeout=60)
    assert out[1] == "out of luck" and "rank 1 gave up" in str(out[0]), out
