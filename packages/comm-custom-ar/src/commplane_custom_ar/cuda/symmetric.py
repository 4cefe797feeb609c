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
from dataclasses import dataclass
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
    """One allocation: this rank's part, and the peers' as they are mapped here (0 for this rank)."""

    address: int
    peers: list[int]
    id: int


class SymmetricMemory:
    """The symmetric tensors of one group on this rank.

    Args:
        context: of the backend.
        comm: what is told of each allocation.
        memory: where it is from.
        settle: waits until the device has done all that was queued.
        tensor: makes a tensor of bytes.
    """

    def __init__(
        self,
        context: BuildContext,
        comm: CudaComm,
        memory: DeviceMemory,
        settle: Callable[[], None],
        tensor: Callable[[Any, torch.device], torch.Tensor] = wrap,
    ) -> None:
        self._context, self._comm, self._memory, self._settle, self._tensor = context, comm, memory, settle, tensor
        self._regions: dict[int, _Region] = {}
        # Of tensors that are gone here. Appended to by the garbage collector, in any thread and at any point.
        self._dropped: list[_Region] = []
        self._doomed: list[int] = []  # own memory of steps that failed: a peer may have mapped it
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
        region = _Region(0, [], self._count)
        try:
            region.address, handle = self._memory.allocate(-(-nbytes // _ALIGNMENT) * _ALIGNMENT)
            handles = context.bootstrap.all_gather(handle.hex(), what="symmetric memory: handles")
            for rank, text in enumerate(handles):
                region.peers.append(0 if rank == context.rank else self._memory.open(bytes.fromhex(text)))
            self._comm.register([peer or region.address for peer in region.peers], nbytes, region.id)
        except BaseException:
            self._doomed.extend([region.address] if region.address else [])
            self._unmap(region)
            raise
        self._regions[region.id] = region
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
        self._dropped[:] = [region for region in self._dropped if region.id not in everywhere]
        self._doomed.extend(region.address for region in gone)
        self._settle()  # kernels on it may still run
        for region in gone:
            self._comm.unregister(region.id)
            self._unmap(region)
        bootstrap.barrier(what="symmetric memory: unmapped")
        for region in gone:
            self._doomed.remove(region.address)
            self._memory.free(region.address)

    def unmap_all(self) -> None:
        """The communicator is closing: let go of the peers' memory. Local, idempotent; the device is idle."""
        with ExitStack() as stack:
            for region in self._regions.values():
                stack.callback(self._unmap, region)

    def free_dropped(self) -> None:
        """The peers have unmapped too: free what no tensor shows. What one shows goes with it. Local, idempotent."""
        self._closed = True
        dropped = [region.address for region in self._dropped]
        gone, self._doomed = [*self._doomed, *dropped], []
        self._dropped.clear()
        self._regions.clear()
        with ExitStack() as stack:
            for address in gone:
                stack.callback(self._memory.free, address)

    def _drop(self, region: _Region) -> None:
        """The last tensor of `region` is gone. Called by the garbage collector, in any thread and at any point."""
        if self._closed:
            self._memory.free(region.address)
        else:
            self._dropped.append(region)

    def _unmap(self, region: _Region) -> None:
        peers, region.peers = region.peers, []
        with ExitStack() as stack:
            for opened in peers:
                if opened:
                    stack.callback(self._memory.close, opened)
