"""Memory that all ranks of a group map, by torch's CUDA allocator for symmetric memory; each rank needs a GPU of its own."""

from __future__ import annotations

import os
import uuid
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from commplane.api import Bootstrap, BuildContext
from commplane.errors import CommunicatorError, UnsupportedOperation

__all__ = ["SymmetricGroup", "conflict", "group_name", "out_of_step", "require_peers"]

_OLDEST_CAPABILITY = (8, 0)  # torch's kernels add bfloat16 with an instruction that came with it


# Exchanges of handles that this process took part in. torch numbers the keys of an exchange in each process, for all groups
# together: ranks that took part in different numbers of them would wait for keys that nobody writes.
_exchanges: list[str] = []


def out_of_step(exchanges: list[list[object]], ranks: tuple[int, ...]) -> str | None:
    """Why torch cannot exchange handles in this group any more, or None. Pure.

    Args:
        exchanges: in group order, how many exchanges each rank took part in, and the last one that failed there or None.
        ranks: global ranks in group order.
    """
    failed = next(((rank, said[1]) for rank, said in zip(ranks, exchanges, strict=True) if said[1] is not None), None)
    if failed is not None:
        return f"wanted ranks whose exchanges of handles all succeeded, one failed on rank {failed[0]}: {failed[1]}: start again"
    if len({str(said[0]) for said in exchanges}) > 1:
        counts = ", ".join(f"rank {rank} {said[0]}" for rank, said in zip(ranks, exchanges, strict=True))
        return (
            f"wanted ranks that exchanged handles equally often, because torch counts that in each process, found {counts}: "
            f"create groups in which all ranks take part equally"
        )
    return None


def group_name(purpose: str, token: str) -> str:
    """What a communicator is called in torch's registry. Pure. `token` is drawn anew for each: torch can forget no name."""
    return f"commplane/{purpose}/{token}"


def conflict(devices: list[tuple[str, int, tuple[int, int]]], ranks: tuple[int, ...]) -> str | None:
    """Why these devices cannot be one group, or None. Pure.

    Args:
        devices: in group order, the UUID, the index in its own process and the compute capability of each rank's device.
        ranks: global ranks in group order.
    """
    for i, (identity, index, capability) in enumerate(devices):
        if tuple(capability) < _OLDEST_CAPABILITY:
            wanted, found = (".".join(map(str, c)) for c in (_OLDEST_CAPABILITY, capability))
            return f"wanted GPUs of compute capability {wanted} or newer, rank {ranks[i]} has one of {found}: use another backend"
        for j in range(i):
            if devices[j][0] == identity:
                return (
                    f"wanted a GPU of its own for each rank, ranks {ranks[j]} and {ranks[i]} share {identity}: "
                    f"give each rank another device"
                )
            if devices[j][1] == index:
                return (
                    f"wanted another device index on each rank, ranks {ranks[j]} and {ranks[i]} both call theirs cuda:{index}, "
                    f"which torch takes for one device: make all GPUs visible to all ranks"
                )
    return None


def require_peers(context: BuildContext) -> None:
    """Raise on every rank unless each has a GPU of its own, new enough, that reaches the others' memory. Collective.

    torch refuses such groups too, one rank after the other and in the middle of an exchange.
    """
    device = torch.device(context.device)
    properties = torch.cuda.get_device_properties(device)
    own = [str(properties.uuid), device.index, [properties.major, properties.minor]]
    found = context.bootstrap.all_gather(own, what="symmetric memory: devices")
    reason = conflict([(u, i, (c[0], c[1])) for u, i, c in found], context.ranks)
    if reason is None:
        unreachable = [
            f"rank {context.ranks[r]} (cuda:{index})"
            for r, (_, index, _) in enumerate(found)
            if r != context.rank and not torch.cuda.can_device_access_peer(device.index, index)
        ]
        said = context.bootstrap.all_gather(unreachable, what="symmetric memory: peer access")
        first = next((i for i, names in enumerate(said) if names), None)
        if first is not None:
            reason = (
                f"wanted GPUs that read each other's memory, that of rank {context.ranks[first]} does not reach "
                f"{', '.join(said[first])}: use another backend"
            )
    if reason is not None:
        raise UnsupportedOperation(f"{context.who} {reason}")


class SymmetricGroup:
    """A group of ranks as torch's symmetric memory knows it, without a default process group.

    Up to torch 2.10 or so the exchange of handles looks the group up among those of `set_group_info`, later among the process
    groups; both get it, over a store of this communicator's own. torch keeps the first entry, with its connection to the store,
    until the process ends.
    """

    def __init__(self, context: BuildContext) -> None:
        """Register. Collective: all ranks learn the name that group rank 0 draws."""
        from torch._C._distributed_c10d import _register_process_group, _SymmetricMemory

        # A GPU's NVLink multicast is a resource of the whole host, and torch would set it up with each allocation though no
        # operator used here needs it. A backend that needs multicast has to ask for it by a key of its own.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        device = torch.device(context.device)
        self._native: Any = _SymmetricMemory
        self._device = device
        self._who = context.who
        self._ranks = context.ranks
        self._require_plain_memory()
        token = context.bootstrap.broadcast(uuid.uuid4().hex, src=0, what="symmetric memory: name of the group")
        self.name = group_name(context.key.purpose, token)
        name: Any = self.name  # a string, for which newer releases of torch have a type of their own
        self._registered = name
        store = context.bootstrap.store("symm")
        store.set_timeout(timedelta(seconds=context.deadline.seconds))
        self._pg: Any = dist.ProcessGroup(store, context.rank, context.world_size)
        _register_process_group(name, self._pg)
        _SymmetricMemory.set_group_info(self.name, context.rank, context.world_size, store)

    def _require_plain_memory(self) -> None:
        """Raise unless what is allocated comes from torch's own allocator and multicast is off. Local."""
        from torch._C._autograd import DeviceType

        asked = getattr(self._native, "get_backend", None)  # older releases have the one kind
        kind = "CUDA" if asked is None else asked(self._device)
        if kind != "CUDA":
            raise UnsupportedOperation(
                f"{self._who} wanted torch's symmetric memory of kind CUDA, found {kind}: unset TORCH_SYMMMEM, "
                f"or do not call set_backend"
            )
        if self._native.has_multicast_support(DeviceType.CUDA, self._device.index):
            raise UnsupportedOperation(
                f"{self._who} wanted multicast to be off, torch {torch.__version__} has it on in spite of "
                f"TORCH_SYMM_MEM_DISABLE_MULTICAST: use another backend"
            )

    def allocate(self, nbytes: int, bootstrap: Bootstrap, what: str) -> torch.Tensor:
        """`nbytes` bytes of memory that all ranks map, zeroed. Collective; the same size on every rank.

        The exchange of handles has torch's own waits, bounded by the time for opening where they go over the store. That is why
        the ranks meet first: one whose allocation fails is then known before any waits for it.
        """
        try:
            memory: torch.Tensor = self._native.empty_strided_p2p((nbytes,), [1], torch.uint8, self._device, self.name)
            memory.zero_()
            torch.cuda.synchronize(self._device)  # a peer's first write must not be overtaken by the zeros
        except RuntimeError as error:  # out of memory, mostly
            raise CommunicatorError(f"{self._who} {what} of {nbytes} bytes: {str(error).splitlines()[0]}") from error
        failed = next((text for text in _exchanges if text), None)
        said = bootstrap.all_gather([len(_exchanges), failed], what=f"symmetric memory: {what}")
        reason = out_of_step(said, self._ranks)
        if reason is not None:
            raise UnsupportedOperation(f"{self._who} {what}: {reason}")
        try:
            handle = self._native.rendezvous(memory, self.name)
        except RuntimeError as error:
            text = str(error).splitlines()[0]
            _exchanges.append(text)
            raise CommunicatorError(f"{self._who} {what}: torch could not exchange handles: {text}") from error
        _exchanges.append("")
        if handle is None or handle.multicast_ptr:
            found = "nothing" if handle is None else "memory with a multicast mapping"
            raise CommunicatorError(f"{self._who} {what}: wanted memory that all ranks map, found {found}: use another backend")
        return memory

    def close(self) -> None:
        """Take the name out of the registry of process groups; what is allocated lives on. Local, idempotent."""
        from torch._C._distributed_c10d import _unregister_process_group

        pg, self._pg = self._pg, None
        if pg is not None:
            _unregister_process_group(self._registered)
