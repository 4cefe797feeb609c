"""`all_reduce_rms_norm_quant`: composed, whole in a backend, in graphs of torch.compile; threads as ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from commplane import errors, ops
from commplane.api import (
    BackendSpec,
    Capability,
    CommBackend,
    QuantFormat,
    Quantization,
    Quantized,
    Usable,
    add_rms_norm,
    hookimpl,
    misquantized,
    quantize,
)
from commplane.api.quantize import swizzled_offsets
from commplane.backends.torch_dist import TorchDistributed
from commplane.plugins import PluginHost
from commplane.runtime import Plane
from commplane.testing import run_threads

HIDDEN = 256
HOWS = {
    QuantFormat.FP8_STATIC: Quantization("fp8_static", torch.tensor([0.02])),
    QuantFormat.FP8_TOKEN: Quantization("fp8_token"),
    QuantFormat.FP8_GROUP: Quantization("fp8_group", group=64),
    QuantFormat.NVFP4: Quantization("nvfp4", torch.tensor([200.0])),
}


class Quantizing(TorchDistributed):
    """Whole in one call, for two formats; counts its calls."""

    calls = 0

    def all_reduce_rms_norm_quant(self, tensor, residual, weight, eps, weight_bias, how, keep_norm) -> Any:
        type(self).calls += 1
        norm, total = add_rms_norm(self.all_reduce(tensor, "sum"), residual, weight, eps, weight_bias)
        return quantize(norm, how), norm if keep_norm else None, total


class AnotherNorm(Quantizing):
    """Quantises another norm than it gives."""

    def all_reduce_rms_norm_quant(self, tensor, residual, weight, eps, weight_bias, how, keep_norm) -> Any:
        _, norm, total = super().all_reduce_rms_norm_quant(tensor, residual, weight, eps, weight_bias, how, True)
        return quantize(norm * 1.5, how), norm if keep_norm else None, total


class AnotherLayout(Quantizing):
    """Right but for where something lies; `moved` is told the result."""

    def all_reduce_rms_norm_quant(self, *args) -> Any:
        found, norm, total = super().all_reduce_rms_norm_quant(*args)
        values, scales = self.moved(found.values, found.scales)
        return Quantized(found.format, values, scales), norm, total


class NeighboursScale(AnotherLayout):
    """fp8_group: each of the first four groups has the scale of the one before it."""

    def moved(self, values: torch.Tensor, scales: torch.Tensor) -> Any:
        first = scales[:, 0].contiguous()
        scales[:, 0] = first.view(torch.uint8).view(-1, 4).roll(1, -1).contiguous().view(torch.int32)[:, 0]
        return values, scales


class LinearScales(AnotherLayout):
    """nvfp4: scales token by token."""

    def moved(self, values: torch.Tensor, scales: torch.Tensor) -> Any:
        tokens, blocks = values.shape[0], values.shape[1] // 8
        linear = torch.zeros_like(scales)
        linear[: tokens * blocks] = scales[swizzled_offsets(tokens, blocks).reshape(-1)]
        return values, linear


class HalvesSwapped(AnotherLayout):
    """nvfp4: the even element in the high half of a byte."""

    def moved(self, values: torch.Tensor, scales: torch.Tensor) -> Any:
        return values << 4 | values >> 4, scales


def probe(request: Any, facts: Any) -> Usable:
    return Usable()


def plugin(factory: type[CommBackend], *formats: str) -> PluginHost:
    class Plugin:
        @hookimpl
        def commplane_register_comm_backends(self) -> list[BackendSpec]:
            return [
                BackendSpec(
                    name="quantizing",
                    api=(1, 3),
                    factory=f"{factory.__module__}:{factory.__name__}",
                    probe=f"{__name__}:probe",
                    capabilities={Capability.ALL_REDUCE_RMS_NORM_QUANT},
                    dtypes={"bfloat16", "float32"},
                    device="cpu",
                    formats=formats,
                    priority=10,
                )
            ]

    host = PluginHost()
    host.register(Plugin(), "quantizing")
    return host


def run(
    function: Callable[[Plane], Any], world_size: int = 2, plugins: Callable[[int], PluginHost] = lambda _r: PluginHost()
) -> Any:
    out = run_threads(world_size, function, plugins=plugins, timeout=90)
    for result in out:
        if isinstance(result, Exception):
            raise result
    return out


def inputs(rank: int, world_size: int, dtype: torch.dtype, *lead: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(7)
    parts = torch.randn(world_size, *lead, HIDDEN, generator=g).to(dtype)
    residual, weight = torch.randn(*lead, HIDDEN, generator=g).to(dtype), torch.rand(HIDDEN, generator=g).to(dtype)
    return parts[rank], residual, weight


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lead", [(1,), (5,), (2, 3)])
def test_without_a_backend_for_it_the_norm_is_quantised_as_the_reference_does(how, dtype, lead) -> None:
    def rank_main(plane: Plane) -> None:
        with plane.communicator("tp") as tp:
            x, residual, weight = inputs(tp.rank, 2, dtype, *lead)
            norm, total = tp.all_reduce_rms_norm(x, residual, weight, 1e-5, 1.0)
            q, kept, new = tp.all_reduce_rms_norm_quant(x, residual, weight, how, 1e-5, 1.0, keep_norm=True)
            assert torch.equal(kept, norm) and torch.equal(new, total)
            wanted = quantize(norm, how)
            assert torch.equal(q.values.view(torch.uint8), wanted.values.view(torch.uint8))
            assert torch.equal(q.scales, wanted.scales) and q.scales.stride() == wanted.scales.stride()
            assert tp.all_reduce_rms_norm_quant(x, residual, weight, how)[1] is None

    run(rank_main)


def test_a_backend_takes_its_formats_and_the_others_are_composed() -> None:
    Quantizing.calls = 0

    def rank_main(plane: Plane) -> list[str]:
        with plane.communicator("tp") as tp:
            x, residual, weight = inputs(tp.rank, 2, torch.bfloat16, 4)
            before = Quantizing.calls
            tp.barrier()
            for how in HOWS.values():
                tp.all_reduce_rms_norm_quant(x, residual, weight, how)
            tp.barrier()
            assert Quantizing.calls == before + 4  # two formats on two ranks
            said = [tp.plan.explain("all_reduce_rms_norm_quant", nbytes=x.nbytes, dtype=x.dtype, op=f) for f in HOWS]
            return [str(s.chosen) for s in said] + [str(tp.plan)]

    said = run(rank_main, plugins=lambda _r: plugin(Quantizing, "fp8_token", "nvfp4"))
    composed = "composed of all_reduce by torch and torch"
    assert [s[:4] for s in said] == [[composed.replace("all_reduce", "all_reduce"), "quantizing", composed, "quantizing"]] * 2
    assert "all_reduce_rms_norm_quant" in said[0][4] and "fp8_token, nvfp4" in said[0][4]


@pytest.mark.parametrize(
    ("wrong", "form", "words"),
    [
        (AnotherNorm, "fp8_static", "steps of the format off"),
        (AnotherNorm, "fp8_token", "scale 0 differs"),
        (AnotherNorm, "fp8_group", "differs"),
        (NeighboursScale, "fp8_group", "scale 0 differs"),
        (AnotherNorm, "nvfp4", "differs"),
        (LinearScales, "nvfp4", "differs"),
        (HalvesSwapped, "nvfp4", "steps of the format off"),
    ],
)
def test_one_that_quantises_wrongly_is_left_out_with_the_reason(wrong: type[CommBackend], form: str, words: str) -> None:
    def rank_main(plane: Plane) -> tuple[tuple[str, ...], str]:
        with plane.communicator("tp") as tp:
            return tp.plan.backends, next(c.reason for c in tp.plan.candidates if c.name == "quantizing")

    for backends, reason in run(rank_main, plugins=lambda _r: plugin(wrong, form)):
        assert backends == ("torch",)
        assert f"all_reduce_rms_norm_quant to {form}" in reason and words in reason


def test_one_that_quantises_rightly_is_ready_in_every_format() -> None:
    def rank_main(plane: Plane) -> tuple[str, ...]:
        with plane.communicator("tp") as tp:
            return tp.plan.backends

    assert run(rank_main, world_size=3, plugins=lambda _r: plugin(Quantizing, *map(str, HOWS))) == [("quantizing", "torch")] * 3


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.timeout(170)
def test_a_method_may_stand_in_a_graph_and_gives_the_same(how) -> None:
    def rank_main(plane: Plane) -> None:
        with plane.communicator("tp") as tp:
            x, residual, weight = inputs(tp.rank, 1, torch.bfloat16, 6)

            def layer(x: torch.Tensor, residual: torch.Tensor) -> Any:
                q, norm, new = tp.all_reduce_rms_norm_quant(x * 2, residual, weight, how, keep_norm=True)
                return q.values, q.scales, norm + 1, new

            eager, compiled = layer(x, residual), torch.compile(layer, fullgraph=True, backend="eager")(x, residual)
            for a, b in zip(eager, compiled, strict=True):
                bits = [t.view(torch.uint8) if t.itemsize == 1 else t for t in (a, b)]
                assert torch.equal(*bits) and a.stride() == b.stride()
            traced = ops.all_reduce_rms_norm_quant(x, residual, weight, tp, how)
            assert (
                traced[1] is None and misquantized(traced[0], tp.all_reduce_rms_norm_quant(x, residual, weight, how)[0]) is None
            )

    run(rank_main, world_size=1)


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.timeout(170)
def test_the_operator_passes_torchs_own_check_with_shapes_of_any_size(how) -> None:
    def rank_main(plane: Plane) -> None:
        with plane.communicator("tp") as tp:
            operator = torch.ops.commplane.all_reduce_rms_norm_quant.default
            for lead, keep_norm in (((6,), True), ((2, 3), False)):
                given = inputs(tp.rank, 1, torch.bfloat16, *lead)
                said = torch.library.opcheck(
                    operator, (*given, how.scale, str(how.format), how.group, 1e-6, 0.0, keep_norm, tp.handle)
                )
                assert set(said.values()) == {"SUCCESS"} and "test_aot_dispatch_dynamic" in said

    run(rank_main, world_size=1)


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_rows_of_no_numbers_are_refused_by_the_call_by_its_fake_and_by_the_reference(how) -> None:
    def rank_main(plane: Plane) -> None:
        with plane.communicator("tp") as tp:
            none, weight = torch.empty(3, 0), torch.empty(0)
            arguments = (how.scale, str(how.format), how.group, 1e-6, 0.0, True, tp.handle)
            for call in (
                lambda: tp.all_reduce_rms_norm_quant(none, none, weight, how),
                lambda: torch.ops.commplane.all_reduce_rms_norm_quant(none.to("meta"), none.to("meta"), weight, *arguments),
            ):
                with pytest.raises(errors.UnsupportedOperation, match="wants a hidden size of 1 or more for"):
                    call()
            assert tp.all_reduce(torch.ones(1)).item() == 1.0  # nothing was sent
            with pytest.raises(ValueError, match="quantize wants a hidden size of 1 or more"):
                quantize(none, how)

    run(rank_main, world_size=1)


def test_what_does_not_fit_is_refused_before_anything_is_sent() -> None:
    def rank_main(plane: Plane) -> None:
        with plane.communicator("tp") as tp:
            x, residual, weight = inputs(tp.rank, 1, torch.bfloat16, 2)
            for how, words in (
                (Quantization("fp8_group", group=100), "wants a hidden size that 100 divides for fp8_group group=100, found 256"),
                (Quantization("fp8_static", torch.ones(2)), "wants a scale of one float32 on cpu, found [2] of torch.float32"),
                (Quantization("nvfp4", torch.ones(1, dtype=torch.bfloat16)), "found [1] of torch.bfloat16 on cpu"),
            ):
                with pytest.raises(errors.UnsupportedOperation) as caught:
                    tp.all_reduce_rms_norm_quant(x, residual, weight, how)
                assert words in str(caught.value)
            with pytest.raises(errors.UnsupportedOperation, match="wants a finite weight_bias"):
                tp.all_reduce_rms_norm_quant(x, residual, weight, HOWS[QuantFormat.FP8_TOKEN], 1e-6, float("nan"))

    run(rank_main, world_size=1)


def test_formats_and_the_capability_go_together() -> None:
    spec = {"name": "x", "api": (1, 3), "factory": "a:b", "probe": "a:b", "dtypes": (), "device": "cpu"}
    with pytest.raises(ValueError, match="formats and the capability all_reduce_rms_norm_quant go together"):
        BackendSpec(capabilities={Capability.ALL_REDUCE_RMS_NORM_QUANT}, **spec)
    with pytest.raises(ValueError, match="not a valid QuantFormat"):
        BackendSpec(capabilities={Capability.ALL_REDUCE_RMS_NORM_QUANT}, formats={"fp5"}, **spec)
