"""nvfp4 is offered where the GPU has it, and of float32 it is made of the fused norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flashinfer_double import Machine, ranks_on

from commplane.api import Quantization, quantize
from commplane.runtime import Plane
from commplane_flashinfer.backend import FlashInfer
from commplane_flashinfer.topology import Card

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(("capability", "there"), [((9, 0), False), ((10, 0), True), ((12, 0), True)])
def test_nvfp4_is_offered_from_compute_capability_10_on(capability: tuple[int, int], there: bool) -> None:
    backend = FlashInfer()
    backend._card = Card("GPU-0", "any", capability, False)
    assert set(backend.formats()) == {"fp8_static", "fp8_token", "fp8_group", *(["nvfp4"] if there else [])}


def test_on_an_older_gpu_the_plan_composes_nvfp4_of_the_fused_norm_on_all_ranks() -> None:
    def rank(plane: Plane) -> Any:
        x = torch.ones(4, 256, dtype=torch.bfloat16)
        how = Quantization("nvfp4", torch.tensor([16.0]))
        with plane.communicator("tp") as comm:
            said = str(comm.plan.explain("all_reduce_rms_norm_quant", nbytes=x.nbytes, dtype="bfloat16", op="nvfp4"))
            found, _, _ = comm.all_reduce_rms_norm_quant(x, x, x[0].clone(), how)
            norm, _ = comm.all_reduce_rms_norm(x, x, x[0].clone())
            return said.splitlines()[0], torch.equal(found.values, quantize(norm, how).values)

    said = ranks_on(Machine(), 2, rank)
    assert said[0] == said[1], said
    assert "flashinfer" in said[0][0] and "composed" in said[0][0]
    assert said[0][1]


def test_on_a_newer_gpu_nvfp4_is_one_kernel_on_all_ranks() -> None:
    machine = Machine()
    machine.cards = {r: Card(f"GPU-{r}", "B200", (10, 0), False) for r in range(2)}

    def rank(plane: Plane) -> Any:
        x = torch.ones(4, 256, dtype=torch.bfloat16)
        how = Quantization("nvfp4", torch.tensor([16.0]))
        with plane.communicator("tp") as comm:
            machine.comm(plane.rank).calls.clear()
            found, norm, _ = comm.all_reduce_rms_norm_quant(x, x, x[0].clone(), how, keep_norm=True)
            assert norm is not None
            patterns = [call["pattern"] for call in machine.comm(plane.rank).calls]
            return patterns, torch.equal(found.values, quantize(norm, how).values)

    assert ranks_on(machine, 2, rank) == [([5], True)] * 2
