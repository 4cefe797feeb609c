"""A backend declares its formats before it knows its device; what the device lacks is composed, on every rank alike."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import fused
import pytest
import torch

from commplane.api import BackendSpec, Capability, Quantization, Quantized, quantize
from commplane.errors import AgreementError
from commplane.plugins import PluginHost
from commplane.testing import run_threads


class OfThisDevice(fused.Fused):
    """Quantises whole, and says which formats its device has."""

    answer: Collection[str] | None = None

    def formats(self) -> Collection[str] | None:
        return self.answer

    def all_reduce_rms_norm_quant(
        self,
        tensor: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
        how: Quantization,
        keep_norm: bool,
    ) -> tuple[Quantized, torch.Tensor | None, torch.Tensor]:
        norm, total = self.all_reduce_rms_norm(tensor, residual, weight, eps, weight_bias)
        return quantize(norm, how), norm if keep_norm else None, total


def host(answer: Collection[str] | None) -> PluginHost:
    """Core's plugin, and one that declares two formats and offers `answer` of them."""
    backend = type("Answers", (OfThisDevice,), {"answer": answer})

    class Plugin:
        @fused.hookimpl
        def commplane_register_comm_backends(self) -> list[BackendSpec]:
            return [
                BackendSpec(
                    name="device_bound",
                    api=(1, 3),
                    factory="fused:Fused",
                    probe="fused:probe",
                    capabilities={Capability.ALL_REDUCE_RMS_NORM, Capability.ALL_REDUCE_RMS_NORM_QUANT},
                    dtypes={"float32"},
                    formats={"fp8_token", "nvfp4"},
                    device="cpu",
                    priority=100,
                )
            ]

        @fused.hookimpl
        def commplane_build_communicator(self, spec: BackendSpec, context: Any) -> Any:
            return backend() if spec.name == "device_bound" else None

    made = PluginHost()
    made.register(Plugin(), "device_bound")
    return made


def chosen(answers: list[Collection[str] | None]) -> list[Any]:
    """What each rank's plan says of the two formats, where rank r's backend answers ``answers[r]``."""

    def rank(plane: Any) -> dict[str, str]:
        with plane.communicator("tp") as comm:
            kind = "all_reduce_rms_norm_quant"
            return {f: str(comm.plan.explain(kind, nbytes=4096, op=f)) for f in ("fp8_token", "nvfp4")}

    return run_threads(len(answers), rank, plugins=lambda r: host(answers[r]), timeout=30)


@pytest.mark.timeout(60)
def test_what_the_device_has_goes_to_the_backend_and_the_rest_is_composed() -> None:
    said = chosen([["fp8_token"], ["fp8_token"]])
    assert said[0] == said[1]
    assert ": device_bound" in said[0]["fp8_token"].splitlines()[0]
    assert "composed" in said[0]["nvfp4"].splitlines()[0]
    assert "serves format fp8_token, not nvfp4" in said[0]["nvfp4"]


@pytest.mark.timeout(60)
def test_an_empty_answer_leaves_the_norm() -> None:
    said = chosen([[], []])
    assert "composed" in said[0]["fp8_token"].splitlines()[0]


@pytest.mark.timeout(60)
def test_a_format_beyond_the_spec_leaves_the_backend_out() -> None:
    said = chosen([["fp8_group"], ["fp8_group"]])
    assert "formats() must be among those of the spec, found fp8_group" in said[0]["fp8_token"]


@pytest.mark.timeout(60)
def test_ranks_whose_devices_differ_are_an_error_on_all() -> None:
    said = chosen([["fp8_token"], ["fp8_token", "nvfp4"]])
    assert all(isinstance(s, Exception) for s in said), said
    assert any(isinstance(s, AgreementError) for s in said), said
