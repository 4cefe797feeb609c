"""torch's collectives as calls of a communicator, or of torch's own backend where the plan has not what they need.

Which of the two is decided by op, dtype and kind of tensor alone, which are equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as torch_c10d

from commplane.c10d.layout import bytes_of, flat, reals, write, write_flat, write_reals
from commplane.c10d.side import Side
from commplane.c10d.work import DONE, SAYS_ASYNC, JoinedWork
from commplane.errors import UnsupportedOperation
from commplane.runtime import Communicator

__all__ = ["Collectives"]

_ALL_REDUCE = torch_c10d.AllreduceOptions()
_COALESCED = torch_c10d.AllreduceCoalescedOptions()
_ALL_GATHER = torch_c10d.AllgatherOptions()
_REDUCE_SCATTER = torch_c10d.ReduceScatterOptions()
_BROADCAST = torch_c10d.BroadcastOptions()
_BARRIER = torch_c10d.BarrierOptions()


class Collectives:
    """The methods that torch calls for collectives. Each is collective over the group, and has torch's arguments and meaning.

    They return a work whose `wait` raises what the call raised; where torch says that its caller waits, the call itself has
    waited, and raises.

    Attributes:
        ranks: global ranks in group order.
    """

    ranks: tuple[int, ...]
    _cpu: Side
    _sides: dict[str, Side]
    _works: list[Any] | None

    def _side(self, tensor: torch.Tensor) -> Side | None:
        """The side of a tensor not on CPU, or None where torch's backend has all of them. Collective when first called."""
        raise NotImplementedError

    def _torch(self, tensor: torch.Tensor) -> Any:
        """The backend of torch's own for a tensor."""
        raise NotImplementedError

    def allreduce(self, tensors: Any, opts: Any = _ALL_REDUCE, *_: Any, **named: Any) -> Any:
        """In place. `tensors` is a list of one."""
        if opts.__class__ is not torch_c10d.AllreduceOptions or named or tensors.__class__ is torch.Tensor:
            tensors, opts = _listed(tensors), _with_op(torch_c10d.AllreduceOptions, opts, named)
        tensor = tensors[0]
        side = self._cpu if tensor.is_cpu else self._side(tensor)
        if side is None or len(tensors) != 1 or tensor.layout is not torch.strided:
            return self._torch(tensor).allreduce(tensors, opts)
        kind = opts.reduceOp.__hash__()
        op = side.all_reduce[kind, tensor.dtype]
        if op is None:  # complex numbers go as pairs, the rest by torch's backend
            return self._joined(side, tensors, kind, opts) or self._torch(tensor).allreduce(tensors, opts)
        if SAYS_ASYNC and not opts.asyncOp and (tensor.is_contiguous() or not tensor.is_inference()):
            side.run(side.communicator.all_reduce_, tensor, op)
            return DONE
        return self._do(side, lambda: _all_reduce(side.communicator, tensor, op), tensors, opts)

    def allreduce_coalesced(self, tensors: Any, opts: Any = _COALESCED, *_: Any, **named: Any) -> Any:
        """Several tensors in place, in one collective for each dtype: two that share memory are summed once."""
        tensors, opts = _listed(tensors), _with_op(torch_c10d.AllreduceCoalescedOptions, opts, named)
        work = self._joined(self._common_side(tensors), tensors, opts.reduceOp.__hash__(), opts)
        return work or self._torch(tensors[0]).allreduce_coalesced(tensors, opts)

    def _joined(self, side: Side | None, tensors: Sequence[torch.Tensor], kind: int, opts: Any) -> Any | None:
        """A work, or None where torch's backend has to do it."""
        if side is None or any(_op(side, kind, t.dtype) is None for t in tensors):
            return None
        groups: dict[torch.dtype, list[torch.Tensor]] = {}
        for t in tensors:
            groups.setdefault(t.dtype.to_real(), []).append(t)

        def call() -> None:
            for dtype, members in groups.items():
                numbers = torch.cat([reals(t) for t in members])
                write_reals(members, side.communicator.all_reduce_(numbers, str(side.all_reduce[kind, dtype])))

        return self._do(side, call, tensors, opts)

    def _allgather_base(self, output: torch.Tensor, source: torch.Tensor, opts: Any = _ALL_GATHER, *_: Any, **__: Any) -> Any:
        """Concatenate into one tensor."""
        return self._gather_into([output], [source], opts) or self._torch(source)._allgather_base(output, source, opts)

    all_gather_single = _allgather_base  # its name since torch 2.13

    def allgather_into_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = _ALL_GATHER, *_: Any, **__: Any) -> Any:
        """Several tensors, each concatenated into one. What functional collectives call, also for one."""
        outputs, inputs = _listed(outputs), _listed(inputs)
        work = self._gather_into(outputs, inputs, opts)
        if work is None:
            backend = self._torch(inputs[0])
            work = JoinedWork([backend._allgather_base(o, i, opts) for o, i in zip(outputs, inputs, strict=True)], outputs)
        return work

    all_gather_single_coalesced = allgather_into_tensor_coalesced  # its name since torch 2.13

    def _gather_into(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], opts: Any) -> Any | None:
        """A work, or None where torch's backend has to do it."""
        side = self._common_side(inputs)
        if side is None or any(side.all_gather[t.dtype] is None for t in inputs):
            return None
        for output, source in zip(outputs, inputs, strict=True):
            _check("all_gather", output, source, source.numel() * len(self.ranks))

        def call() -> None:
            # All inputs are read before an output is written: they may be parts of each other.
            gathered = [_all_gather(side, source) for source in inputs]
            for output, value in zip(outputs, gathered, strict=True):
                write(output, value.view(output.shape))

        return self._do(side, call, outputs, opts)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = _ALL_GATHER, *_: Any, **__: Any) -> Any:
        """Into one tensor for each rank. `outputs` is a list of one list, `inputs` a list of one."""
        if isinstance(inputs, torch.Tensor):
            outputs, inputs = [outputs], [inputs]
        source, targets = inputs[0], outputs[0]
        side = self._common_side([source, *targets])
        alike = all(t.numel() == source.numel() and t.dtype == source.dtype for t in targets)
        if side is None or len(inputs) != 1 or not alike or side.all_gather[source.dtype] is None:
            return self._torch(source).allgather(outputs, inputs, opts)
        if len(targets) != len(self.ranks):
            raise ValueError(f"all_gather: wanted a list of {len(self.ranks)} tensors, one for each rank, found {len(targets)}")
        return self._do(side, lambda: write_flat(targets, _all_gather(side, source)), targets, opts)

    def _reduce_scatter_base(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        opts: Any = _REDUCE_SCATTER,
        *_: Any,
        **__: Any,
    ) -> Any:
        """Reduce one tensor and keep this rank's part."""
        return self._scatter_into([output], [source], opts) or self._torch(source)._reduce_scatter_base(output, source, opts)

    reduce_scatter_single = _reduce_scatter_base  # its name since torch 2.13

    def reduce_scatter_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = _REDUCE_SCATTER, *_: Any, **__: Any) -> Any:
        """Several tensors, each reduced and cut. What functional collectives call, also for one."""
        outputs, inputs = _listed(outputs), _listed(inputs)
        work = self._scatter_into(outputs, inputs, opts)
        if work is None:
            backend = self._torch(inputs[0])
            work = JoinedWork([backend._reduce_scatter_base(o, i, opts) for o, i in zip(outputs, inputs, strict=True)], outputs)
        return work

    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced  # its name since torch 2.13

    def _scatter_into(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], opts: Any) -> Any | None:
        """A work, or None where torch's backend has to do it."""
        side = self._common_side(inputs)
        kind = opts.reduceOp.__hash__()
        if side is None or any(side.reduce_scatter[kind, t.dtype] is None for t in inputs):
            return None
        for output, source in zip(outputs, inputs, strict=True):
            _check("reduce_scatter", output, source, source.numel(), output.numel() * len(self.ranks))

        def call() -> None:
            comm, ops = side.communicator, side.reduce_scatter
            parts = [comm.reduce_scatter(flat(source), str(ops[kind, source.dtype])) for source in inputs]
            for output, value in zip(outputs, parts, strict=True):
                write(output, value.view(output.shape))

        return self._do(side, call, outputs, opts)

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = _REDUCE_SCATTER, *rest: Any, **named: Any) -> Any:
        """From one tensor for each rank. `outputs` is a list of one, `inputs` a list of one list."""
        if isinstance(outputs, torch.Tensor):
            outputs, inputs = [outputs], [inputs]
        opts = _with_op(torch_c10d.ReduceScatterOptions, opts, named)
        target, sources = outputs[0], inputs[0]
        side = self._common_side([target, *sources])
        op = None if side is None else side.reduce_scatter[opts.reduceOp.__hash__(), target.dtype]
        alike = all(t.numel() == target.numel() and t.dtype == target.dtype for t in sources)
        if side is None or op is None or len(outputs) != 1 or not alike or len(sources) != len(self.ranks):
            return self._torch(target).reduce_scatter(outputs, inputs, opts)

        def call() -> None:
            joined = torch.cat([flat(t) for t in sources])
            write(target, side.communicator.reduce_scatter(joined, op).view(target.shape))

        return self._do(side, call, outputs, opts)

    def broadcast(self, tensors: Any, opts: Any = _BROADCAST, *_: Any, **named: Any) -> Any:
        """In place from group rank ``opts.rootRank``. `tensors` is a list of one."""
        if opts.__class__ is not torch_c10d.BroadcastOptions or isinstance(tensors, torch.Tensor):
            root = named.get("root", opts)
            tensors, opts = _listed(tensors), torch_c10d.BroadcastOptions()
            opts.rootRank = root if isinstance(root, int) else 0
        tensor = tensors[0]
        side = self._common_side(tensors)
        if side is None or len(tensors) != 1 or side.broadcast[tensor.dtype] is None:
            return self._torch(tensor).broadcast(tensors, opts)
        root = opts.rootRank
        return self._do(side, lambda: _broadcast(side, tensor, root), tensors, opts)

    def barrier(self, opts: Any = _BARRIER, *_: Any, **__: Any) -> Any:
        """Return when every rank has come here, and this rank's calls on the communicator before it have ended.

        What is in the background of Gloo, such as an asynchronous `PRODUCT`, is not waited for.
        """
        if opts.__class__ is not torch_c10d.BarrierOptions:
            opts = _BARRIER
        if "cuda" in self._sides:
            torch.cuda.current_stream().synchronize()
        return self._do(self._cpu, self._cpu.communicator.barrier, (), opts)

    def _common_side(self, tensors: Sequence[torch.Tensor]) -> Side | None:
        """The side of tensors that are all dense and of one type of device, else None."""
        device = tensors[0].device.type
        if any(t.layout is not torch.strided or t.device.type != device for t in tensors):
            return None
        return self._cpu if device == "cpu" else self._side(tensors[0])

    def _do(self, side: Side, call: Callable[[], Any], outputs: Sequence[torch.Tensor], opts: Any) -> Any:
        work = side.do(call, outputs, wait=_waits(opts))
        if self._works is not None:
            self._works.append(work)
        return work


def _waits(options: Any) -> bool:
    """Whether the caller does nothing before the call has ended."""
    return SAYS_ASYNC and not options.asyncOp


def _op(side: Side, kind: int, dtype: torch.dtype) -> str | None:
    """The communicator's op for numbers of a dtype; of complex ones only those ops that go part by part."""
    op = side.all_reduce[kind, dtype.to_real()]
    return op if not dtype.is_complex or op in ("sum", "avg") else None


def _all_reduce(communicator: Communicator, tensor: torch.Tensor, op: str) -> None:
    if tensor.is_inference() and not tensor.is_contiguous():
        write(tensor, communicator.all_reduce_(flat(tensor).clone(), op).view(tensor.shape))
    else:
        communicator.all_reduce_(tensor, op)


def _all_gather(side: Side, source: torch.Tensor) -> torch.Tensor:
    """Everyone's elements, in one dimension."""
    dtype, carrier = source.dtype, side.all_gather[source.dtype]
    own = flat(source)
    if carrier is dtype:
        return side.communicator.all_gather(own)
    return side.communicator.all_gather(bytes_of(own)).view(dtype)


def _broadcast(side: Side, tensor: torch.Tensor, root: int) -> None:
    # As what it travels is a matter of the dtype alone: one rank may have a tensor of inference mode, and another has not.
    if side.broadcast[tensor.dtype] is tensor.dtype:
        if tensor.is_inference():
            write(tensor, side.communicator.broadcast(flat(tensor).clone(), root).view(tensor.shape))
        else:
            side.communicator.broadcast(tensor, root)
        return
    own = flat(tensor)
    side.communicator.broadcast(bytes_of(own), root)
    if own.data_ptr() != tensor.data_ptr() or not tensor.is_contiguous():
        write(tensor, own.view(tensor.shape))


def _check(what: str, output: torch.Tensor, source: torch.Tensor, wanted: int, found: int | None = None) -> None:
    if output.dtype != source.dtype:
        raise ValueError(f"{what}: wanted an output of {source.dtype}, as the input is, found {output.dtype}")
    found = output.numel() if found is None else found
    if found != wanted:
        raise ValueError(f"{what}: wanted an output for {wanted} elements of the ranks together, found one for {found}")


def _listed(tensors: Any) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _with_op(kind: Any, opts: Any, named: dict[str, Any]) -> Any:
    """Options, where the caller gave an op in their place, as torch's own groups allow."""
    if isinstance(opts, kind) and "op" not in named:
        return opts
    made = kind()
    op = named.get("op", opts)
    if isinstance(op, (dist.ReduceOp, dist.ReduceOp.RedOpType)):
        made.reduceOp = op
    elif not isinstance(op, kind):
        raise UnsupportedOperation(f"wanted {kind.__name__} or a ReduceOp, found {op!r}")
    return made
