"""What takes turns: every usable backend, every kind of tensor, each as one call without arguments."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from commplane.api import Capability, Collective
from commplane.bench.pair import fastest, fused, pairs
from commplane.errors import CommplaneWarning, ConfigError

if TYPE_CHECKING:
    import torch

    from commplane.runtime import Communicator, Plane

__all__ = ["Case", "Step", "form", "make_cases"]

_IN_PLACE = (Collective.ALL_REDUCE, Collective.BROADCAST)


@dataclass(frozen=True)
class Step:
    """What is measured next, on all backends.

    Attributes:
        collective: which one.
        op: the reduction, or None where there is none.
        dtype: torch's name, or None for a barrier.
        count: elements of this rank's input.
        itemsize: bytes of an element.
        in_place: whether the result is written to the input.
        hidden: last dimension for all_reduce_rms_norm, else None.
    """

    collective: Collective
    op: str | None
    dtype: str | None
    count: int
    itemsize: int
    in_place: bool
    hidden: int | None = None

    @classmethod
    def of(
        cls,
        collective: Collective,
        *,
        op: str,
        dtype: str | None,
        nbytes: int,
        itemsize: int,
        world_size: int,
        hidden: int,
        out_of_place: bool = False,
    ) -> Step:
        """The step nearest to `nbytes` that the collective can do: a number of elements that it divides evenly. Pure."""
        count = max(1, nbytes // itemsize)
        in_place = collective in _IN_PLACE and not (out_of_place and collective is Collective.ALL_REDUCE)
        step = cls(collective, op if collective.reduces else None, dtype, count, itemsize, in_place)
        if collective is Collective.BARRIER:
            return replace(step, dtype=None, count=0, itemsize=1)
        if collective is Collective.REDUCE_SCATTER:
            return replace(step, count=max(world_size, count // world_size * world_size))
        if collective is Collective.ALL_REDUCE_RMS_NORM:
            last = min(hidden, count)
            return replace(step, count=count // last * last, hidden=last)
        return step

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's input."""
        return self.count * self.itemsize

    def __str__(self) -> str:
        words = [str(self.collective), self.op, self.dtype, f"{self.nbytes} bytes" if self.dtype else None]
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Case:
    """One candidate of a step.

    Attributes:
        backend: its name.
        mode: ``staged`` or ``symmetric``, or for all_reduce_rms_norm ``fused`` or ``pair``, with `` symmetric`` behind.
        communicator: with this backend before all others.
        call: makes the collective, `times` times.
        times: collectives in one call.
        detail: of a fused call or a pair, which of the ways to write it.
    """

    backend: str
    mode: str
    communicator: Communicator
    call: Callable[[], object]
    times: int = 1
    detail: str | None = None


def form(plane: Plane, backends: Sequence[str] | None, purpose: str) -> dict[str, Communicator]:
    """A communicator for each backend, `torch` first. Collective over all ranks.

    Raises:
        ConfigError: a backend asked for by name cannot serve these ranks.
    """
    wanted = ["torch", *(n for n in (plane.plugins.backends() if backends is None else backends) if n != "torch")]
    formed = {}
    for name in wanted:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CommplaneWarning)  # said below, as an error if it was asked for
            comm = plane.communicator(f"{purpose}_{name}", backends=[name])
        if comm.plan.backends[0] == name:
            formed[name] = comm
            continue
        refusal = next((c.reason for c in comm.plan.candidates if c.name == name), "unknown")
        comm.close()
        if backends is not None:
            raise ConfigError(f"bench: backend {name!r} cannot serve these ranks: {refusal}")
    return formed


def make_cases(plane: Plane, communicators: dict[str, Communicator], step: Step) -> list[Case]:
    """Every way to do `step`, with tensors of zeros: they stay zeros, however often they are summed. Collective."""
    cases = []
    for name, comm in communicators.items():
        symmetric = any(s.name == name and Capability.SYMMETRIC_MEMORY in s.capabilities for s in comm.plan.specs)
        modes = [False, True] if symmetric and step.dtype is not None else [False]
        for in_symmetric_memory in modes:
            cases.extend(_ways(plane, name, comm, step, in_symmetric_memory))
    return cases


def _ways(plane: Plane, backend: str, comm: Communicator, step: Step, symmetric: bool) -> list[Case]:
    import torch

    mode = "symmetric" if symmetric else "staged"
    if step.collective is Collective.BARRIER:
        return [Case(backend, mode, comm, comm.barrier)] if _serves(comm, backend, step, step.collective) else []
    kind: torch.dtype = getattr(torch, str(step.dtype))
    served = [
        c
        for c in ([step.collective, Collective.ALL_REDUCE] if step.hidden else [step.collective])
        if _serves(comm, backend, step, c)
    ]
    if not served:
        return []
    for collective in served:
        comm.prepare(str(collective), dtype=kind, max_bytes=step.nbytes)
    shape = (step.count,) if step.hidden is None else (step.count // step.hidden, step.hidden)
    tensor = comm.empty(shape, dtype=kind) if symmetric else torch.empty(shape, dtype=kind, device=comm.device)
    tensor.zero_()  # also makes the pages of `empty` real
    if step.hidden is not None:
        return _rms_norm(plane, backend, comm, tensor, served, " symmetric" if symmetric else "")
    return [_plain(backend, mode, comm, step, tensor)]


def _serves(comm: Communicator, backend: str, step: Step, collective: Collective) -> bool:
    """Whether it is `backend` that runs, and not one that stands in for it."""
    answer = comm.plan.explain(str(collective), nbytes=step.nbytes, dtype=step.dtype or "float32", op=step.op or "sum")
    return answer.chosen == backend


def _plain(backend: str, mode: str, comm: Communicator, step: Step, tensor: torch.Tensor) -> Case:
    """Any collective but the fused one."""
    op = () if step.op in (None, "sum") else (step.op,)
    if step.collective is Collective.BROADCAST:
        # With one root, that rank would run ahead of the others, and what is timed would be a pipeline.
        roots = [partial(comm.broadcast, tensor, src) for src in range(comm.world_size)]

        def from_each_rank() -> None:
            for broadcast in roots:
                broadcast()

        return Case(backend, mode, comm, from_each_rank, times=comm.world_size)
    name = "all_reduce_" if step.collective is Collective.ALL_REDUCE and step.in_place else str(step.collective)
    method: Callable[..., Any] = getattr(comm, name)
    return Case(backend, mode, comm, partial(method, tensor, *op))


def _rms_norm(
    plane: Plane, backend: str, comm: Communicator, tensor: torch.Tensor, served: Sequence[Collective], suffix: str
) -> list[Case]:
    """The fused call, where the backend has it, and the pair of calls that it replaces."""
    import torch

    residual = torch.empty_like(tensor).zero_()
    weight = torch.ones(tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
    cases = []
    if Collective.ALL_REDUCE_RMS_NORM in served:
        detail, call = fastest(plane, comm, fused(comm, tensor, residual, weight))
        cases.append(Case(backend, f"fused{suffix}", comm, call, detail=detail))
    if Collective.ALL_REDUCE in served:
        detail, call = fastest(plane, comm, pairs(comm, tensor, residual, weight))
        cases.append(Case(backend, f"pair{suffix}", comm, call, detail=detail))
    return cases
