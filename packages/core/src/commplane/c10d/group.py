"""The process group: what torch calls, sorted into a communicator's calls and those of torch's own backends.

A subclass of torch's `ProcessGroup`, not of its `Backend`: torch lets no Python class be a `Backend`, and a call reaches this one
without torch's dispatcher. C++ (functional collectives, DDP's reducer) reaches it through torch's trampolines, which exist for
`Collectives` alone; everything else that C++ asks for ends in the backends registered for the devices: Gloo and NCCL.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from commplane.c10d import fallback
from commplane.c10d.batches import Kept, PeerCalls
from commplane.c10d.collectives import Collectives
from commplane.c10d.ground import Ground
from commplane.c10d.lane import Lane
from commplane.c10d.side import Side
from commplane.c10d.work import JoinedWork
from commplane.errors import CommunicatorError

__all__ = ["CommplaneGroup"]

_ProcessGroup: Any = dist.ProcessGroup  # its methods have several signatures each, which one function cannot have for mypy

_LONGEST = 999_999.0
"""Seconds: the longest timeout that a setting takes; torch's may be longer."""

_IS_TOLD = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 7)
"""Whether torch tells a group that it is destroyed; before, it drops it."""

_ABORTS = 5.0
"""Seconds in which a call that was told to give up does so."""


class CommplaneGroup(Collectives, _ProcessGroup):  # type: ignore[misc]  # Any, see above
    """One process group of the backend ``commplane``. Made by torch, through `commplane.c10d.create`.

    Every collective is torch's, with torch's meaning; of those that go to a communicator a failure is an error of
    `commplane.errors`, raised by the call, or by the wait where it goes on in the background.

    Args:
        ground: the plane; released when the group is shut down.
        store: for this group alone.
        ranks: global ranks in group order.
        rank: group rank.
        name: torch's name of the group.
        timeout: seconds that a collective may wait for its peers.
        backend_options: of NCCL, if they are.
    """

    def __init__(
        self,
        ground: Ground,
        store: Any,
        ranks: Sequence[int],
        rank: int,
        name: str,
        timeout: timedelta,
        backend_options: Any = None,
    ) -> None:
        super().__init__(rank, len(ranks))
        self.ground = ground
        self.ranks = tuple(ranks)
        self._store = store
        self._label = name
        self._timeout = timeout
        self._options = backend_options
        self._sides: dict[str, Side] = {}
        self._works: list[Any] | None = None
        self._cuda_is_ours: bool | None = None
        self._peers = PeerCalls()
        self._open = False  # until the last line: whoever made it releases the ground where this fails
        self._nccl: Any = None
        self._lane = Lane(f"c10d {name}")
        try:
            self._cpu = self._new_side(torch.device("cpu"), self._lane)
            # After the communicator, which has shown that all ranks can be reached, and has a vote where one cannot.
            gloo = fallback.gloo(store, self.ranks, rank, name, timeout, ground.plane.config.startup)
            self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
            if hasattr(self, "_set_default_backend"):
                self._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
            self._nccl = fallback.nccl(store, self.ranks, rank, name, timeout, backend_options)
            if self._nccl is not None:
                self._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, self._nccl)
        except BaseException:
            for side in self._sides.values():
                side.communicator._close(wait=False)
            raise
        self._open = True

    # What the group has for which tensors.

    def _new_side(self, device: torch.device, lane: Lane | None) -> Side:
        """Form the communicator for a type of device. Collective over the group."""
        seconds = min(self._timeout.total_seconds(), _LONGEST)
        communicator = self.ground.communicator(f"c10d_{self._label}", self.ranks, str(device), seconds)
        side = self._sides[device.type] = Side(communicator, lane, self.ground.renamed)
        return side

    def side(self, device: torch.device) -> Side:
        """What serves tensors on `device`. Local.

        Raises:
            CommunicatorError: there is no communicator for them, or not yet.
        """
        if device.type not in self._sides:
            raise CommunicatorError(
                f"[c10d {self._label}] wanted a communicator for {device.type}, found those for "
                f"{', '.join(self._sides) or 'none'}: one is made by the first collective on a tensor there"
            )
        return self._sides[device.type]

    def _side(self, tensor: torch.Tensor) -> Side | None:
        """See `Collectives`."""
        device = tensor.device.type
        found = self._sides.get(device)
        if found is not None:
            return found
        if device == "cpu":
            return self._cpu  # which a shut down group has no more
        if device != "cuda" or self._nccl is None or not self._serves_cuda():
            return None
        return self._new_side(tensor.device, None)

    def _serves_cuda(self) -> bool:
        """Whether CUDA is ours in ``init_process_group(backend)``: not in ``cpu:commplane,cuda:nccl``. Equal on all ranks."""
        if self._cuda_is_ours is None:
            config = str(dist.get_backend_config(self))  # torch knows it once the group has been made
            self._cuda_is_ours = dict(part.split(":") for part in config.split(",")).get("cuda") == "commplane"
        return self._cuda_is_ours

    def _torch(self, tensor: torch.Tensor) -> Any:
        """The backend of torch's own for a tensor."""
        backend = self._get_backend(tensor.device)
        return backend if self._works is None or not tensor.is_cpu else Kept(backend, self._works)

    # What torch asks of a group beside collectives.

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Any:
        """To a group rank, by torch's backend."""
        backend = self._torch(tensors[0])
        return self._peer_call(backend, backend.send, tensors, peer, tag)

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Any:
        """From a group rank, by torch's backend."""
        backend = self._torch(tensors[0])
        return self._peer_call(backend, backend.recv, tensors, peer, tag)

    def _peer_call(self, backend: Any, operation: Any, *args: Any) -> Any:
        # Torch before 2.11 tells any group of a batch, by `_start_coalescing`.
        if self._works is None and getattr(backend, "supports_coalescing", False):
            return self._peers.call(backend, operation, *args)
        return operation(*args)

    def _start_coalescing(self, device: torch.device) -> None:
        """Collect works until `_end_coalescing`, also of Gloo's calls made from here; NCCL does that with its own.

        On CPU reduce, gather, scatter and all_to_all do not come by here: who calls them waits for their own works.
        """
        self._works = []
        if device.type != "cpu":
            self._get_backend(device)._start_coalescing()

    def _end_coalescing(self, device: torch.device) -> Any:
        """One work for all since `_start_coalescing`."""
        works, self._works = self._works or [], None
        if device.type != "cpu":
            work = self._get_backend(device)._end_coalescing()
            works += [] if work is None else [work]
        return JoinedWork(works, [])

    def getBackendName(self) -> str:  # noqa: N802  torch's name
        """What the group is called in torch."""
        return "commplane"

    def get_group_store(self) -> Any:
        """The store of this group."""
        return self._store

    def split_group(
        self,
        ranks: Sequence[int],
        timeout: timedelta | None = None,
        opts: Any = None,
        group_name: str | None = None,
        group_desc: str | None = None,
        device_types: Any = None,
    ) -> CommplaneGroup | None:
        """A group of some of this one's ranks, which are group ranks. Collective over `ranks`; None on the others.

        torch does not have it on its books: it is used by its methods, and ended by `shutdown` on all of `ranks`. What torch's
        own functions are to know is made by ``dist.new_group``.
        """
        from commplane.c10d.creation import make_group

        if self.rank() not in ranks:
            return None
        name = group_name or f"{self._label}:split:{'_'.join(map(str, ranks))}"
        store = dist.PrefixStore(f"split/{name}", self._store)
        members = [self.ranks[r] for r in ranks]
        group = make_group(store, members, list(ranks).index(self.rank()), name, timeout or self._timeout, opts)
        if self._nccl is not None:
            group._cuda_is_ours = self._serves_cuda()
        group._set_group_name(name)
        group._set_group_desc(group_desc or "undefined")
        return group

    def shutdown(self) -> None:
        """Wait for what is in the background, and for the other ranks; then close everything. Collective, idempotent."""
        self._end(wait=True)

    def abort(self) -> None:
        """Close everything now; peers that wait for this rank stop waiting. Local, idempotent."""
        self._end(wait=False)

    def _end(self, *, wait: bool) -> None:
        if not self._open:
            return
        self._open = False
        # Whom a fault on one device has cost this group will not come to the end of the other either.
        wait = wait and all(side.communicator._fault is None for side in self._sides.values())
        if wait:
            self._lane.drain()
        else:
            for side in self._sides.values():
                side.communicator.abort()
            self._lane.rest(_ABORTS)
        for side in self._sides.values():
            side.communicator._close(wait=wait)
        self._lane.close()
        if self._nccl is not None:  # Gloo closes its connections when it is dropped
            (self._nccl.shutdown if wait else self._nccl.abort)()
        self.ground.release(wait=wait)

    def __del__(self) -> None:
        if not getattr(self, "_open", False) or sys.is_finalizing():
            return
        if not _IS_TOLD:
            self.shutdown()
            return
        # Local: the garbage of one rank is collected when the others are elsewhere.
        warnings.warn(f"process group {self._label} was never shut down", ResourceWarning, stacklevel=2, source=self)
        self.abort()
