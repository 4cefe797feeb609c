"""What takes turns: every usable backend, every kind of tensor, each as one call without arguments."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from commplane.api import Capability, Collective
from commplane.bench.pair import fastest, fused, pairs
from commplane.errors import CommplaneWarning, ConfigError, SelectionError

if TYPE_CHECKING:
    import torch

    from commplane.runtime import Communicator, Plane

__all__ = ["Case", "Step", "form", "make_cases", "own_group"]

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
        backend: its name, with ``:`` and an algorithm behind where that was asked for.
        mode: ``staged`` or ``symmetric``, or for all_reduce_rms_norm ``fused`` or ``pair``, with `` symmetric`` behind.
        communicator: with this backend before all others.
        call: makes the collective, `times` times.
        times: collectives in one call.
        detail: of a fused call or a pair, which of the ways to write it.
        algorithm: what the plan says that the backend runs, if that has a name.
    """

    backend: str
    mode: str
    communicator: Communicator
    call: Callable[[], object]
    times: int = 1
    detail: str | None = None
    algorithm: str | None = None


def own_group(plane: Plane, groups: int) -> list[int]:
    """The ranks of this one's group where all ranks make so many of equal size, each of consecutive ranks. Local.

    Raises:
        ConfigError: they do not, or one rank would be alone in its group. The same on every rank.
    """
    size, rest = divmod(plane.world_size, groups)
    if rest or size < 2 <= groups:
        raise ConfigError(f"bench: wanted {groups} groups of equal size, of 2 ranks or more, found {plane.world_size} ranks")
    return [r for r in range(plane.world_size) if r // size == plane.rank // size]


def form(
    plane: Plane,
    backends: Sequence[str] | None,
    purpose: str,
    device: str | None = None,
    groups: int = 1,
    left_out: Callable[[str], None] = lambda _text: None,
) -> dict[str, Communicator]:
    """A communicator for each candidate, `torch` first where it can serve. Collective over all ranks.

    Args:
        plane: over which ranks.
        backends: names; ``name:algorithm`` is a backend with its option ``algorithm`` set to that. None for all that are usable.
        purpose: what the communicators' names begin with.
        device: as for `Plane.communicator`.
        groups: as for `own_group`; a candidate serves all groups or is none.
        left_out: told on every rank alike why `torch` is not among them.

    Raises:
        ConfigError: a backend asked for by name cannot serve these ranks, or has no such option; as `own_group`; nothing is left.
    """
    ranks = own_group(plane, groups)
    wanted = dict.fromkeys(["torch", *(plane.plugins.backends() if backends is None else backends)])
    formed: dict[str, Communicator] = {}
    refusals = {}
    for asked in wanted:
        name, _, algorithm = asked.partition(":")
        options = {name: {"algorithm": algorithm}} if algorithm else None
        comm: Communicator | None = None
        refusal = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CommplaneWarning)  # said below, as an error if it was asked for
                comm = plane.communicator(
                    f"{purpose}_{asked.replace(':', '_')}", ranks, device=device, backends=[name], options=options
                )
        except SelectionError as error:  # not even torch serves, as NCCL does not for ranks that share a GPU
            refusal = str(error)
        else:
            if comm.plan.backends[0] != name:
                refusal = next((c.reason for c in comm.plan.candidates if c.name == name), "unknown")
        refusal = next(filter(None, plane.gather(refusal, what="bench backends")), None)
        if comm is not None and refusal is None:
            formed[asked] = comm
            continue
        if comm is not None:
            comm.close()
        if backends is not None and asked in backends:
            raise ConfigError(f"bench: backend {asked!r} cannot serve these ranks: {refusal}")
        refusals[asked] = refusal
        if asked == "torch":
            left_out(f"torch: {refusal}")
    if not formed:
        reasons = "; ".join(f"{asked}: {reason}" for asked, reason in refusals.items())
        raise ConfigError(f"bench: no backend serves these ranks: {reasons}")
    return formed


def make_cases(plane: Plane, communicators: dict[str, Communicator], step: Step, *, graph: bool = False) -> list[Case]:
    """Every way to do `step`, with tensors of zeros: they stay zeros, however often they are summed. Collective.

    With `graph` it is the plan of captured calls that says what a backend serves.
    """
    cases = []
    for name, comm in communicators.items():
        found = (s for s in comm.plan.specs if s.name == _plain(name))
        symmetric = any(Capability.SYMMETRIC_MEMORY in s.capabilities for s in found)
        modes = [False, True] if symmetric and step.dtype is not None else [False]
        for in_symmetric_memory in modes:
            cases.extend(_ways(plane, name, comm, step, in_symmetric_memory, graph))
    return cases


def _plain(asked: str) -> str:
    """The backend's name alone."""
    return asked.partition(":")[0]


def _ways(plane: Plane, backend: str, comm: Communicator, step: Step, symmetric: bool, graph: bool) -> list[Case]:
    import torch

    mode = "symmetric" if symmetric else "staged"
    candidates = [step.collective, Collective.ALL_REDUCE] if step.hidden else [step.collective]
    answers = {c: _serves(comm, backend, step, c, graph) for c in candidates}
    served = {c: algorithm for c, algorithm in answers.items() if algorithm is not None}
    if not served:
        return []
    if step.collective is Collective.BARRIER:
        return [Case(backend, mode, comm, comm.barrier)]
    kind: torch.dtype = getattr(torch, str(step.dtype))
    for collective in served:
        comm.prepare(str(collective), dtype=kind, max_bytes=step.nbytes)
    shape = (step.count,) if step.hidden is None else (step.count // step.hidden, step.hidden)
    tensor = comm.empty(shape, dtype=kind) if symmetric else torch.empty(shape, dtype=kind, device=comm.device)
    tensor.zero_()  # also makes the pages of `empty` real
    if step.hidden is not None:
        return _rms_norm(plane, backend, comm, tensor, served, " symmetric" if symmetric else "", graph)
    return [replace(_call(backend, mode, comm, step, tensor), algorithm=served[step.collective] or None)]


def _serves(comm: Communicator, backend: str, step: Step, collective: Collective, graph: bool) -> str | None:
    """The algorithm, or an empty text where it has no name; None where it is not `backend` that runs, but one in its place."""
    answer = comm.plan.explain(
        str(collective), nbytes=step.nbytes, dtype=step.dtype or "float32", op=step.op or "sum", graph=graph
    )
    return answer.algorithm if answer.chosen == _plain(backend) else None


def _call(backend: str, mode: str, comm: Communicator, step: Step, tensor: torch.Tensor) -> Case:
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
    plane: Plane,
    backend: str,
    comm: Communicator,
    tensor: torch.Tensor,
    served: Mapping[Collective, str],
    suffix: str,
    graph: bool,
) -> list[Case]:
    """The fused call, where the backend has it, and the pair of calls that it replaces."""
    import torch

    residual = torch.empty_like(tensor).zero_()
    weight = torch.ones(tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
    cases = []
    for collective, word, ways in (
        (Collective.ALL_REDUCE_RMS_NORM, "fused", fused),
        (Collective.ALL_REDUCE, "pair", pairs),
    ):
        if collective in served:
            detail, call = fastest(plane, comm, ways(comm, tensor, residual, weight), graph=graph)
            algorithm = served[collective] or None
            cases.append(Case(backend, f"{word}{suffix}", comm, call, detail=detail, algorithm=algorithm))
    return cases
