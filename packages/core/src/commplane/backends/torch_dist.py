"""torch.distributed as a backend: the one that every group can fall back to.

The process group is built directly over this group's store, without `init_process_group` and `new_group`: it needs no default
group, no rank outside the group takes part, and a call saves what c10d's Python front costs.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from commplane.api import BuildContext, CommBackend, ReduceOp, refuse_overlap
from commplane.errors import CommunicatorError, MismatchError, PeerError, UnsupportedOperation
from commplane.tracer import without_data

__all__ = ["TorchDistributed"]

_OPS: dict[ReduceOp, Any] = {
    ReduceOp.SUM: dist.ReduceOp.SUM,
    ReduceOp.MIN: dist.ReduceOp.MIN,
    ReduceOp.MAX: dist.ReduceOp.MAX,
    ReduceOp.AVG: dist.ReduceOp.SUM,  # divided afterwards: Gloo has no AVG
}


class TorchDistributed(CommBackend):
    """Gloo on CPU, NCCL on CUDA, and on other devices whatever torch names as their backend."""

    def __init__(self) -> None:
        self._pg: Any = None

    def open(self, context: BuildContext) -> None:
        """Connect. Collective."""
        self._context = context
        self._pg = _process_group(context)

    def close(self) -> None:
        """Drop the process group; Gloo and NCCL free their connections with it."""
        pg, self._pg = self._pg, None
        if pg is not None and self._context.device.startswith("cuda"):
            pg.abort()

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """Any layout; a copy is made where it is not contiguous."""
        self._check(tensor, op)
        refuse_overlap(tensor, self._context.who)
        dense = tensor.detach().resolve_neg().contiguous()
        options = dist.AllreduceOptions()
        options.reduceOp = _OPS[op]
        self._wait("all_reduce", lambda pg: pg.allreduce([dense], options))
        if op is ReduceOp.AVG:
            dense.div_(self._context.world_size)
        return _into(tensor, dense)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate along dimension 0."""
        self._check(tensor)
        dense = tensor.detach().resolve_neg().contiguous()
        shape = (self._context.world_size * dense.shape[0], *dense.shape[1:])
        out = torch.empty(shape, dtype=dense.dtype, device=dense.device)
        if out.numel():
            self._wait("all_gather", lambda pg: pg._allgather_base(out, dense))
        return out

    def reduce_scatter(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """Cut along dimension 0."""
        self._check(tensor, op)
        n, rank = self._context.world_size, self._context.rank
        rows = tensor.shape[0] // n
        if not self._context.device.startswith("cuda"):
            # Gloo's own reduce-scatter exists only in newer releases; this costs n times the bytes and is always right.
            return self.all_reduce(tensor, op)[rank * rows : (rank + 1) * rows].clone()
        out = torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
        options = dist.ReduceScatterOptions()
        options.reduceOp = _OPS[op]
        if out.numel():
            self._wait("reduce_scatter", lambda pg: pg._reduce_scatter_base(out, tensor.contiguous(), options))
        return out.div_(n) if op is ReduceOp.AVG else out

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """In place from group rank `src`."""
        self._check(tensor)
        refuse_overlap(tensor, self._context.who)
        dense = tensor.detach().resolve_neg().contiguous()
        options = dist.BroadcastOptions()
        options.rootRank = src
        options.rootTensor = 0
        if dense.numel():
            self._wait("broadcast", lambda pg: pg.broadcast([dense], options))
        return _into(tensor, dense)

    def barrier(self) -> None:
        """Through the process group's own barrier."""
        options = dist.BarrierOptions()
        if self._context.device.startswith("cuda"):
            options.device = torch.device(self._context.device)
        self._wait("barrier", lambda pg: pg.barrier(options))

    def abort(self) -> None:
        """NCCL's waits end here, on this rank; Gloo's on the others, who find their connections closed. No call works after it.

        A thread that is in a call keeps Gloo's connections until the call ends: Gloo cannot be interrupted.
        """
        if self._pg is None:
            return
        if self._context.device.startswith("cuda"):
            self._pg.abort()
        else:
            self._pg = None

    def bare(self, tensor: torch.Tensor, op: ReduceOp) -> Callable[[], object] | None:
        """The process group's all-reduce and its wait; None for avg, which takes more than that here."""
        if op is ReduceOp.AVG:
            return None
        all_reduce, tensors, options = self._pg.allreduce, [tensor], dist.AllreduceOptions()
        options.reduceOp = _OPS[op]
        return lambda: all_reduce(tensors, options).wait()

    def _check(self, tensor: torch.Tensor, op: ReduceOp | None = None) -> None:
        if tensor.device.type != self._context.key.device:
            raise UnsupportedOperation(
                f"{self._context.who} wanted a tensor on {self._context.key.device}, found one on {tensor.device}"
            )
        if without_data(tensor):  # Gloo would read from its address, which ends the process
            raise UnsupportedOperation(
                f"{self._context.who} wanted a tensor, found the {type(tensor).__name__} of a trace: use commplane.ops"
            )
        if op is ReduceOp.AVG and not tensor.is_floating_point():
            raise UnsupportedOperation(
                f"{self._context.who} op avg wants a floating-point tensor, found {tensor.dtype}: use sum and divide"
            )

    def _wait(self, what: str, start: Callable[[Any], Any]) -> None:
        """Start the operation and wait for it. Gloo raises RuntimeError for everything; say what it was."""
        pg, work = self._pg, None  # an `abort` by another thread does not take it from under this call
        if pg is None:
            raise CommunicatorError(f"{self._context.who} {what}: the connections were given up: create the communicator again")
        try:
            work = start(pg)
            if work is not None:
                work.wait()
        except TypeError as error:  # NCCL's word for a dtype that it does not have
            raise UnsupportedOperation(f"{self._context.who} {what}: {error}") from error
        except RuntimeError as error:
            # Both hold Gloo's connections, and the error holds the frames: peers would wait for as long as somebody keeps it.
            del pg, work
            traceback.clear_frames(error.__traceback__)
            text = str(error).splitlines()[0]
            if any(word in text for word in ("Invalid scalar type", "Unsupported", "unsupported")):
                raise UnsupportedOperation(f"{self._context.who} {what}: {text}") from error
            peers = [r for r in self._context.ranks if r != self._context.ranks[self._context.rank]]
            missing = self._context.facts.dead(peers)
            if "preamble" in text or ("size" in text and not missing):
                raise MismatchError(
                    f"{self._context.who} {what}: ranks called with different sizes or in a different order: {text}"
                ) from error
            names = ", ".join(map(str, missing)) or f"unknown (one of {', '.join(map(str, peers))})"
            raise PeerError(f"{self._context.who} {what}: lost ranks: {names}: {text}", missing) from error


def _into(tensor: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """`tensor`, holding what `dense` holds; collectives happen outside of autograd."""
    if dense.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(dense)
    return tensor


def _process_group(context: BuildContext) -> Any:
    store, rank, size = context.bootstrap.store("torch"), context.rank, context.world_size
    timeout = timedelta(seconds=context.timeout)
    device = context.key.device
    if device == "cpu":
        # Gloo knows one timeout, for its connections and for its operations. Where it can be set again afterwards, a rank that
        # is slow to connect has what is left of the start-up's deadline, however short a running operation may wait.
        if not hasattr(dist.ProcessGroupGloo, "set_timeout"):
            return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
        group = dist.ProcessGroupGloo(store, rank, size, timeout=timedelta(seconds=max(0.001, context.deadline.remaining())))
        group.set_timeout(timeout)
        return group
    if device == "cuda":
        torch.cuda.set_device(torch.device(context.device))
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    return _new_group(context, device, timeout)


def _new_group(context: BuildContext, device: str, timeout: timedelta) -> Any:
    """For devices whose backend registers itself with torch: through torch's own group creation, members only."""
    if not dist.is_initialized():
        raise RuntimeError(f"{context.who} device {device!r} needs torch.distributed.init_process_group first")
    names: Sequence[str] = [dist.Backend.default_device_backend_map.get(device, "")]
    if not names[0]:
        raise RuntimeError(f"{context.who} torch.distributed has no backend for device {device!r}")
    group = dist.new_group(list(context.ranks), timeout=timeout, backend=names[0], use_local_synchronization=True)
    return group._get_backend(torch.device(device))
