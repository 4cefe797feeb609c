# SPDX-License-Identifier: Apache-2.0
"""The fused norm in place: staged and symmetric, every dtype, the bits of the one that makes new tensors."""

from __future__ import annotations

import pytest
import torch
from test_backend import run

from commplane.runtime import Plane


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_in_place_gives_the_bits_of_new_tensors(world_size: int, dtype: torch.dtype) -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        for shape in ((1, 8), (3, 100), (40, 1024), (2, 5000), (0, 16)):
            mine = torch.randn(shape, generator=torch.Generator().manual_seed(tp.rank)).to(dtype)
            residual = torch.randn(shape, generator=torch.Generator().manual_seed(50)).to(dtype)
            weight = torch.randn(shape[-1], generator=torch.Generator().manual_seed(51)).to(dtype)
            norm, total = tp.all_reduce_rms_norm(mine, residual, weight, weight_bias=1.0)
            shared = tp.empty(shape, dtype=dtype).copy_(mine)
            for tensor in (mine.clone(), shared):
                into = residual.clone()
                got = tp.all_reduce_rms_norm_(tensor, into, weight, weight_bias=1.0)
                assert got[0] is tensor
                assert got[1] is into
                assert torch.equal(tensor, norm)
                assert torch.equal(into, total)

    run(world_size, rank_main)
