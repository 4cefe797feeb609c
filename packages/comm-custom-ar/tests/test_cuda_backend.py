# SPDX-License-Identifier: Apache-2.0
"""The backend on CUDA as core meets it: what it declares, what it asks for, and that a failed `open` leaves nothing. No GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_fakes import context
from gpu_machine import ranks

from commplane.agree.canary import verify_overrides
from commplane.api import Collective, ReduceOp, SizeRange
from commplane.errors import CommunicatorError, ConfigError, UnsupportedOperation
from commplane.testing import shm_leftovers
from commplane_custom_ar import plugin
from commplane_custom_ar.cuda import tuned
from commplane_custom_ar.cuda.abi import ALGORITHMS
from commplane_custom_ar.cuda.backend import CudaAllReduce

pytestmark = pytest.mark.timeout(60)

CPU, CUDA = plugin.commplane_register_comm_backends()
MIB = 1 << 20


def alone(**options: Any) -> Any:
    """A context whose rank does not get to meet anybody."""
    bootstrap: Any = SimpleNamespace(rank=0, ranks=(0, 1), world_size=2)
    return context(bootstrap, **{**CUDA.options, **options})


def opened(link: str = "nvlink", world_size: int = 2, capacity: int = 8 * MIB) -> CudaAllReduce:
    """As far as `ranges` and `bind` look."""
    out, row = CudaAllReduce(), tuned.look_up(90, link, world_size)
    assert row is not None
    out._context, out._row, out._capacity = alone(), row, capacity
    out._native, out._device = SimpleNamespace(), torch.device("cuda:0")  # type: ignore[assignment]
    out._comm = SimpleNamespace(handle=1, fault=lambda: 0)  # type: ignore[assignment]
    return out


def test_both_specs_have_one_name_and_equal_defaults_where_they_share_a_setting() -> None:
    assert (CPU.name, CPU.device) == ("custom_ar", "cpu")
    assert (CUDA.name, CUDA.device) == ("custom_ar", "cuda")
    shared = CPU.options.keys() & CUDA.options.keys()
    assert shared == {"binding"}
    assert all(CPU.options[name] == CUDA.options[name] for name in shared)
    verify_overrides(CUDA, CudaAllReduce())


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("algorithm", "ring", "wanted auto, one_shot_push, .* or two_shot_pull, found 'ring'"),
        ("registered", "yes", "wanted off, on or auto, found 'yes'"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_anything_is_sent(name: str, value: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"setting {name}: {text}"):
        CudaAllReduce().open(alone(**{name: value}))


def test_an_open_that_fails_leaves_nothing_and_can_be_closed_twice() -> None:
    before = shm_leftovers()

    def body(bootstrap: Any) -> str:
        backend = CudaAllReduce()
        with pytest.raises(CommunicatorError) as caught:  # the device is cpu, which the gate refuses
            backend.open(context(bootstrap, **CUDA.options))
        backend.close()
        backend.close()
        backend.abort()
        assert backend.flight_records() == ()
        return str(caught.value)

    one, other = ranks(2, body, timeout=50.0, patience=20.0)
    assert "wanted a device such as 'cuda:0', found 'cpu'" in str(one)
    assert one == other
    assert shm_leftovers() <= before


def test_the_plan_is_told_what_each_collective_takes_at_each_size() -> None:
    two, four, pcie = opened(), opened(world_size=4, capacity=MIB), opened("pcie", capacity=8 * MIB)
    for capturing in (False, True):
        assert two.ranges(Collective.ALL_REDUCE, "bfloat16", capturing) == [SizeRange(0, None, "one_shot_push")]
        assert two.ranges(Collective.ALL_REDUCE_RMS_NORM, "bfloat16", capturing) == [
            SizeRange(0, 8 * MIB + 1, "fused_one_shot"),
            SizeRange(8 * MIB + 1, None, "all_reduce, then add_rms_norm"),
        ]
        assert two.ranges(Collective.ALL_GATHER, "bfloat16", capturing) == [SizeRange(0, None, "tiled")]
        assert four.ranges(Collective.ALL_REDUCE_RMS_NORM, "float16", capturing) == [
            SizeRange(0, MIB // 2 + 1, "fused_one_shot"),  # twice what goes one-shot
            SizeRange(MIB // 2 + 1, 64 * MIB + 1, "all_reduce, then add_rms_norm"),
        ]
        assert four.ranges(Collective.BROADCAST, "float16", capturing) == [SizeRange(0, 64 * MIB + 1, "tiled")]
        assert pcie.ranges(Collective.ALL_REDUCE, "float32", capturing) == [SizeRange(0, MIB // 4 + 1, "one_shot_push")]
        assert pcie.ranges(Collective.ALL_REDUCE_RMS_NORM, "float32", capturing) == [SizeRange(0, MIB // 4 + 1, "fused_one_shot")]


def test_what_is_not_served_is_refused_when_it_is_bound() -> None:
    backend = opened()
    for collective, op, dtype in (
        (Collective.ALL_REDUCE, ReduceOp.SUM, torch.float64),
        (Collective.ALL_GATHER, None, torch.int32),
        (Collective.ALL_REDUCE, ReduceOp.MAX, torch.float32),
        (Collective.REDUCE_SCATTER, ReduceOp.AVG, torch.float16),
        (Collective.ALL_REDUCE_RMS_NORM, None, torch.float64),
    ):
        with pytest.raises(UnsupportedOperation, match="on cuda wanted float32, float16, bfloat16 and op sum"):
            backend.bind(collective, op, dtype, in_place=False)


def test_a_closed_backend_says_so() -> None:
    backend = opened()
    backend._comm = None
    with pytest.raises(CommunicatorError, match="is closed: create the communicator again"):
        backend.bind(Collective.BARRIER, None, None, in_place=False)


def test_every_algorithm_is_described_where_it_can_be_asked_for() -> None:
    with pytest.raises(ConfigError) as caught:
        CudaAllReduce().open(alone(algorithm="none"))
    assert all(name in str(caught.value) for name in ALGORITHMS)
