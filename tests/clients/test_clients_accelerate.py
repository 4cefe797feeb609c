"""Training with accelerate in a process group of commplane: the numbers that it has over Gloo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.timeout(300)  # the job ends itself long before

Results = Callable[[str], list[dict[str, Any]]]


def test_accelerate_wraps_the_model_in_ddp_over_the_group_that_is_there(results: Results) -> None:
    for rank in results("accelerated"):
        assert rank["commplane"]["kind"] == "DistributedType.MULTI_CPU"
        assert rank["commplane"]["wrapped in"] == "DistributedDataParallel"
        assert rank["calls"]["all_reduce_"] >= 6 and rank["calls"]["broadcast"] >= 1 and rank["calls"]["all_gather"] >= 1


def test_losses_weights_and_what_is_gathered_are_those_over_gloo(results: Results) -> None:
    first, second = results("accelerated")
    for rank in (first, second):
        found, wanted = rank["commplane"], rank["gloo"]
        assert found.keys() == wanted.keys()
        differing = [n for n, v in wanted.items() if isinstance(v, torch.Tensor) and not torch.equal(found[n], v)]
        assert not differing
    losses, others = first["commplane"]["losses"], second["commplane"]["losses"]
    assert not torch.equal(losses, others)  # each rank had batches of its own
    torch.testing.assert_close(first["commplane"]["means"], (losses + others) / 2)
    assert torch.equal(first["commplane"]["everyone's last"], torch.stack([losses[-1], others[-1]]))
    for name in ("weight 0.weight", "weight 3.bias"):
        assert torch.equal(first["commplane"][name], second["commplane"][name])
