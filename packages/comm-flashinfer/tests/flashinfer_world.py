"""Ranks that are threads, each with the calls of one group over an imitation of FlashInfer's kernels."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from flashinfer_kernels import Comm, FusionWorkspace, Group
from torch import Tensor

from commplane.api import (
    Bootstrap,
    BuildContext,
    Collective,
    Deadline,
    Facts,
    GroupKey,
    QuantFormat,
    Quantization,
    ReduceOp,
)
from commplane_flashinfer import calls
from commplane_flashinfer.order import CudaStreams, StreamOrder

__all__ = ["FORMATS", "NORM", "QUANT", "SUM", "Built", "Rank", "World", "numbers"]

QUANT, NORM, SUM = Collective.ALL_REDUCE_RMS_NORM_QUANT, Collective.ALL_REDUCE_RMS_NORM, Collective.ALL_REDUCE
FORMATS = [
    Quantization(QuantFormat.FP8_STATIC, torch.tensor([0.25])),
    Quantization(QuantFormat.FP8_TOKEN),
    Quantization(QuantFormat.FP8_GROUP),
    Quantization(QuantFormat.FP8_GROUP, group=32),
    Quantization(QuantFormat.NVFP4, torch.tensor(3.0)),
]


@dataclass(eq=False)
class Built:
    """A workspace as the calls see it."""

    raw: Any
    max_elements: int
    in_graphs: bool = False


@dataclass
class Rank:
    """One rank: its workspaces and its group."""

    context: BuildContext
    comm: Any
    held: dict[bool, Built]
    capability: tuple[int, int]
    order: StreamOrder = field(default_factory=lambda: StreamOrder(CudaStreams(torch.device("cpu"))))

    def get(self, dtype: torch.dtype) -> Built | None:
        """The workspace of a dtype."""
        return self.held.get(dtype == torch.float32)

    def bind(self, collective: Collective, dtype: torch.dtype = torch.bfloat16, in_place: bool = False, op: Any = None) -> Any:
        """What the dispatch table would hold."""
        op = op or (ReduceOp.SUM if collective is SUM else None)
        return calls.bind(self, self.context, collective, op, dtype, in_place=in_place)


@dataclass
class World:
    """The ranks of a group of threads."""

    size: int
    most: int = 1 << 20
    options: dict[str, Any] = field(default_factory=dict)
    major: int = 10

    def __post_init__(self) -> None:
        key = GroupKey(tuple(range(10, 10 + self.size)), "cpu", "tp")
        nothing = cast("Bootstrap", None)  # a call never speaks over the control plane
        groups = {single: Group(self.size, self.major) for single in (False, True)}
        self.ranks = [
            Rank(
                BuildContext(
                    "flashinfer", key, r, "cpu", nothing, cast("Facts", None), cast("Deadline", None), 10.0, self.options
                ),
                Comm(),
                {single: Built(FusionWorkspace(group, r, self.most, single), self.most) for single, group in groups.items()},
                (self.major, 0),
            )
            for r in range(self.size)
        ]

    def run(self, body: Callable[[Rank, int], Any]) -> list[Any]:
        """`body` on every rank at once."""
        found: dict[int, Any] = {}

        def one(r: int) -> None:
            try:
                found[r] = body(self.ranks[r], r)
            except Exception as error:
                found[r] = error

        threads = [threading.Thread(target=one, args=(r,), daemon=True) for r in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)
        bad = [value for value in found.values() if isinstance(value, BaseException)]
        if bad:
            raise bad[0]
        assert len(found) == self.size
        return [found[r] for r in range(self.size)]


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
