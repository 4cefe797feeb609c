# SPDX-License-Identifier: Apache-2.0
"""The backend: torch tensors in, native calls out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch

from commplane.api import (
    Bootstrap,
    BuildContext,
    Collective,
    CommBackend,
    FlightRecord,
    ReduceOp,
    Requirement,
    Workspace,
    add_rms_norm,
)
from commplane.errors import CommunicatorError, ConfigError, UnsupportedOperation
from commplane_custom_ar import _native, flight
from commplane_custom_ar._native import NativeError
from commplane_custom_ar.calls import Norm, Target
from commplane_custom_ar.codes import DTYPES, OPS
from commplane_custom_ar.faults import explain
from commplane_custom_ar.staging import Staging, StagingWorkspace, build
from commplane_custom_ar.symmetric import SymmetricHeap

__all__ = ["CustomAllReduce"]

# Bytes of a step before `prepare`. What the setting allows beyond is built when it is declared to be needed.
_INITIAL_CHUNK = 65536

Call = Callable[..., Any]


class CustomAllReduce(CommBackend):
    """Collectives through a shared-memory segment of the group's own.

    Results are bitwise equal on all ranks, for staged and symmetric tensors: added in the order of group ranks, 16-bit types
    in float32 and rounded once.
    """

    keeps_flight_records: ClassVar[bool] = True

    def __init__(self) -> None:
        self._staging: Staging | None = None
        self._heap: SymmetricHeap | None = None

    def open(self, context: BuildContext) -> None:
        """Map the group's segment. Collective."""
        self._context = context
        _native.set_isa(context.options["isa"])
        self._native = _native.load(context.options["binding"])
        self._largest_chunk = max(4096, -(-context.options["chunk_bytes"] // 64) * 64)
        self._staging = build(context, min(_INITIAL_CHUNK, self._largest_chunk))
        self._single_copy = self._agree_on_single_copy(self._staging)
        self._use_single_copy(self._staging)
        self._heap = SymmetricHeap(context, self._staging.comm)

    def _agree_on_single_copy(self, staging: Staging) -> tuple[int, int]:
        """The bytes of messages that go by single copy: the setting's, where every rank may read every other. Collective."""
        smallest, largest = _single_copy_range(self._context)
        if largest <= 0:
            return 0, 0
        bootstrap = self._context.bootstrap
        bootstrap.barrier(what="single copy: all ranks have opened")
        try:
            staging.comm.probe_single_copy()
            allowed = True
        except NativeError:
            allowed = False
        return (smallest, largest) if all(bootstrap.all_gather(allowed, what="single copy: probe")) else (0, 0)

    def _use_single_copy(self, staging: Staging) -> None:
        staging.comm.enable_single_copy(*self._single_copy)

    def init_workspace(self, requirements: Sequence[Requirement]) -> list[Workspace]:
        """Staging for what the largest message needs, up to the setting ``chunk_bytes``. Collective."""
        sizes = [r.max_bytes for r in requirements if r.collective is not Collective.BARRIER and r.dtype in DTYPES]
        wanted = min(max(sizes, default=0), self._largest_chunk)
        present = self._open().chunk
        chunk = present
        while chunk < wanted:
            chunk = min(chunk * 2, self._largest_chunk)
        return [] if chunk == present else [StagingWorkspace(self._use, build(self._context, chunk))]

    def _use(self, staging: Staging) -> None:
        """Go over to `staging` and close the present one. Local; every rank has built its part."""
        old, self._staging = self._staging, staging
        self._use_single_copy(staging)
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

    def flight_records(self) -> Sequence[FlightRecord]:
        """From the library's own ring. Local, from any thread."""
        staging = self._staging
        return () if staging is None else flight.records(staging.comm)

    def bare(self, tensor: torch.Tensor, op: ReduceOp) -> Callable[[], object]:
        """The library's function with all its arguments."""
        pointer, dtype = tensor.data_ptr(), DTYPES[str(tensor.dtype).removeprefix("torch.")]
        return partial(self._native.all_reduce, self._open().comm.handle, pointer, pointer, tensor.numel(), dtype, OPS[str(op)])

    # The methods of the contract; what core calls is what `bind` hands out.

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """In place; any shape and layout."""
        return self.bind(Collective.ALL_REDUCE, op, tensor.dtype, in_place=True)(tensor)  # type: ignore[no-any-return]

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """Out of place; any shape and layout."""
        return self.bind(Collective.ALL_REDUCE, op, tensor.dtype, in_place=False)(tensor)  # type: ignore[no-any-return]

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenated along dimension 0."""
        return self.bind(Collective.ALL_GATHER, None, tensor.dtype, in_place=False)(tensor)  # type: ignore[no-any-return]

    def reduce_scatter(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """Cut along dimension 0."""
        return self.bind(Collective.REDUCE_SCATTER, op, tensor.dtype, in_place=False)(tensor)  # type: ignore[no-any-return]

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """In place from group rank `src`."""
        return self.bind(Collective.BROADCAST, None, tensor.dtype, in_place=True)(tensor, src)  # type: ignore[no-any-return]

    def all_reduce_rms_norm(
        self, tensor: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fused, one pass over the data."""
        call = self.bind(Collective.ALL_REDUCE_RMS_NORM, None, tensor.dtype, in_place=False)
        return call(tensor, residual, weight, eps, weight_bias)  # type: ignore[no-any-return]

    def barrier(self) -> None:
        """Return when all ranks have come here."""
        self.bind(Collective.BARRIER, None, None, in_place=False)()

    def bind(self, collective: Collective, op: ReduceOp | None, dtype: torch.dtype | None, *, in_place: bool) -> Call:
        """A closure over native constants."""
        comm, context = self._open().comm, self._context
        fail = partial(explain, context, comm)
        target = Target(self._native, comm.handle, context.who, context.rank, context.world_size, fail)
        if collective is Collective.BARRIER:
            return target.barrier()
        code = DTYPES.get(str(dtype).removeprefix("torch."))
        if code is None:
            raise UnsupportedOperation(f"{context.who} {collective} wanted a dtype of {', '.join(DTYPES)}, found {dtype}")
        if collective is Collective.ALL_GATHER:
            return target.all_gather(code)
        if collective is Collective.BROADCAST:
            return target.broadcast(code)
        if collective is Collective.ALL_REDUCE_RMS_NORM and dtype == torch.float64:  # not in the library
            return self._composed_norm(target, code, in_place=in_place)
        if collective is Collective.ALL_REDUCE_RMS_NORM:
            return target.all_reduce_rms_norm_(code) if in_place else target.all_reduce_rms_norm(code)
        op_code = OPS[str(op)]
        if collective is Collective.REDUCE_SCATTER:
            return target.reduce_scatter(code, op_code)
        return target.all_reduce_(code, op_code) if in_place else target.all_reduce(code, op_code)

    def _composed_norm(self, target: Target, code: int, *, in_place: bool) -> Norm:
        """From an all-reduce and torch."""
        if in_place:
            return super().bind(Collective.ALL_REDUCE_RMS_NORM, None, torch.float64, in_place=True)
        all_reduce = target.all_reduce(code, OPS["sum"])
        return lambda tensor, residual, weight, eps, weight_bias: add_rms_norm(
            all_reduce(tensor), residual, weight, eps, weight_bias
        )


def _single_copy_range(context: BuildContext) -> tuple[int, int]:
    """The smallest and the largest message, in bytes; (0, 0) for none."""
    setting = context.options["single_copy"]
    if setting == "auto":
        return _native.single_copy_range(context.world_size)
    if setting == "off":
        return 0, 0
    smallest, _, largest = setting.partition(":")
    if not (smallest.isdecimal() and largest.isdecimal() and 0 < int(largest) < 1 << 48):
        raise ConfigError(f"{context.who} setting single_copy: wanted auto, off or MIN:MAX in bytes, found {setting!r}")
    return int(smallest), int(largest)
