"""The contract of a backend: what a plugin implements, and what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from commplane.api.bootstrap import Bootstrap, Deadline
from commplane.api.facts import Facts
from commplane.api.flight import FlightRecord
from commplane.api.group import GroupKey
from commplane.api.inner import InnerGroups
from commplane.api.ranges import SizeRange
from commplane.api.types import Capability, Collective, ReduceOp
from commplane.api.workspace import Requirement, Workspace
from commplane.errors import UnsupportedOperation

if TYPE_CHECKING:
    import torch

    from commplane.api.quantize import Quantization, Quantized

__all__ = ["BuildContext", "CommBackend", "ProbeRequest", "refuse_overlap"]


def refuse_overlap(tensor: torch.Tensor, who: str) -> None:
    """Raise for a tensor that shows one number at several places and so cannot be written, before anything is sent. Local."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise UnsupportedOperation(
            f"{who} wanted a tensor that can be written in place, found one expanded to {list(tensor.shape)}: clone it"
        )


@dataclass(frozen=True)
class ProbeRequest:
    """What a probe is asked about. `rank` is the group rank of this process; `options` are the backend's own settings."""

    key: GroupKey
    rank: int
    options: Mapping[str, Any]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks in group order."""
        return self.key.ranks

    @property
    def world_size(self) -> int:
        """Number of ranks in the group."""
        return len(self.key.ranks)


@dataclass(frozen=True)
class BuildContext:
    """What a backend is opened with.

    Attributes:
        backend: its name in the plan.
        key: identity of the group.
        rank: group rank of this process.
        device: device of this process for this group, such as ``"cpu"`` or ``"cuda:0"``.
        bootstrap: control plane of this backend in this group; for `open`, `init_workspace`, `empty` and `capture_end`,
            never for an operation.
        facts: facts of all ranks of the plane.
        deadline: when `open` must be done.
        timeout: seconds that a running operation may wait for its peers.
        options: the backend's own settings.
        inner: makes communicators of parts of the group, for a backend that is made of others; for `open`. Since comm 1.4.
    """

    backend: str
    key: GroupKey
    rank: int
    device: str
    bootstrap: Bootstrap
    facts: Facts
    deadline: Deadline
    timeout: float
    options: Mapping[str, Any]
    inner: InnerGroups | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks in group order."""
        return self.key.ranks

    @property
    def world_size(self) -> int:
        """Number of ranks in the group."""
        return len(self.key.ranks)

    @property
    def who(self) -> str:
        """How errors of this communicator begin: ``[tp rank 3/8 custom_ar]``."""
        return f"[{self.key.purpose} rank {self.rank}/{self.world_size} {self.backend}]"


class CommBackend(ABC):
    """One backend, opened for one group on one rank.

    Threads: `open` and the canary run in a thread of their own; afterwards calls come from one thread at a time.
    Device: for a group on CUDA, its device is the thread's current one in `open`, `ranges`, the canary, `init_workspace`,
    `empty`, `capture_begin`, `capture_end` and `close`. In a call and in `abort` it is whatever the caller has: launch by the
    tensor's device.
    Ownership: tensors passed in belong to the caller again as soon as the call returns.
    Errors: `PeerError` when peers are missing at the deadline, `MismatchError` when ranks called with different arguments,
    `UnsupportedOperation` for anything not served. Never a silent no-op.
    Override what the spec's capabilities declare; the rest raises `UnsupportedOperation`.

    Attributes:
        keeps_flight_records: True where `flight_records` is implemented. Else core records each call, which costs more.
    """

    keeps_flight_records: ClassVar[bool] = False

    @abstractmethod
    def open(self, context: BuildContext) -> None:
        """Build. Collective over the group; raises if this rank cannot, and every rank then rolls back together."""

    @abstractmethod
    def close(self) -> None:
        """Release everything. Idempotent, never waits for peers without a deadline; also called after a failed `open`."""

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """Reduce in place over the ranks. Collective. Any shape and layout; returns `tensor`."""
        raise self._unsupported(Capability.ALL_REDUCE)

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """Reduce into a new tensor. Collective. The input is left as it was."""
        return self.all_reduce_(tensor.detach().clone(), op)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """All ranks' tensors concatenated along dimension 0 in group order. Collective; shapes are equal on all ranks."""
        raise self._unsupported(Capability.ALL_GATHER)

    def reduce_scatter(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """Slice `rank` of the reduced tensor, cut evenly along dimension 0. Collective."""
        raise self._unsupported(Capability.REDUCE_SCATTER)

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Fill `tensor` in place from group rank `src`. Collective; returns `tensor`."""
        raise self._unsupported(Capability.BROADCAST)

    def all_reduce_rms_norm(
        self, tensor: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum `tensor`, add `residual`, normalise over the last dimension. Collective. Returns the norm and the new residual.

        Rounded where `commplane.api.add_rms_norm` rounds after an `all_reduce`; how the squares of a row are added up and the
        root is taken is the backend's. The inputs are left as they were; the results are new and do not require grad.

        The communicator has checked that `residual` has the shape, dtype and device of `tensor`, that `weight` is one row of
        the same, and that `eps` and `weight_bias` are finite. There may be 0 elements, any hidden size, any layout, and inputs
        that require grad. All but `tensor` is equal on all ranks, which need not be checked.
        """
        raise self._unsupported(Capability.ALL_REDUCE_RMS_NORM)

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
        """`all_reduce_rms_norm` with the norm quantised. Collective; since comm 1.3.

        Returns the quantised norm, the norm itself if `keep_norm`, and the new residual. The norm is rounded to its dtype before
        it is quantised; a value may be one step of the format from `commplane.api.quantize` where the norm is one step of its
        dtype off. What the communicator has checked is the same, and that hidden fits the format.
        """
        raise self._unsupported(Capability.ALL_REDUCE_RMS_NORM_QUANT)

    def barrier(self) -> None:
        """Return when all ranks have come here. Collective."""
        raise self._unsupported(Capability.BARRIER)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in symmetric memory, uninitialised. Collective; same shape and dtype on every rank."""
        raise self._unsupported(Capability.SYMMETRIC_MEMORY)

    def init_workspace(self, requirements: Sequence[Requirement]) -> list[Workspace]:
        """Build what `requirements` need. Collective; called before capture; nothing grows otherwise."""
        return []

    def ranges(self, collective: Collective, dtype: str, capturing: bool = False) -> Sequence[SizeRange] | None:
        """The sizes that this backend should be chosen for, as it knows them once it is open. Local; since comm 1.2.

        Asked for each collective but `barrier` and each dtype of the spec (``"*"`` where the spec names none), right after
        `open` and never again: what `init_workspace` builds later changes no plan. The plan keeps what lies within the limits
        of the spec; what is left goes to the next backend. None is for all that the spec says, an empty answer for nothing.
        Every rank must answer alike, so what was measured or read from a file has to be exchanged in `open`: the ranks compare
        the answers, and a difference is an `AgreementError` that shows it.

        The best of several backends, and of several algorithms of one, is not monotone in size: hence ranges, in any number.
        Which algorithm runs is up to the backend's own call; the plan and ``commplane explain`` show the name.

        Args:
            collective: which one.
            dtype: torch's name.
            capturing: whether the calls are made while a capture is open.
        """
        return None

    def formats(self) -> Collection[str] | None:
        """Of `all_reduce_rms_norm_quant`, the formats of the spec that this device has. Local; since comm 1.3.

        Asked once, right after `open`, by whoever declares the collective. None is for all of them; those that are left out are
        composed, and with an empty answer all are. Every rank must answer alike: what is left is part of the plan that the
        ranks compare.
        """
        return None

    def capture_begin(self) -> None:
        """A capture starts. Local. Only called with `Capability.CAPTURE`."""

    def capture_end(self, bootstrap: Bootstrap) -> None:
        """All ranks captured the same operations: exchange what replay needs. Collective; only with `Capability.CAPTURE`."""

    def abort(self) -> None:
        """Make peers that wait for this rank stop waiting. Local; optional."""

    def flight_records(self) -> Sequence[FlightRecord]:
        """The last calls, oldest first. Local, from any thread, also while another is in a call and after a fault."""
        return ()

    def bare(self, tensor: torch.Tensor, op: ReduceOp) -> Callable[[], object] | None:
        """The transport's own in-place all-reduce of `tensor`, every argument fixed; None where there is no such call.

        For measuring alone: what dispatch costs is the difference to `Communicator.all_reduce_`. The call is collective and
        checks nothing; its result is not looked at.
        """
        return None

    def bind(
        self, collective: Collective, op: ReduceOp | None, dtype: torch.dtype | None, *, in_place: bool
    ) -> Callable[..., Any]:
        """The callable that the dispatch table holds for one (collective, op, dtype). Local.

        It takes what the method takes, but for `op`: the tensor, then ``src`` for broadcast, or residual, weight, eps and
        weight_bias (and how to quantise, and whether to keep the norm), all by position. `in_place` is for all-reduce and
        all_reduce_rms_norm, whose results then go into the tensor and the residual. Override to hand out something leaner than
        a method. Bound anew after each `init_workspace`, so it may hold on to what was built.
        """
        if collective is Collective.ALL_REDUCE:
            method = self.all_reduce_ if in_place else self.all_reduce
            return lambda tensor: method(tensor, op)  # type: ignore[arg-type]
        if collective is Collective.REDUCE_SCATTER:
            return lambda tensor: self.reduce_scatter(tensor, op)  # type: ignore[arg-type]
        if collective is Collective.ALL_REDUCE_RMS_NORM and in_place:

            def all_reduce_rms_norm_(tensor: torch.Tensor, residual: torch.Tensor, *rest: Any) -> Any:
                norm, total = self.all_reduce_rms_norm(tensor, residual, *rest)
                return tensor.detach().copy_(norm), residual.detach().copy_(total)

            return all_reduce_rms_norm_
        return getattr(self, collective.value)  # type: ignore[no-any-return]

    def _unsupported(self, capability: Capability) -> UnsupportedOperation:
        return UnsupportedOperation(f"{type(self).__name__} does not implement {capability}: declare it only with its method")
