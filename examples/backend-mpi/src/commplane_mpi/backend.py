"""The collectives. Each is started, then tested until it is done or its deadline has passed."""

import os
from functools import cache
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from commplane.api import BuildContext, CommBackend, ReduceOp, refuse_overlap
from commplane.errors import MismatchError, PeerError, UnsupportedOperation
from commplane_mpi.process import MPI, connect

_HALVES = torch.float16, torch.bfloat16  # not in MPI's standard: they travel as integers, with an operation of our own
_INTEGERS = {getattr(torch, name): getattr(MPI, f"{name.upper()}_T") for name in ("int8", "uint8", "int16", "int32", "int64")}
_TYPES = {torch.float32: MPI.FLOAT, torch.float64: MPI.DOUBLE, **_INTEGERS, **dict.fromkeys(_HALVES, MPI.UINT16_T)}
_SUM, _MIN, _MAX = (MPI.SUM, torch.add), (MPI.MIN, torch.minimum), (MPI.MAX, torch.maximum)
_OPS: Any = {ReduceOp.SUM: _SUM, ReduceOp.MIN: _MIN, ReduceOp.MAX: _MAX, ReduceOp.AVG: _SUM}  # an average is divided at the end

_LOOK_EVERY_S = 0.1  # for ranks that have ended
_given_up: list[object] = []  # calls that failed, with their tensors: MPI may still write there, so the memory has to stay


@cache
def _operation(op: ReduceOp, dtype: torch.dtype) -> MPI.Op:
    """What does `op` on arrays of `dtype`. Ours are made once, eight at most, and never freed."""
    theirs, ours = _OPS[op]

    def combine(source: Any, target: Any, _: MPI.Datatype) -> None:  # MPI calls it, within a call of this thread
        total = torch.frombuffer(target, dtype=dtype)
        ours(torch.frombuffer(source, dtype=dtype), total, out=total)

    return MPI.Op.Create(combine, commute=True) if dtype in _HALVES else theirs


class Mpi(CommBackend):
    """One MPI communicator of one group."""

    _comm: Any = MPI.COMM_NULL

    def open(self, context: BuildContext) -> None:
        self._context, self._comm = context, connect(context)

    def close(self) -> None:
        if self._comm:  # false once it is freed
            self._comm.Free()

    def all_reduce_(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        dense = self._dense(tensor, op, written=True)
        self._run("Iallreduce", MPI.IN_PLACE, dense, _operation(op, dense.dtype))
        return self._result(dense, op, tensor)

    def all_gather(self, tensor: Tensor) -> Tensor:
        dense = self._dense(tensor)
        out = dense.new_empty((self._context.world_size * dense.shape[0], *dense.shape[1:]))
        self._run("Iallgather", dense, out)
        return out

    def reduce_scatter(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        dense = self._dense(tensor, op)
        out = dense.new_empty((dense.shape[0] // self._context.world_size, *dense.shape[1:]))
        self._run("Ireduce_scatter_block", dense, out, _operation(op, dense.dtype))
        return self._result(out, op, out)

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        dense = self._dense(tensor, written=True)
        self._run("Ibcast", dense, src)
        return self._result(dense, None, tensor)

    def barrier(self) -> None:
        self._run("Ibarrier")

    def _dense(self, tensor: Tensor, op: ReduceOp | None = None, *, written: bool = False) -> Tensor:
        """The tensor, or a copy, as one piece of memory."""
        if not tensor.is_cpu or tensor.dtype not in _TYPES or (op is ReduceOp.AVG and not tensor.is_floating_point()):
            found = f"{op or 'a tensor'} of {tensor.dtype} on {tensor.device}"
            raise UnsupportedOperation(f"{self._context.who} wanted what its spec declares, on cpu, found {found}")
        if written:
            refuse_overlap(tensor, self._context.who)
        return tensor.detach().resolve_neg().contiguous()

    def _result(self, dense: Tensor, op: ReduceOp | None, tensor: Tensor) -> Tensor:
        """`tensor`, with what is in `dense`."""
        if op is ReduceOp.AVG:
            dense.div_(self._context.world_size)
        if dense.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(dense)
        return tensor

    def _run(self, name: str, *arguments: object) -> None:
        """Start a collective of the communicator, and wait for it. Tensors among its arguments are contiguous."""
        request = None
        try:
            request = getattr(self._comm, name)(*[_memory(a) for a in arguments])
            self._wait(request, f"{self._context.who} {name}")
        except BaseException as error:  # Ctrl-C too: MPI goes on with the call, so nothing that it uses is freed
            _given_up.append((self._comm, request, arguments))
            self._comm = MPI.COMM_NULL
            if not isinstance(error, MPI.Exception):
                raise
            kind = MismatchError if error.Get_error_class() == MPI.ERR_TRUNCATE else PeerError
            raise kind(f"{self._context.who} {name}: {' '.join(str(error).split())}") from error

    def _wait(self, request: Any, what: str) -> None:
        """Test until it is done, and give up the core in between: where ranks share it, the one that is late needs it."""
        start, context = monotonic(), self._context
        look = start + min(_LOOK_EVERY_S, context.timeout)
        while not request.Test():
            os.sched_yield()
            if (now := monotonic()) >= look:
                look = now + _LOOK_EVERY_S
                ended = context.facts.dead(rank for rank in context.ranks if rank != context.ranks[context.rank])
                if ended or now - start >= context.timeout:
                    missing = f"ranks {ended} have ended" if ended else "MPI does not tell who is missing"
                    raise PeerError(f"{what} wanted all ranks within {context.timeout:g} s, {missing}", ended)


def _memory(a: object) -> object:
    """A tensor as mpi4py takes it, where it lies and of what type it is; anything else as it is."""
    return [MPI.buffer.fromaddress(a.data_ptr(), a.nbytes), _TYPES[a.dtype]] if isinstance(a, Tensor) else a
