"""`all_reduce_rms_norm_`: the bits of `all_reduce_rms_norm`, in the tensors that were given; threads as ranks."""

from __future__ import annotations

from collections.abc import Callable

import fused
import pytest
import torch
from test_rms_norm import HIDDEN, SOME_SIZES, given, parts, run

from commplane import errors
from commplane.plugins import PluginHost
from commplane.runtime import Plane
from commplane.runtime.dispatch import RecordingTable


@pytest.mark.parametrize("plugins", [PluginHost, fused.host, lambda: fused.host(**SOME_SIZES)], ids=["composed", "whole", "some"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_it_gives_the_bits_of_the_other_in_the_given_tensors(plugins: Callable[[], PluginHost], dtype: torch.dtype) -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        for shape in ((HIDDEN,), (2, HIDDEN), (4, HIDDEN), (2, 3, HIDDEN), (0, HIDDEN)):
            x, (residual, weight) = parts(tp.rank, shape, dtype), given(shape, dtype)
            norm, total = tp.all_reduce_rms_norm(x, residual, weight, eps=1e-5, weight_bias=1.0)
            got = tp.all_reduce_rms_norm_(x, residual, weight, eps=1e-5, weight_bias=1.0)
            assert got[0] is x
            assert got[1] is residual
            assert torch.equal(x, norm)
            assert torch.equal(residual, total)

    run(rank_main, plugins=plugins)


def test_other_layouts_are_written_and_expanded_tensors_refused_before_anything_is_sent() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        shape = (6, HIDDEN)
        x, (residual, weight) = parts(tp.rank, shape, torch.float32), given(shape, torch.float32)
        norm, total = tp.all_reduce_rms_norm(x, residual, weight)
        turned, flipped = x.t().contiguous().t(), residual.t().contiguous().t()
        tp.all_reduce_rms_norm_(turned, flipped, weight)
        assert torch.equal(turned, norm)
        assert torch.equal(flipped, total)
        if tp.rank == 0:
            for one, other in ((x[:1].expand(shape), residual), (x, residual[:1].expand(shape))):
                with pytest.raises(errors.UnsupportedOperation, match="expanded"):
                    tp.all_reduce_rms_norm_(one, other, weight)
            with pytest.raises(errors.UnsupportedOperation, match="all_reduce_rms_norm_ wants a residual of shape"):
                tp.all_reduce_rms_norm_(x, residual[:2], weight)
        tp.all_reduce_rms_norm_(x, residual, weight)
        assert torch.equal(x, norm)

    run(rank_main)


def test_a_capture_records_it_by_its_name() -> None:
    def rank_main(plane: Plane) -> list[str]:
        tp = plane.communicator("tp")
        x, (residual, weight) = parts(tp.rank, (2, HIDDEN), torch.float32), given((2, HIDDEN), torch.float32)
        table = RecordingTable(tp._live)
        table["all_reduce_rms_norm_", None, torch.float32](x, residual, weight, 1e-6, 0.0)
        return table.records

    wanted = f"all_reduce_rms_norm_(torch.float32 {2 * HIDDEN * 4} bytes hidden={HIDDEN} eps=1e-06 weight_bias=0.0)"
    assert run(rank_main, plugins=fused.host) == [[wanted]] * 2
