# SPDX-License-Identifier: Apache-2.0
"""The backend on CUDA: torch tensors in, kernels over memory that the ranks map from each other out."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar, Final

import torch

from commplane.api import (
    Bootstrap,
    BuildContext,
    Collective,
    CommBackend,
    FlightRecord,
    ReduceOp,
    SizeRange,
)
from commplane.errors import CommunicatorError, ConfigError, MismatchError, UnsupportedOperation
from commplane_custom_ar import _native, flight
from commplane_custom_ar._native import NativeError, Segment
from commplane_custom_ar.codes import DTYPES
from commplane_custom_ar.cuda import tuned
from commplane_custom_ar.cuda.abi import ALGORITHMS, CONTROL_BYTES
from commplane_custom_ar.cuda.calls import Target, current_stream
from commplane_custom_ar.cuda.captured import CapturedInputs
from commplane_custom_ar.cuda.comm import CudaComm, DeviceMemory, device_info
from commplane_custom_ar.cuda.faults import explain
from commplane_custom_ar.cuda.symmetric import SymmetricMemory
from commplane_custom_ar.gpu import gate
from commplane_custom_ar.segments import map_together

__all__ = ["CudaAllReduce"]

_DTYPES: Final = {name: DTYPES[name] for name in ("float32", "float16", "bfloat16")}

Call = Callable[..., Any]


class CudaAllReduce(CommBackend):
    """Collectives between the GPUs of one host, over memory that each rank maps from the others.

    Results are bitwise equal on all ranks, whatever the algorithm is: added in float32 in the order of group ranks, rounded once.
    Calls are queued on the current stream; a fault of a kernel is raised by a later call, or by `barrier`.
    """

    keeps_flight_records: ClassVar[bool] = True

    def __init__(self) -> None:
        self._comm: CudaComm | None = None
        self._control: Segment | None = None
        self._symmetric: SymmetricMemory | None = None
        self._captured: CapturedInputs | None = None

    def open(self, context: BuildContext) -> None:
        """Agree that the group may, map a page of control and the memory of all ranks, set the algorithms. Collective."""
        self._context = context
        algorithm, registered = _settings(context)
        self._native = _native.load(context.options["binding"])
        self._device = torch.device(context.device)
        bootstrap, index = context.bootstrap, self._device.index
        allowed = gate.agree(context)
        shared = allowed.kind == "shared"
        _, capability = device_info(self._native, index)
        share = _multiprocessors(context, self._native, index, shared)
        fewest = min(bootstrap.all_gather(share, what="multiprocessors"))
        nbytes = -(-CONTROL_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        self._control = map_together(bootstrap, "page of control", nbytes, 0, nbytes)
        self._comm = CudaComm(
            self._native,
            device=index,
            rank=context.rank,
            world_size=context.world_size,
            multiprocessors=fewest,
            timeout_s=context.timeout,
            control=self._control.base,
        )
        handles = bootstrap.all_gather(self._comm.exported.hex(), what="handles of memory")
        self._comm.connect([bytes.fromhex(handle) for handle in handles])
        bootstrap.barrier(what="memory of all ranks is mapped")
        self._choose(capability, allowed.kind, algorithm)
        memory = DeviceMemory(self._native, index)
        self._symmetric = SymmetricMemory(context, self._comm, memory, self._settle_device)
        self._captured = CapturedInputs(context, self._comm, memory)
        self._registers = registered != "off" and self._agree_on_registered(memory, demanded=registered == "on")

    def _choose(self, capability: int, link: str, algorithm: str) -> None:
        """Set the tables of the library. Local; from what is equal on all ranks."""
        assert self._comm is not None
        row = tuned.look_up(capability, link, self._context.world_size)
        if row is None:
            raise CommunicatorError(
                f"{self._context.who} has no sizes for {self._context.world_size} ranks over {link} with compute capability "
                f"{capability // 10}.{capability % 10}: use another backend"
            )
        _, self._capacity = self._comm.memory()
        if algorithm != "auto":
            row = tuned.force(row, algorithm)
        self._row = row
        for capturing in (False, True):
            self._comm.choose(row.of_staged(capturing=capturing), readable=False, capturing=capturing)
            self._comm.choose(row.of_readable(capturing=capturing), readable=True, capturing=capturing)

    def _agree_on_registered(self, memory: DeviceMemory, *, demanded: bool) -> bool:
        """Whether the inputs of captured calls can be read by all ranks, that is have handles. Collective."""
        try:
            memory.handle(torch.empty(1, device=self._device).data_ptr())
            problem = ""
        except NativeError as error:
            problem = str(error)
        problems = self._context.bootstrap.all_gather(problem, what="handles of torch's memory")
        named = [f"rank {rank}: {text}" for rank, text in zip(self._context.ranks, problems, strict=True) if text]
        if named and demanded:
            raise CommunicatorError(
                f"{self._context.who} setting registered=on: wanted memory of torch that other processes can open, found none "
                f"({'; '.join(named)}): unset expandable_segments in PYTORCH_CUDA_ALLOC_CONF, or use registered=auto"
            )
        return not named

    def ranges(self, collective: Collective, dtype: str, capturing: bool = False) -> list[SizeRange]:
        """From the tables: equal on all ranks, whose GPUs and links are. Local."""
        staged = self._row.of_staged(capturing=capturing)
        if collective is Collective.ALL_REDUCE:
            return tuned.size_ranges(staged)
        if collective is Collective.ALL_REDUCE_RMS_NORM:
            return tuned.norm_ranges(staged, self._capacity)
        most = self._row.moves
        return [SizeRange(0, None if most is None else most + 1, "tiled")]

    def close(self) -> None:
        """Let go of everything; symmetric tensors keep this rank's memory. Waits for the device, whose waits are bounded."""
        comm, self._comm = self._comm, None
        control, self._control = self._control, None
        symmetric, captured = self._symmetric, self._captured
        self._symmetric = self._captured = None
        with ExitStack() as stack:  # from the last to the first, all of them, whatever one raises
            stack.callback(_release, comm, control, symmetric)
            if symmetric is not None:
                stack.callback(symmetric.unmap_all)
            if captured is not None:
                stack.callback(captured.close)
            if comm is not None:
                stack.callback(self._settle_device)

    def _settle_device(self) -> None:
        torch.cuda.synchronize(self._device)

    def _settle_stream(self) -> bool:
        """Wait for the current stream; False where it captures, which has no end to wait for."""
        with torch.cuda.device(self._device):
            if torch.cuda.is_current_stream_capturing():
                return False
            torch.cuda.current_stream().synchronize()
            return True

    def _open(self) -> CudaComm:
        if self._comm is None:
            raise CommunicatorError(f"{self._context.who} is closed: create the communicator again to go on")
        return self._comm

    def abort(self) -> None:
        """Kernels of ranks that wait for this one give up at once instead of at their deadline."""
        if self._comm is not None:
            self._comm.abort()

    def init_workspace(self, requirements: Sequence[Any]) -> list[Any]:
        """Nothing: messages of every size go through memory that `open` made, and nothing grows. Frees what all let go of."""
        self._open()
        assert self._symmetric is not None
        self._symmetric.reclaim(self._context.bootstrap)
        return []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in symmetric memory. Collective."""
        self._open()
        assert self._symmetric is not None
        return self._symmetric.empty(shape, dtype)

    def capture_begin(self) -> None:
        """Calls on capturing streams use the tables of graphs from here on, and leave their inputs where that was agreed."""
        self._open().capture_begin(registered=self._registers)

    def capture_end(self, bootstrap: Bootstrap) -> None:
        """Tell each other where the inputs lie. Collective."""
        self._open().capture_end()
        assert self._symmetric is not None
        assert self._captured is not None
        if self._registers:
            try:
                self._captured.exchange(bootstrap)
            except MismatchError:  # on all ranks, which by now count their captured inputs differently
                self._registers = False
                raise
        self._symmetric.reclaim(bootstrap)

    def flight_records(self) -> Sequence[FlightRecord]:
        """From the library's own ring: when calls were queued. Local, from any thread."""
        comm = self._comm
        return () if comm is None else flight.records(comm)

    def bare(self, tensor: torch.Tensor, op: ReduceOp) -> Callable[[], object]:
        """The library's function with all its arguments, on the stream that is the current one now."""
        pointer, dtype = tensor.data_ptr(), _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        stream = current_stream()(self._device.index)
        return partial(self._native.cuda_all_reduce, self._open().handle, pointer, pointer, tensor.numel(), dtype, stream)

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
        """One kernel where the rows fit, else an all-reduce and a kernel for the rest."""
        call = self.bind(Collective.ALL_REDUCE_RMS_NORM, None, tensor.dtype, in_place=False)
        return call(tensor, residual, weight, eps, weight_bias)  # type: ignore[no-any-return]

    def barrier(self) -> None:
        """Return when all ranks have come here and done what was queued before; in a capture, queue it only."""
        self.bind(Collective.BARRIER, None, None, in_place=False)()

    def bind(self, collective: Collective, op: ReduceOp | None, dtype: torch.dtype | None, *, in_place: bool) -> Call:
        """A closure over native constants."""
        comm, context = self._open(), self._context
        target = Target(
            native=self._native,
            handle=comm.handle,
            who=context.who,
            device=self._device,
            world_size=context.world_size,
            stream=current_stream(),
            settle=self._settle_stream,
            fault=comm.fault,
            fail=partial(explain, context, comm),
        )
        if collective is Collective.BARRIER:
            return target.barrier()
        code = _DTYPES.get(str(dtype).removeprefix("torch."))
        if code is None or (collective.reduces and op is not ReduceOp.SUM):
            raise UnsupportedOperation(
                f"{context.who} {collective} on cuda wanted {', '.join(_DTYPES)} and op sum, found {dtype} and op {op}"
            )
        if collective is Collective.ALL_REDUCE:
            return target.all_reduce_(code) if in_place else target.all_reduce(code)
        if collective is Collective.ALL_REDUCE_RMS_NORM:
            return target.all_reduce_rms_norm_(code) if in_place else target.all_reduce_rms_norm(code)
        if collective is Collective.ALL_GATHER:
            return target.all_gather(code)
        return target.reduce_scatter(code) if collective is Collective.REDUCE_SCATTER else target.broadcast(code)


def _release(comm: CudaComm | None, control: Segment | None, symmetric: SymmetricMemory | None) -> None:
    """The last steps of `close`, each of which wants the one before."""
    if comm is not None:
        comm.close()  # waits a little until the peers have unmapped too
    if symmetric is not None:
        symmetric.free_dropped()
    if control is not None:
        control.close()


def _settings(context: BuildContext) -> tuple[str, str]:
    """The settings ``algorithm`` and ``registered``; `ConfigError` for what they cannot be."""
    for name, wanted in (("algorithm", ("auto", *ALGORITHMS)), ("registered", ("off", "on", "auto"))):
        if context.options[name] not in wanted:
            raise ConfigError(
                f"{context.who} setting {name}: wanted {', '.join(wanted[:-1])} or {wanted[-1]}, found {context.options[name]!r}"
            )
    return context.options["algorithm"], context.options["registered"]


def _multiprocessors(context: BuildContext, native: _native.Native, device: int, shared: bool) -> int:
    """What kernels of this rank may fill. Ranks that share a GPU have to run at once, so MPS has to give each its part."""
    if shared:
        given = os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "")
        most = 100 / context.world_size
        if not given.replace(".", "", 1).isdigit() or not 0 < float(given) <= most:
            raise CommunicatorError(
                f"{context.who} ranks that share a GPU wait for each other and have to run at once: wanted "
                f"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE of at most {most:g} in the environment of each, found {given or 'none'}: "
                f"set it before the process first uses CUDA"
            )
    multiprocessors, _ = device_info(native, device)
    return multiprocessors
