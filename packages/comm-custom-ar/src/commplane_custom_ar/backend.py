"""The backend: torch tensors in, native calls out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from commplane.api import Bootstrap, BuildContext, Collective, CommBackend, ReduceOp, Requirement, Workspace, refuse_overlap
from commplane.errors import CommunicatorError, MismatchError, PeerError, UnsupportedOperation
from commplane_custom_ar import _native
from commplane_custom_ar._native import DTYPES, OPS, Comm, Segment
from commplane_custom_ar.segments import map_together
from commplane_custom_ar.symmetric import SymmetricHeap

__all__ = ["CustomAllReduce"]

# Staging before `prepare`: enough for the canary and for small messages; any size still works, in more steps.
_INITIAL_CHUNK = 16384

Call = Callable[..., Any]


@dataclass
class Staging:
    """A segment with a communicator on it. `chunk`: bytes that one step carries."""

    segment: Segment
    comm: Comm
    chunk: int

    def close(self) -> None:
        """Unmap. A call of another thread is made to end first; it raises in that thread."""
        deadline = time.monotonic() + 5.0
        while True:
            try:
                self.comm.close()
                break
            except _native.NativeError as error:
                if error.status != _native.EBUSY or time.monotonic() > deadline:
                    raise
                self.comm.abort()
                time.sleep(0.001)
        self.segment.close()


class StagingWorkspace(Workspace):
    """Larger staging, built beside the present one and taken into use when every rank has built it."""

    backend = "custom_ar"

    def __init__(self, owner: CustomAllReduce, staging: Staging) -> None:
        self.nbytes = staging.chunk * _native.RING_SLOTS
        self._owner = owner
        self._staging: Staging | None = staging

    def commit(self) -> None:
        """Take it into use; the one before goes. From here on the backend owns it."""
        staging, self._staging = self._staging, None
        if staging is not None:
            self._owner.use(staging)

    def close(self) -> None:
        """Before `commit`: it was built in vain. After it: nothing, the backend closes what it uses."""
        staging, self._staging = self._staging, None
        if staging is not None:
            staging.close()


class CustomAllReduce(CommBackend):
    """All-reduce and barrier through a shared-memory segment of the group's own.

    Results are bitwise equal on all ranks, for staged and symmetric tensors: added in the order of group ranks, 16-bit types
    in float32 and rounded once.
    """

    def __init__(self) -> None:
        self._staging: Staging | None = None
        self._heap: SymmetricHeap | None = None

    def open(self, context: BuildContext) -> None:
        """Map the group's segment. Collective."""
        self._context = context
        _native.set_isa(context.options["isa"])
        self._native = _native.load(context.options["binding"])
        self._largest_chunk = max(4096, -(-context.options["chunk_bytes"] // 64) * 64)
        self._staging = self._build(min(_INITIAL_CHUNK, self._largest_chunk))
        self._heap = SymmetricHeap(context, self._staging.comm)

    def _build(self, chunk: int) -> Staging:
        """Staging for chunks of `chunk` bytes, in a segment of its own. Collective."""
        context = self._context
        nbytes = chunk * _native.RING_SLOTS
        layout = _native.layout(context.world_size, nbytes)
        own = layout.offsets[context.rank]
        segment = map_together(context.bootstrap, "staging", layout.total, own, layout.part_bytes)
        try:
            comm = Comm(
                segment,
                rank=context.rank,
                world_size=context.world_size,
                staging_bytes=nbytes,
                chunk_bytes=chunk,
                oversubscribed=context.facts.oversubscribed(context.ranks),
                timeout_s=context.timeout,
            )
        except BaseException:
            segment.close()
            raise
        return Staging(segment, comm, chunk)

    def init_workspace(self, requirements: Sequence[Requirement]) -> list[Workspace]:
        """Staging for what the largest message needs, up to the setting ``chunk_bytes``. Collective."""
        sizes = [r.max_bytes for r in requirements if r.collective is Collective.ALL_REDUCE and r.dtype in DTYPES]
        wanted = min(max(sizes, default=0), self._largest_chunk)
        present = self._open().chunk
        chunk = present
        while chunk < wanted:
            chunk = min(chunk * 2, self._largest_chunk)
        return [] if chunk == present else [StagingWorkspace(self, self._build(chunk))]

    def use(self, staging: Staging) -> None:
        """Go over to `staging` and close the present one. Local; every rank has built its part."""
        old, self._staging = self._staging, staging
        if self._heap is not None:
            self._heap.move_to(staging.comm)
        if old is not None:
            old.close()

    def close(self) -> None:
        """Unmap. The memory goes when the last rank has unmapped it; symmetric tensors keep theirs."""
        staging, self._staging = self._staging, None
        if staging is not None:
            staging.close()
        if self._heap is not None:
            self._heap.detach()

    def _open(self) -> Staging:
        if self._staging is None:
            raise CommunicatorError(f"{self._context.who} is closed: create the communicator again to go on")
        return self._staging

    def abort(self) -> None:
        """Ranks that wait for this one raise at once instead of at their deadline."""
        if self._staging is not None:
            self._staging.comm.abort()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in symmetric memory. Collective."""
        self._open()
        assert self._heap is not None
        return self._heap.empty(shape, dtype)

    def capture_end(self, bootstrap: Bootstrap) -> None:
        """Nothing to exchange: on a CPU there are no recorded addresses; core has compared the operations."""

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """In place; any shape and layout."""
        return self.bind(Collective.ALL_REDUCE, op, tensor.dtype, in_place=True)(tensor)  # type: ignore[no-any-return]

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """Out of place; any shape and layout."""
        return self.bind(Collective.ALL_REDUCE, op, tensor.dtype, in_place=False)(tensor)  # type: ignore[no-any-return]

    def barrier(self) -> None:
        """Return when all ranks have come here."""
        status = self._native.barrier(self._open().comm.handle)
        if status:
            raise self._error(status)

    def bind(self, collective: Collective, op: ReduceOp | None, dtype: torch.dtype | None, *, in_place: bool) -> Call:
        """A closure over native constants: what is known once is looked up once."""
        if collective is not Collective.ALL_REDUCE:
            return super().bind(collective, op, dtype, in_place=in_place)
        native, handle = self._native.all_reduce, self._open().comm.handle
        dtype_code, op_code = DTYPES[str(dtype).removeprefix("torch.")], OPS[str(op)]
        fail, dense_of, empty_like, who = self._error, self._dense, torch.empty_like, self._context.who

        def all_reduce_(tensor: torch.Tensor) -> torch.Tensor:
            if not (tensor.is_cpu and tensor.is_contiguous()) or tensor.is_neg():
                refuse_overlap(tensor, who)
                tensor.detach().copy_(all_reduce_(dense_of(tensor)))
                return tensor
            pointer = tensor.data_ptr()
            status = native(handle, pointer, pointer, tensor.numel(), dtype_code, op_code)
            if status:
                raise fail(status)
            return tensor

        def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
            if not (tensor.is_cpu and tensor.is_contiguous()) or tensor.is_neg():
                return all_reduce_(dense_of(tensor))
            out = empty_like(tensor)  # never requires grad: collectives happen outside of autograd
            status = native(handle, tensor.data_ptr(), out.data_ptr(), tensor.numel(), dtype_code, op_code)
            if status:
                raise fail(status)
            return out

        return all_reduce_ if in_place else all_reduce

    def _dense(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of a CPU tensor."""
        if not tensor.is_cpu:
            raise UnsupportedOperation(f"{self._context.who} wanted a tensor on cpu, found one on {tensor.device}")
        return tensor.detach().resolve_neg().clone(memory_format=torch.contiguous_format)

    def _error(self, status: int) -> CommunicatorError:
        """The native status as an exception, with ranks as global ranks."""
        who, ranks = self._context.who, self._context.ranks
        name = _native.STATUS.get(status, str(status))
        if name == "EBUSY":
            return UnsupportedOperation(f"{who} wanted one thread at a time, found another in a call: give each its communicator")
        detail = self._open().comm.detail()
        at = f"{detail.operation} number {detail.seq}"
        missing = [ranks[r] for r in detail.missing if r not in detail.aborted]
        gone = [ranks[r] for r in detail.aborted]
        if name in ("ETIMEDOUT", "EABORTED") and missing:
            dead = self._context.facts.dead(missing)
            ended = f", of which {_names(dead)} ended" if dead else ""
            told = "" if name == "ETIMEDOUT" else f" (rank {_names(gone)} gave up first)"
            return PeerError(
                f"{who} {at}: waited up to {self._context.timeout:g} s for rank {_names(missing)}{ended}{told}: did it make the "
                f"same calls? COMMPLANE_TIMEOUT sets the limit",
                missing,
            )
        if name == "EABORTED":
            return PeerError(f"{who} {at}: rank {_names(gone)} gave up", gone)
        if name == "EMISMATCH":
            shown = "; ".join(f"rank {ranks[r]} called {text}" for r, text in sorted(detail.mismatched.items()))
            return MismatchError(f"{who} {at}: ranks called with different arguments: {shown}")
        return CommunicatorError(f"{who} {at}: native status {name}: {_native.last_error()}")


def _names(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
