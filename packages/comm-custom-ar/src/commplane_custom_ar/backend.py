"""The backend: torch tensors in, native calls out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from commplane.api import Bootstrap, BuildContext, Collective, CommBackend, ReduceOp, Requirement, Workspace
from commplane.errors import CommunicatorError, MismatchError, PeerError, UnsupportedOperation
from commplane_custom_ar import _native
from commplane_custom_ar._native import DTYPES, OPS, Comm, Segment
from commplane_custom_ar.segments import map_together
from commplane_custom_ar.symmetric import SymmetricHeap

__all__ = ["CustomAllReduce"]

# Staging before `prepare`: enough for the canary and for small messages; any size still works, in more steps.
_INITIAL_CHUNK = 16384

Call = Callable[..., Any]


class StagingWorkspace(Workspace):
    """Staging of one group; lives and dies with the communicator, this is its face towards core."""

    backend = "custom_ar"

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def close(self) -> None:
        """Nothing: the backend owns the memory, and a later `prepare` may have replaced it already."""


class CustomAllReduce(CommBackend):
    """All-reduce and barrier through a shared-memory segment of the group's own.

    Results are bitwise equal on all ranks, for staged and symmetric tensors: added in the order of group ranks, 16-bit types
    in float32 and rounded once.
    """

    def __init__(self) -> None:
        self._comm: Comm | None = None
        self._segment: Segment | None = None
        self._heap: SymmetricHeap | None = None
        self._chunk = 0

    def open(self, context: BuildContext) -> None:
        """Map the group's segment. Collective."""
        self._context = context
        _native.set_isa(context.options["isa"])
        self._native = _native.load(context.options["binding"])
        self._largest_chunk = max(4096, -(-context.options["chunk_bytes"] // 64) * 64)
        self._build(min(_INITIAL_CHUNK, self._largest_chunk))
        assert self._comm is not None
        self._heap = SymmetricHeap(context, self._comm)

    def _build(self, chunk: int) -> None:
        """A segment and a communicator with staging for chunks of `chunk` bytes, in place of the present ones. Collective."""
        context = self._context
        staging = chunk * _native.RING_SLOTS
        layout = _native.layout(context.world_size, staging)
        segment = map_together(context.bootstrap, "staging", layout.total, layout.offsets[context.rank], layout.part_bytes)
        try:
            comm = Comm(
                segment,
                rank=context.rank,
                world_size=context.world_size,
                staging_bytes=staging,
                chunk_bytes=chunk,
                oversubscribed=context.facts.oversubscribed(context.ranks),
                timeout_s=context.timeout,
            )
        except BaseException:
            segment.close()
            raise
        self._release()
        self._segment, self._comm, self._chunk = segment, comm, chunk
        if self._heap is not None:
            self._heap.move_to(comm)

    def init_workspace(self, requirements: Sequence[Requirement]) -> list[Workspace]:
        """Grow the staging to what the largest message needs, up to the setting ``chunk_bytes``. Collective."""
        sizes = [r.max_bytes for r in requirements if r.collective is Collective.ALL_REDUCE and r.dtype in DTYPES]
        wanted = min(max(sizes, default=0), self._largest_chunk)
        chunk = self._chunk
        while chunk < wanted:
            chunk = min(chunk * 2, self._largest_chunk)
        if chunk == self._chunk:
            return []
        self._build(chunk)
        return [StagingWorkspace(chunk * _native.RING_SLOTS)]

    def close(self) -> None:
        """Unmap. The memory goes when the last rank has unmapped it; symmetric tensors keep theirs."""
        if self._heap is not None:
            self._heap.detach()
        self._release()

    def _release(self) -> None:
        comm, self._comm = self._comm, None
        segment, self._segment = self._segment, None
        if comm is not None:
            comm.close()
        if segment is not None:
            segment.close()

    def abort(self) -> None:
        """Ranks that wait for this one raise at once instead of at their deadline."""
        if self._comm is not None:
            self._comm.abort()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in symmetric memory. Collective."""
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
        assert self._comm is not None
        status = self._native.barrier(self._comm.handle)
        if status:
            raise self._error(status)

    def bind(self, collective: Collective, op: ReduceOp | None, dtype: torch.dtype | None, *, in_place: bool) -> Call:
        """A closure over native constants: what is known once is looked up once."""
        if collective is not Collective.ALL_REDUCE or self._comm is None:
            return super().bind(collective, op, dtype, in_place=in_place)
        native, handle = self._native.all_reduce, self._comm.handle
        dtype_code, op_code = DTYPES[str(dtype).removeprefix("torch.")], OPS[str(op)]
        fail, dense_of, empty_like = self._error, self._dense, torch.empty_like

        def all_reduce_(tensor: torch.Tensor) -> torch.Tensor:
            if not (tensor.is_cpu and tensor.is_contiguous()):
                tensor.detach().copy_(all_reduce_(dense_of(tensor)))
                return tensor
            pointer = tensor.data_ptr()
            status = native(handle, pointer, pointer, tensor.numel(), dtype_code, op_code)
            if status:
                raise fail(status)
            return tensor

        def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
            if not (tensor.is_cpu and tensor.is_contiguous()):
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
        return tensor.detach().clone(memory_format=torch.contiguous_format)

    def _error(self, status: int) -> CommunicatorError:
        """The native status as an exception, with ranks as global ranks."""
        assert self._comm is not None
        who, ranks = self._context.who, self._context.ranks
        detail = self._comm.detail()
        at = f"{detail.operation} number {detail.seq}"
        name = _native.STATUS.get(status, str(status))
        if name == "ETIMEDOUT":
            missing = [ranks[r] for r in detail.missing]
            dead = self._context.facts.dead(missing)
            lost = f", of which {', '.join(map(str, dead))} ended" if dead else ""
            return PeerError(
                f"{who} {at}: waited {self._context.timeout:g} s for rank {', '.join(map(str, missing))}{lost}: did it make "
                f"the same calls? COMMPLANE_TIMEOUT sets the limit",
                missing,
            )
        if name == "EABORTED":
            gone = [ranks[r] for r in detail.aborted]
            return PeerError(f"{who} {at}: rank {', '.join(map(str, gone))} gave up", gone)
        if name == "EMISMATCH":
            shown = "; ".join(f"rank {ranks[r]} called {text}" for r, text in sorted(detail.mismatched.items()))
            return MismatchError(f"{who} {at}: ranks called with different arguments: {shown}")
        return CommunicatorError(f"{who} {at}: native status {name}: {_native.last_error()}")
