"""Tensors in memory that every rank of the group maps."""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from commplane.api import BuildContext
from commplane.errors import CommunicatorError
from commplane_custom_ar._native import Comm, NativeError, Segment
from commplane_custom_ar.codes import EBUSY
from commplane_custom_ar.segments import map_together

__all__ = ["Region", "SymmetricHeap"]

_MAX_ID = 65535
_MOST_BYTES = 1 << 47  # of a segment


@dataclass(eq=False)
class Region:
    """One allocation: rank r's part begins at ``base + r * stride``."""

    segment: Segment
    stride: int
    nbytes: int
    id: int


class SymmetricHeap:
    """The symmetric tensors of one group on this rank. A region is released when the last tensor that views it is gone."""

    def __init__(self, context: BuildContext, comm: Comm) -> None:
        self._context = context
        self._comm: Comm | None = comm
        self._regions: set[Region] = set()
        self._pending: list[Region] = []
        self._count = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor. Collective; same shape and dtype on every rank."""
        self._release_pending()
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        stride = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        rank, n = self._context.rank, self._context.world_size
        if n * stride > _MOST_BYTES:  # beyond 2^64 ctypes would take the rest of a division
            raise CommunicatorError(
                f"symmetric memory: wanted at most {_MOST_BYTES} bytes on all {n} ranks together, "
                f"found {n} times {nbytes}: allocate less"
            )
        segment = map_together(self._context.bootstrap, "symmetric memory", n * stride, rank * stride, stride)
        # Counted on every rank alike, whatever each of them has released since: peers compare the number in every call.
        self._count = self._count % _MAX_ID + 1
        region = Region(segment, stride, nbytes, self._count)
        try:
            self._register(region)
        except BaseException:
            segment.close()
            raise
        self._regions.add(region)
        buffer = (ctypes.c_char * nbytes).from_address(segment.base + rank * stride)
        # torch holds the buffer object for as long as any tensor views its storage. Not at exit: tensors may live on then.
        weakref.finalize(buffer, self._release, region).atexit = False
        return torch.frombuffer(buffer, dtype=dtype).reshape(tuple(shape))

    def move_to(self, comm: Comm) -> None:
        """Register all regions with a communicator that replaces the present one. Local."""
        self._comm = comm
        for region in self._regions:
            self._register(region)
        self._release_pending()

    def detach(self) -> None:
        """The communicator is gone; tensors keep their memory until they go too. Local."""
        self._comm = None
        self._release_pending()

    def _register(self, region: Region) -> None:
        assert self._comm is not None
        self._comm.register_symmetric(region.segment.base, region.stride, region.nbytes, region.id)

    def _release(self, region: Region) -> None:
        """The last tensor of `region` is gone. Called by the garbage collector, in any thread and at any point."""
        try:
            if self._comm is not None:
                self._comm.unregister_symmetric(region.id)
        except NativeError as error:
            if error.status != EBUSY:
                raise
            self._pending.append(region)  # another thread is in a call; a later step of ours will find it free
            return
        self._regions.discard(region)
        region.segment.close()

    def _release_pending(self) -> None:
        pending, self._pending = self._pending, []
        for region in pending:
            self._release(region)
