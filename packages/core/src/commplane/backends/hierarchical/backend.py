"""The backend: inner groups of whatever plan is best for them, and all-reduces made of theirs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from commplane.api import (
    BuildContext,
    Collective,
    CommBackend,
    InnerGroup,
    ReduceOp,
    Requirement,
    SizeRange,
    Workspace,
    refuse_overlap,
)
from commplane.backends.hierarchical import ways
from commplane.backends.hierarchical.losses import explain
from commplane.backends.hierarchical.shape import Shape
from commplane.errors import (
    CommunicatorError,
    ConfigError,
    PeerError,
    SelectionError,
    UnsupportedOperation,
    WorkspaceTooSmall,
)
from commplane.tracer import without_data

__all__ = ["Hierarchical"]

_FLAT = "torch"


class Hierarchical(CommBackend):
    """All-reduce inside each host, then between the hosts.

    Results are equal bit for bit on all ranks: what a host has is added up once, and hosts in the order of their first ranks, or
    as the transport between them does. That is not the order of group ranks, so the numerics are ``unordered``.
    """

    def __init__(self) -> None:
        self._inside: InnerGroup | None = None
        self._between: InnerGroup | None = None
        self._closed = False

    def open(self, context: BuildContext) -> None:
        """Form the inner groups: first those inside the hosts, then those between them, on every rank. Collective."""
        if context.inner is None:
            raise ConfigError(f"{context.who} wanted a context that makes inner groups, found none: open it through a plane")
        self._context = context
        self._shape = shape = Shape.of(context.facts, context.ranks, context.ranks[context.rank])
        self._algorithm = ways.chosen(shape, context.options["algorithm"])
        self._patience = float(context.options["patience"])
        inside, between = (_words(context.options[name]) for name in ("inside", "between"))
        if len(shape.mine) > 1:
            self._inside = context.inner.form("inside", shape.mine, backends=inside)
        if shape.across:
            self._between = context.inner.form("between", shape.across, backends=between)
        said = context.bootstrap.all_gather([_plan(self._inside), _plan(self._between)], what="inner groups")
        self._runs = [next((text for text in level if text), "") for level in zip(*said, strict=True)]
        found = {text for text, _ in said if text}
        if not inside and found == {_FLAT}:
            raise SelectionError(
                f"{context.who} wanted shared memory inside the hosts, found only {_FLAT}, which does better in one level: "
                f"install commplane-custom-ar, or name what to use in the setting hierarchical.inside"
            )
        self._runs[0] = " or ".join(sorted(found))

    def init_workspace(self, requirements: Sequence[Requirement]) -> list[Workspace]:
        """What the inner groups need for it. Collective."""
        need = [r for r in requirements if r.collective is Collective.ALL_REDUCE]
        parts = (Collective.ALL_REDUCE, Collective.BROADCAST)
        inner = [Requirement(part, r.dtype, r.max_bytes) for r in need for part in parts]
        built: list[Workspace] = []
        try:
            for group in (self._inside, self._between):
                if group is not None and inner:
                    built.extend(group.init_workspace(inner))
        except BaseException:
            for workspace in built:
                workspace.close()
            raise
        return built

    def ranges(self, collective: Collective, dtype: str, capturing: bool = False) -> list[SizeRange]:
        """All sizes, with the way and what runs on both levels."""
        inside, between = self._runs
        return [SizeRange(0, None, f"{self._algorithm}: {inside} inside, {between} between")]

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """In place; any shape and layout."""
        return self.bind(Collective.ALL_REDUCE, op, tensor.dtype, in_place=True)(tensor)  # type: ignore[no-any-return]

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """Out of place; any shape and layout."""
        return self.bind(Collective.ALL_REDUCE, op, tensor.dtype, in_place=False)(tensor)  # type: ignore[no-any-return]

    def bind(
        self, collective: Collective, op: ReduceOp | None, dtype: torch.dtype | None, *, in_place: bool
    ) -> Callable[..., Any]:
        """A closure over the inner groups' own calls."""
        context = self._context
        if self._closed:
            raise CommunicatorError(f"{context.who} is closed: create the communicator again to go on")
        if collective is not Collective.ALL_REDUCE or op is None or dtype is None:
            raise UnsupportedOperation(f"{context.who} wanted all_reduce, found {collective}")
        if op is ReduceOp.AVG and not dtype.is_floating_point:
            raise UnsupportedOperation(f"{context.who} op avg wants a floating-point tensor, found {dtype}: use sum and divide")
        reduce = ways.bound(self._shape, self._algorithm, self._inside, self._between, op, dtype, context.world_size)

        def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
            self._check(tensor)
            source = tensor.detach()
            if in_place:
                refuse_overlap(tensor, context.who)
                ready = source.is_contiguous() and not source.is_neg()
                out = source if ready else source.resolve_neg().contiguous()
            else:
                out = source.resolve_neg().clone(memory_format=torch.contiguous_format)
            if out.numel():
                began = time.monotonic()
                try:
                    reduce(out.view(-1))
                except PeerError as error:
                    raise self._lost(error, time.monotonic() - began) from error
                except (UnsupportedOperation, WorkspaceTooSmall) as error:
                    # A refusal before anything is sent lets a group go on. This one may be of one host, which has another plan.
                    self.abort()
                    raise CommunicatorError(f"{context.who} all_reduce: refused inside the call: {error}") from error
                except CommunicatorError:
                    self.abort()
                    raise
            if not in_place:
                return out
            if out is not source:
                source.copy_(out)
            return tensor

        return all_reduce

    def _check(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self._context.key.device:
            raise UnsupportedOperation(
                f"{self._context.who} wanted a tensor on {self._context.key.device}, found one on {tensor.device}"
            )
        if without_data(tensor):
            raise UnsupportedOperation(
                f"{self._context.who} wanted a tensor, found the {type(tensor).__name__} of a trace: use commplane.ops"
            )

    def _lost(self, error: PeerError, waited: float) -> PeerError:
        self.abort()
        return explain(self._context, self._shape, error, self._patience, waited)

    def abort(self) -> None:
        """Ranks that wait for this one stop: inside at once, between the hosts when they find their connection closed. Local."""
        for group in (self._inside, self._between):
            if group is not None:
                group.abort()

    def close(self) -> None:
        """Close the inner groups. Idempotent, local."""
        self._closed = True
        inside, between = self._inside, self._between
        self._inside = self._between = None
        for group in (inside, between):
            if group is not None:
                group.close()


def _plan(group: InnerGroup | None) -> str:
    return "" if group is None else group.backends[0]


def _words(text: str) -> list[str]:
    return [] if text == "auto" else [word.strip() for word in text.split(",") if word.strip()]
