"""A canary that finds something wrong on one rank: the rank goes on with the others, which may wait for it on a device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from commplane.agree.canary import CanaryError, check
from commplane.api import (
    BackendSpec,
    BuildContext,
    Capability,
    CommBackend,
    QuantFormat,
    Quantization,
    Quantized,
    ReduceOp,
    add_rms_norm,
    quantize,
)

SPEC = BackendSpec(
    name="alone",
    api=(1, 3),
    factory="alone:Alone",
    probe="alone:probe",
    capabilities={Capability.ALL_REDUCE, Capability.ALL_REDUCE_RMS_NORM, Capability.ALL_REDUCE_RMS_NORM_QUANT},
    dtypes={"float32", "bfloat16"},
    ops={"sum"},
    formats=set(QuantFormat),
    device="cpu",
)
CONTEXT = cast("BuildContext", SimpleNamespace(world_size=1, rank=0, ranks=(0,), device="cpu"))


class Alone(CommBackend):
    """A group of one rank; from call `at` on it gives something else."""

    def __init__(self, at: int | None = None) -> None:
        self.calls, self.at = 0, at

    def open(self, context: BuildContext) -> None:
        pass

    def close(self) -> None:
        pass

    def _off(self) -> int:
        self.calls += 1
        return int(self.at is not None and self.calls >= self.at)

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        return tensor.add_(self._off())

    def all_reduce_rms_norm(self, tensor: Any, residual: Any, weight: Any, eps: float, weight_bias: float) -> Any:
        return add_rms_norm(tensor + self._off(), residual, weight, eps, weight_bias)

    def all_reduce_rms_norm_quant(
        self, tensor: Any, residual: Any, weight: Any, eps: float, weight_bias: float, how: Quantization, keep_norm: bool
    ) -> tuple[Quantized, Any, Any]:
        off = self._off()
        norm, total = add_rms_norm(tensor + off, residual, weight, eps, weight_bias)
        return quantize(norm, how), norm if keep_norm and not off else None, total


def test_what_is_wrong_from_some_call_on_is_found_after_as_many_calls_as_all_ranks_make() -> None:
    right = Alone()
    check(SPEC, right, CONTEXT)
    assert right.calls > 20
    for at in range(1, right.calls + 1):
        wrong = Alone(at)
        with pytest.raises(CanaryError, match=r"is wrong|gave no norm"):
            check(SPEC, wrong, CONTEXT)
        assert wrong.calls == right.calls, f"wrong from call {at} on"
