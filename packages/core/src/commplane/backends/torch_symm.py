"""torch's symmetric memory as a backend: its one-shot and two-shot all-reduce over NVLink or P2P, without multicast.

Serves the sum of float32 and bfloat16 tensors in groups of 2, 4 or 8 ranks of one host, each with a GPU of its own. It is used
only where it is asked for by name: its kernels wait for the other ranks on the device, without a deadline, so a rank that never
comes keeps the others' GPUs busy until their processes end. Nothing on the host can stop such a wait, and there is no `abort`.

The kernels of the releases that were read (2.8 to 2.13) add in the order of group ranks and round bfloat16 after each addition.
torch promises neither, so the numerics are declared as unordered.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from commplane.api import (
    Bootstrap,
    BuildContext,
    Collective,
    CommBackend,
    ReduceOp,
    Requirement,
    SizeRange,
    Workspace,
    refuse_overlap,
)
from commplane.backends.symm_memory import SymmetricGroup, require_peers
from commplane.errors import CommunicatorError, ConfigError, UnsupportedOperation
from commplane.tracer import without_data

__all__ = [
    "StagingWorkspace",
    "TorchSymmetricMemory",
    "one_shot_limit",
    "padded",
    "parse",
    "pieces",
    "size_ranges",
    "staging_bytes",
]

_weak_reference: Any = StorageWeakRef  # untyped in torch

VECTOR = 16
"""Bytes that a thread of torch's kernels loads at once. Smaller alignments are slower or, below 4 bytes, refused."""

_INITIAL_STAGING = 1 << 20
_MOST_VIEWS = 512

# Figures for 2 GPUs (2 x H200 over NVLink, bfloat16, in graph replay): the one-shot is the faster up to 64 KiB, the two-shot
# from 128 KiB. Not measured for more; there a one-shot reads N - 1 times the bytes of the message, and the limit shrinks by that.
_ONE_SHOT_BYTES = 64 << 10


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to what the kernels take at full width. Pure."""
    return -(-nbytes // VECTOR) * VECTOR


def pieces(count: int, itemsize: int, staging: int) -> Iterator[tuple[int, int]]:
    """The ranges of elements in which a message of `count` goes through `staging` bytes. Pure.

    Every piece but the last is a multiple of `VECTOR` bytes, and each fits with its padding.
    """
    most = staging // VECTOR * VECTOR // itemsize
    for start in range(0, count, most):
        yield start, min(start + most, count)


def staging_bytes(present: int, wanted: int, largest: int) -> int:
    """Bytes of staging after a message of `wanted` bytes was declared: doubled until it fits, up to `largest`. Pure."""
    nbytes = present
    while nbytes < min(padded(wanted), largest):
        nbytes = min(nbytes * 2, largest)
    return nbytes


def one_shot_limit(algorithm: str, world_size: int) -> int:
    """The largest message in bytes that goes by one-shot, 0 for none. Pure."""
    if algorithm == "auto":
        return _ONE_SHOT_BYTES // (world_size - 1)
    return 0 if algorithm == "two_shot" else 1 << 62


def size_ranges(one_shot_bytes: int) -> list[SizeRange]:
    """All sizes, each with the algorithm that it takes where it is a multiple of `VECTOR` bytes. Pure."""
    ends = one_shot_bytes + 1
    if ends == 1:
        return [SizeRange(0, None, "two_shot")]
    if one_shot_bytes >= 1 << 62:
        return [SizeRange(0, None, "one_shot")]
    return [SizeRange(0, ends, "one_shot"), SizeRange(ends, None, "two_shot")]


def parse(who: str, options: Any) -> tuple[str, int]:
    """The settings ``algorithm`` and ``max_bytes``, the latter rounded up to `VECTOR`; `ConfigError` for what they cannot be."""
    algorithm, most = options["algorithm"], options["max_bytes"]
    if algorithm not in ("auto", "one_shot", "two_shot"):
        raise ConfigError(f"{who} setting algorithm: wanted auto, one_shot or two_shot, found {algorithm!r}")
    if not 4096 <= most <= 1 << 40:
        raise ConfigError(f"{who} setting max_bytes: wanted 4096 to {1 << 40} bytes, found {most}")
    return algorithm, padded(most)


class StagingWorkspace(Workspace):
    """Larger staging, built beside the present one and taken into use when every rank has built it."""

    backend = "torch_symm"

    def __init__(self, take: Callable[[torch.Tensor], None], memory: torch.Tensor) -> None:
        self.nbytes = memory.numel()
        self._take = take
        self._memory: torch.Tensor | None = memory

    def commit(self) -> None:
        """Take it into use; the one before goes when no graph replays it any more. Local."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self._take(memory)

    def close(self) -> None:
        """Before `commit`: it was built in vain. After it: nothing, the backend owns it."""
        self._memory = None


class TorchSymmetricMemory(CommBackend):
    """All-reduce by ``torch.ops.symm_mem``: of tensors of `empty` where they are, of others through staging.

    Kernels and copies go to the current stream, and nothing waits on the host. Calls of one communicator must be in one order on
    the device: they share staging and signals. Messages larger than the staging go through it in pieces.
    """

    def __init__(self) -> None:
        self._group: SymmetricGroup | None = None
        self._staging: torch.Tensor | None = None
        self._retired: list[torch.Tensor] = []
        self._symmetric: dict[int, Any] = {}
        self._captured = False

    def open(self, context: BuildContext) -> None:
        """Compare the devices, register the group with torch, map the first staging. Collective."""
        self._context = context
        algorithm, self._most = parse(context.who, context.options)
        self._one_shot_bytes = one_shot_limit(algorithm, context.world_size)
        torch.cuda.set_device(torch.device(context.device))
        require_peers(context)
        self._group = SymmetricGroup(context)
        self._staging = self._group.allocate(min(_INITIAL_STAGING, self._most), context.bootstrap, "staging")

    def ranges(self, collective: Collective, dtype: str, capturing: bool = False) -> list[SizeRange]:
        """All sizes, so that the plan shows where the algorithm changes. Local; from settings, equal on all ranks."""
        return size_ranges(self._one_shot_bytes)

    def init_workspace(self, requirements: Sequence[Requirement]) -> list[Workspace]:
        """Staging for what the largest message needs, up to the setting ``max_bytes``. Collective."""
        staging = self._open()
        names = ("float32", "bfloat16")
        sizes = [r.max_bytes for r in requirements if r.collective is Collective.ALL_REDUCE and r.dtype in names]
        nbytes = staging_bytes(staging.numel(), max(sizes, default=0), self._most)
        if nbytes == staging.numel():
            return []
        assert self._group is not None
        return [StagingWorkspace(self._use, self._group.allocate(nbytes, self._context.bootstrap, "staging"))]

    def _use(self, memory: torch.Tensor) -> None:
        if self._captured and self._staging is not None:  # graphs replay its addresses
            self._retired.append(self._staging)
        self._staging = memory

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in symmetric memory, an allocation of its own that lives as long as a tensor views it. Collective."""
        self._open()
        assert self._group is not None
        nbytes = prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=self._context.device)
        memory = self._group.allocate(padded(nbytes), self._context.bootstrap, "symmetric memory")
        # Found again by its storage: an address may come back as other memory once this is freed, a storage with a weak
        # reference to it does not.
        self._symmetric = {key: ref for key, ref in self._symmetric.items() if not ref.expired()}
        storage = memory.untyped_storage()
        self._symmetric[storage._cdata] = _weak_reference(storage)
        return memory[:nbytes].view(dtype).view(tuple(shape))

    def capture_begin(self) -> None:
        """From here on a replay may use the staging: it stays until `close`."""
        self._captured = True

    def capture_end(self, bootstrap: Bootstrap) -> None:
        """Nothing to exchange: a captured call is made of kernels on memory that is mapped already."""

    def close(self) -> None:
        """Drop the staging once what runs on the device has ended; symmetric tensors keep their memory. Local.

        Raises:
            CommunicatorError: a kernel still waits, for a rank that is gone. The staging is then kept until the process ends,
                because to free it is to wait for that kernel.
        """
        group, self._group = self._group, None
        owned = [m for m in (*self._retired, self._staging) if m is not None]
        self._staging = None
        self._retired.clear()
        self._symmetric.clear()
        if group is None:
            return
        group.close()
        if owned and not _ends(torch.device(self._context.device), self._context.timeout):
            for memory in owned:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))
            raise CommunicatorError(
                f"{self._context.who} close: wanted all kernels on {self._context.device} to end within "
                f"{self._context.timeout:g} s, found some still waiting: end this process, nothing else ends such a wait"
            )

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """Sum in place; any shape and layout."""
        return self.bind(Collective.ALL_REDUCE, op, tensor.dtype, in_place=True)(tensor)  # type: ignore[no-any-return]

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """Sum out of place; any shape and layout."""
        return self.bind(Collective.ALL_REDUCE, op, tensor.dtype, in_place=False)(tensor)  # type: ignore[no-any-return]

    def bind(
        self, collective: Collective, op: ReduceOp | None, dtype: torch.dtype | None, *, in_place: bool
    ) -> Callable[..., Any]:
        """A closure over the staging as it is now and the operators."""
        if collective is not Collective.ALL_REDUCE:
            return super().bind(collective, op, dtype, in_place=in_place)
        staging, context = self._open(), self._context
        if op is not ReduceOp.SUM or dtype not in (torch.float32, torch.bfloat16):
            raise UnsupportedOperation(f"{context.who} all_reduce wanted the sum of float32 or bfloat16, found {op} of {dtype}")
        assert self._group is not None
        reduce = _Reducer(staging.view(dtype), self._group.name, self._one_shot_bytes)
        who, device, symmetric = context.who, torch.device(context.device), self._symmetric_check

        def check(tensor: torch.Tensor) -> None:
            if without_data(tensor):
                raise UnsupportedOperation(
                    f"{who} wanted a tensor, found the {type(tensor).__name__} of a trace: use commplane.ops"
                )
            if tensor.device != device:
                raise UnsupportedOperation(f"{who} wanted a tensor on {device}, found one on {tensor.device}")

        def run(call: Callable[..., None], *tensors: torch.Tensor) -> None:
            if torch.cuda.current_device() == device.index:
                call(*tensors)
            else:  # torch launches these operators on the current device, wherever their tensors are
                with torch.cuda.device(device):
                    call(*tensors)

        def all_reduce_(tensor: torch.Tensor) -> torch.Tensor:
            check(tensor)
            refuse_overlap(tensor, who)
            dense = tensor.detach().contiguous()
            if symmetric(dense):
                run(reduce.symmetric_, dense)
            else:
                run(reduce.staged, dense, dense)
            if dense.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(dense)
            return tensor

        def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
            check(tensor)
            dense = tensor.detach().contiguous()
            out = torch.empty_like(dense)
            run(reduce.symmetric if symmetric(dense) else reduce.staged, dense, out)
            return out

        return all_reduce_ if in_place else all_reduce

    def _symmetric_check(self, tensor: torch.Tensor) -> bool:
        """Whether it lies in memory of `empty`, where the kernels can take it. Local; by offset and size, equal on all ranks."""
        known = self._symmetric
        return (
            bool(known)
            and tensor.numel() > 0
            and tensor.untyped_storage()._cdata in known
            and tensor.nbytes % VECTOR == 0
            and tensor.storage_offset() * tensor.element_size() % VECTOR == 0
        )

    def _open(self) -> torch.Tensor:
        if self._staging is None:
            raise CommunicatorError(f"{self._context.who} is closed: create the communicator again to go on")
        return self._staging


class _Reducer:
    """The three ways of a message through torch's operators, for one dtype. `staging` is flat.

    A kernel ends when all ranks have read what it reads, so a buffer may be written again by what follows on the stream.
    """

    def __init__(self, staging: torch.Tensor, group: str, one_shot_bytes: int) -> None:
        ops = torch.ops.symm_mem
        self._one_shot_out = ops.one_shot_all_reduce_out.default
        self._one_shot_copy_out = ops.one_shot_all_reduce_copy_out.default
        self._two_shot_ = ops.two_shot_all_reduce_.default
        self._two_shot_out = ops.two_shot_all_reduce_out.default
        self._staging = staging
        self._group = group
        self._one_shot_bytes = one_shot_bytes
        self._views: dict[int, torch.Tensor] = {}

    def _part(self, count: int) -> torch.Tensor:
        """The first `count` elements of the staging; cutting a view costs as much as launching a kernel."""
        view = self._views.get(count)
        if view is None:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            view = self._views[count] = self._staging[:count]
        return view

    def symmetric_(self, tensor: torch.Tensor) -> None:
        """In place where all ranks can read it."""
        if tensor.nbytes > self._one_shot_bytes:
            self._two_shot_(tensor, "sum", self._group)
        else:  # a one-shot into its own input would change what the peers still read
            out = self._part(tensor.numel()) if tensor.numel() <= self._staging.numel() else torch.empty_like(tensor)
            out = out.view(tensor.shape)
            self._one_shot_out(tensor, "sum", self._group, out)
            tensor.copy_(out)

    def symmetric(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        """Into `out`, the input left as it was."""
        if tensor.nbytes <= self._one_shot_bytes:
            self._one_shot_out(tensor, "sum", self._group, out)
        else:  # the two-shot leaves sums behind in its input
            self.staged(tensor, out)

    def staged(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        """Through the staging, in as many pieces as it takes. `out` is `tensor` or contiguous memory of its own."""
        count, itemsize = tensor.numel(), tensor.element_size()
        if count * itemsize <= self._staging.nbytes:
            if count:
                self._piece(tensor.view(-1), out.view(-1))
            return
        flat, result = tensor.view(-1), out.view(-1)
        for start, stop in pieces(count, itemsize, self._staging.nbytes):
            self._piece(flat[start:stop], result[start:stop])

    def _piece(self, source: torch.Tensor, out: torch.Tensor) -> None:
        """One piece. Which operator runs is decided by the size alone, which is equal on all ranks: theirs must be the same."""
        nbytes, count = source.nbytes, source.numel()
        if nbytes % VECTOR:
            part, whole = self._part(count), self._part(padded(nbytes) // source.element_size())
            part.copy_(source)
            self._two_shot_(whole, "sum", self._group)
            out.copy_(part)
            return
        stage = self._part(count)
        target = out if _aligned(out) else torch.empty_like(stage)
        if nbytes > self._one_shot_bytes:
            stage.copy_(source)
            self._two_shot_out(stage, "sum", self._group, target)
        elif _aligned(source):
            self._one_shot_copy_out(stage, source, "sum", self._group, target)
        else:
            stage.copy_(source)
            self._one_shot_out(stage, "sum", self._group, target)
        if target is not out:
            out.copy_(target)


def _aligned(tensor: torch.Tensor) -> bool:
    """Whether the kernels can take it at full width; torch looks at the offset alone."""
    return tensor.data_ptr() % VECTOR == 0 and tensor.storage_offset() * tensor.element_size() % VECTOR == 0


def _ends(device: torch.device, seconds: float) -> bool:
    """Whether what runs on `device` ends within `seconds`. Local. CUDA's own wait has no deadline: it gets a thread."""
    waiter = threading.Thread(target=torch.cuda.synchronize, args=(device,), name="commplane torch_symm close", daemon=True)
    waiter.start()
    waiter.join(seconds)
    return not waiter.is_alive()
