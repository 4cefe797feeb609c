# SPDX-License-Identifier: Apache-2.0
"""Tensors in GPU memory that every rank of the group maps.

Memory that a peer maps must not be freed, and a tensor goes when the garbage collector of its own rank finds it. So in their next
joint step the ranks tell each other what they have let go of: that of all ranks is unmapped everywhere, then freed by its owner.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from commplane.api import Bootstrap, BuildContext
from commplane_custom_ar.cuda.comm import CudaComm, DeviceMemory

__all__ = ["SymmetricMemory", "wrap"]

_MAX_ID = 65535
_ALIGNMENT = 512  # as torch's allocator


class _Holder:
    """What torch holds for as long as any tensor views the memory."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 2,
        }


def wrap(holder: Any, device: torch.device) -> torch.Tensor:
    """A tensor of bytes over memory of `device`."""
    return torch.as_tensor(holder, device=device)


@dataclass(eq=False)
class _Region:
    """One allocation: this rank's part (0 where there is none), and the peers' as they are mapped here (0 for this rank)."""

    id: int
    address: int = 0
    peers: list[int] = field(default_factory=list)
    registered: bool = False


# Memory of tensors that went while a graph was captured, when nothing may be freed.
_late: list[tuple[DeviceMemory, int]] = []


class SymmetricMemory:
    """The symmetric tensors of one group on this rank.

    Args:
        context: of the backend.
        comm: what is told of each allocation.
        memory: where it is from.
        settle: waits until the device has done all that was queued.
        busy: whether a graph is being captured, so that nothing may be freed.
        tensor: makes a tensor of bytes.
    """

    def __init__(
        self,
        context: BuildContext,
        comm: CudaComm,
        memory: DeviceMemory,
        settle: Callable[[], None],
        busy: Callable[[], bool] = torch.cuda.is_current_stream_capturing,
        tensor: Callable[[Any, torch.device], torch.Tensor] = wrap,
    ) -> None:
        self._context, self._comm, self._memory = context, comm, memory
        self._settle, self._busy, self._tensor = settle, busy, tensor
        self._regions: dict[int, _Region] = {}
        # Of tensors that are gone here. Appended to by the garbage collector, in any thread and at any point.
        self._dropped: list[_Region] = []
        self._unmapped: list[int] = []  # own memory between the two rounds of `reclaim`
        self._count = 0
        self._closed = False

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor. Collective; same shape and dtype on every rank."""
        context, device = self._context, torch.device(self._context.device)
        self.reclaim(context.bootstrap)
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        # Counted on every rank alike, whatever each of them has let go of since: peers compare the number in every call.
        self._count = self._count % _MAX_ID + 1
        # Known on every rank alike too, also where the rest fails on this one: all of them will have let go of it.
        region = self._regions[self._count] = _Region(self._count)
        try:
            region.address, handle = self._memory.allocate(-(-nbytes // _ALIGNMENT) * _ALIGNMENT)
            handles = context.bootstrap.all_gather(handle.hex(), what="symmetric memory: handles")
            for rank, text in enumerate(handles):
                region.peers.append(0 if rank == context.rank else self._memory.open(bytes.fromhex(text)))
            self._comm.register([peer or region.address for peer in region.peers], nbytes, region.id)
            region.registered = True
        except BaseException:
            self._dropped.append(region)
            raise
        holder = _Holder(region.address, nbytes)
        # Not at exit: tensors may live on then.
        weakref.finalize(holder, self._drop, region).atexit = False
        return self._tensor(holder, device).view(dtype).reshape(tuple(shape))

    def reclaim(self, bootstrap: Bootstrap) -> None:
        """Free what every rank has let go of. Collective, where there is any memory."""
        if not self._regions:  # on no rank then
            return
        dropped = {region.id for region in tuple(self._dropped)}
        said = bootstrap.all_gather(sorted(dropped), what="symmetric memory: let go of")
        everywhere = set.intersection(*map(set, said))
        if not everywhere:
            return
        gone = [self._regions.pop(number) for number in sorted(everywhere)]
        for region in gone:  # one by one: the collector may append at any point
            self._dropped.remove(region)
        own = [region.address for region in gone if region.address]
        self._unmapped.extend(own)
        self._settle()  # kernels on it may still run
        for region in gone:
            if region.registered:
                self._comm.unregister(region.id)
            self._unmap(region)
        bootstrap.barrier(what="symmetric memory: unmapped")
        for address in own:
            self._unmapped.remove(address)
            self._memory.free(address)
        _free_late()

    def unmap_all(self) -> None:
        """The communicator is closing: let go of the peers' memory. Local, idempotent; the device is idle."""
        with ExitStack() as stack:
            for region in self._regions.values():
                stack.callback(self._unmap, region)

    def free_dropped(self) -> None:
        """The peers have unmapped too: free what no tensor shows. What one shows goes with it. Local, idempotent."""
        self._closed = True
        gone = [*self._unmapped, *(region.address for region in self._dropped if region.address)]
        self._unmapped.clear()
        self._dropped.clear()
        self._regions.clear()
        with ExitStack() as stack:
            stack.callback(_free_late)
            for address in gone:
                stack.callback(self._memory.free, address)

    def _drop(self, region: _Region) -> None:
        """The last tensor of `region` is gone. Called by the garbage collector, in any thread and at any point."""
        if not self._closed:
            self._dropped.append(region)
        elif self._busy():
            _late.append((self._memory, region.address))
        else:
            self._memory.free(region.address)

    def _unmap(self, region: _Region) -> None:
        peers, region.peers = region.peers, []
        with ExitStack() as stack:
            for opened in peers:
                if opened:
                    stack.callback(self._memory.close, opened)


def _free_late() -> None:
    while True:
        try:
            memory, address = _late.pop()
        except IndexError:  # another thread may have taken the last one
            return
        memory.free(address)
