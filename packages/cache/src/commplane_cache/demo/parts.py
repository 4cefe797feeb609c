"""The parts of one rank that live as long as its process: groups and model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import commplane
from commplane.api import ParallelLayout
from commplane.demo import ModelConfig, Shard, Transformer
from commplane_cache.demo.job import Job

__all__ = ["Parts", "build", "shard_of"]


@dataclass(frozen=True)
class Parts:
    """A rank, set up.

    Attributes:
        model: its part of the model.
        grid: global ranks of attention-TP x attention-CP: those that serve a request together, and must hold the same tree.
    """

    plane: commplane.Plane
    config: ModelConfig
    model: Transformer
    grid: Sequence[int]


def build(job: Job, plane: commplane.Plane) -> Parts:
    """Form the groups and draw the weights. Collective over all ranks."""
    config, place = ModelConfig(**job.model), _layout(job).of(job.rank)
    groups = [
        plane.communicator(family, place.groups[family], device="cpu") if len(place.groups[family]) > 1 else None
        for family in ("attention_tp", "attention_cp")
    ]
    sums = [None if group is None else _summing(group) for group in groups]
    model = Transformer(config, shard_of(job), tp_sum=sums[0], cp_sum=sums[1])
    for group, largest in zip(groups, model.message_bytes(), strict=True):
        if group is not None:
            group.prepare("all_reduce", dtype=torch.float64, max_bytes=largest)
    return Parts(plane, config, model, place.groups["attention"])


def shard_of(job: Job) -> Shard:
    """Which part of the model and of the pages the job's rank has. Local."""
    index = _layout(job).of(job.rank).index
    return Shard(index["attention_tp"], job.tp, index["attention_cp"], job.cp)


def _layout(job: Job) -> ParallelLayout:
    ranks = job.tp * job.cp
    return ParallelLayout(world_size=ranks, tensor=ranks, context=job.cp)


def _summing(group: commplane.Communicator) -> Callable[[torch.Tensor], object]:
    return lambda tensor: group.all_reduce_(tensor)
