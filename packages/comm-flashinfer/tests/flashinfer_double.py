"""FlashInfer's entry points and the device, replaced at the boundary: it records, counts, and fails where a test says.

The ranks are threads of one process. Memory is counted as on a device: a buffer is there as long as something refers to it, and
the module's global refers to it as FlashInfer's does, so only a complete free brings the count back.
"""

from __future__ import annotations

import threading
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from flashinfer_kernels import Comm, FusionWorkspace, Group

from commplane.api import (
    BackendSpec,
    BuildContext,
    CommBackend,
    Facts,
    ProbeRequest,
    Unusable,
    Usable,
    Verdict,
    hookimpl,
)
from commplane.plugins import PluginHost
from commplane.runtime import Communicator, Plane
from commplane.testing import run_threads
from commplane_flashinfer import capacity, plugin, preflight
from commplane_flashinfer.backend import FlashInfer
from commplane_flashinfer.boundary import Boundary
from commplane_flashinfer.probe import missing_module
from commplane_flashinfer.topology import Card

__all__ = ["Alone", "DoubleBoundary", "Machine", "flashinfer_of", "probe", "ranks_on"]

ABSENT: set[int] = set()
"""Global ranks on which flashinfer is not installed."""


class Alone:
    """The control plane of rank 0, where the others say what it says, and the last one in the round `fails` that it broke."""

    rank = 0

    def __init__(self, world_size: int = 2, fails: int = 0) -> None:
        self.world_size, self.ranks = world_size, tuple(range(world_size))
        self._fails = fails
        self._rounds = 0

    def all_gather(self, value: Any, *, what: str, timeout: float | None = None) -> list[Any]:
        """What this rank says, and what the others do."""
        self._rounds += 1
        last = {**value, "problem": "it broke"} if self._rounds == self._fails else value
        return [*[value] * (self.world_size - 1), last]


class _Buffer:
    """Device memory of one rank, with the exchange that it was made through, as FlashInfer's has it."""

    def __init__(self, machine: Machine, rank: int, nbytes: int, comm_backend: Any) -> None:
        machine.give(rank, nbytes)
        self.comm_backend = comm_backend
        weakref.finalize(self, machine.take_back, rank, nbytes)


class _Raw(FusionWorkspace):
    """FlashInfer's workspace: `destroy` lets go of what it shows, and of nothing else."""

    backend = "trtllm"

    def destroy(self) -> None:
        del self.ipc_handles, self.mem_handles, self.metadata


class DoubleComm(Comm):
    """The module `flashinfer.comm` on one rank."""

    def __init__(self, machine: Machine, rank: int) -> None:
        super().__init__()
        self._machine = machine
        self._rank = rank
        self.references: dict[int, list[Any]] = {}

    def create_allreduce_fusion_workspace(
        self,
        backend: str = "auto",
        world_size: int | None = None,
        rank: int | None = None,
        max_token_num: int | None = None,
        hidden_dim: int | None = None,
        dtype: Any = None,
        comm_backend: Any = None,
    ) -> Any:
        """Three buffers with an allgather each, then a barrier, as FlashInfer's."""
        assert backend == "trtllm", f"the backend {backend} uses NVLink multicast"
        assert (comm_backend.Get_rank(), comm_backend.Get_size()) == (rank, world_size)
        assert rank is not None and world_size is not None and max_token_num is not None and hidden_dim is not None
        most = max_token_num * hidden_dim
        self._machine.log.append((self._rank, "create", rank, world_size, most, str(dtype)))
        token = comm_backend.bcast(uuid.uuid4().hex if rank == 0 else None, 0)
        buffers = []
        for nbytes in capacity.allocations(world_size, most, dtype.itemsize):
            buffers.append(_Buffer(self._machine, self._rank, nbytes, comm_backend))
            ranks = comm_backend.allgather(rank)
            assert ranks == tuple(range(world_size)), f"handles of ranks {ranks}"
        handles = [[id(b)] for b in buffers]
        self.references[id(handles)] = buffers
        if self._rank in self._machine.breaks_late:
            raise self._machine.breaks_with("the lamport buffer could not be set")
        comm_backend.barrier()
        major, _ = self._machine.card(self._rank).capability
        raw = _Raw(self._machine.group(token, world_size, major), rank, most, str(dtype) == "torch.float32")
        raw.ipc_handles, raw.mem_handles, raw.metadata = handles, buffers, {"tp_rank": rank}
        raw._internal_workspace = (handles, buffers)
        return raw

    def trtllm_destroy_ipc_workspace_for_all_reduce_fusion(self, workspace: list[Any]) -> None:
        """Take it out of the global."""
        self._machine.log.append((self._rank, "destroy"))
        del self.references[id(workspace)]


class _Driver:
    """``libcuda`` of one rank: what is asked of it counts with the buffers, and is there until it is released."""

    def __init__(self, machine: Machine, rank: int) -> None:
        self._machine = machine
        self._rank = rank
        self._given: list[int] = []

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0

    def cuMemGetAllocationGranularity(self, out: Any, prop: Any, flag: int) -> int:  # noqa: N802
        out._obj.value = capacity.GRANULARITY
        return 0

    def cuMemCreate(self, out: Any, size: Any, prop: Any, flags: Any) -> int:  # noqa: N802
        if self._rank not in self._machine.preflight_misses:
            try:
                self._machine.give(self._rank, size.value)
            except RuntimeError:
                return 2
            self._given.append(size.value)
        out._obj.value = len(self._given)
        return 0

    def cuMemRelease(self, handle: Any) -> int:  # noqa: N802
        if self._given:
            self._machine.take_back(self._rank, self._given.pop())
        return 0


class DoubleBoundary(Boundary):
    """The device of one rank."""

    def __init__(self, machine: Machine, rank: int) -> None:
        self._machine = machine
        self._rank = rank
        self.comm = machine.comm(rank)

    def load(self) -> None:
        if self._rank in self._machine.unloadable:
            raise ImportError("libcudart.so.13: cannot open shared object file")

    def card(self, device: str) -> Card:
        return self._machine.card(self._rank)

    def linked(self, uuid: str, others: Sequence[str]) -> list[str]:
        return [] if self._machine.no_nvlink else [o for o in others if o != uuid]

    def capturing(self) -> bool:
        return self._rank in self._machine.capturing

    def spare(self, device: str, sizes: Sequence[int]) -> str | None:
        return preflight.spare(0, sizes, _Driver(self._machine, self._rank))

    def empty_cache(self) -> None:
        self._machine.log.append((self._rank, "empty_cache"))
        self._machine.cached.pop(self._rank, None)

    def settle(self, device: str, seconds: float) -> str | None:
        if self._rank in self._machine.stuck:
            return f"wanted its kernels to end within {seconds:g} s, found them waiting for a lost rank"
        return self._machine.faults.get(self._rank)

    def references(self) -> dict[int, list[Any]]:
        return self.comm.references  # type: ignore[no-any-return]


class Machine:
    """What all ranks of a test share.

    Attributes:
        log: what was called, as (global rank, what, ...).
        limit: bytes of device memory by global rank.
        cached: of these, what torch keeps for itself until it is told to give it back.
        faults: why a device does not come to rest, by global rank.
        preflight_misses, breaks_late, unloadable, capturing, stuck: global ranks on which that is so.
        breaks_with: what it breaks with.
        cards: other cards than H200, by global rank.
    """

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.limit: dict[int, int] = {}
        self.cached: dict[int, int] = {}
        self.faults: dict[int, str] = {}
        self.preflight_misses: set[int] = set()
        self.breaks_late: set[int] = set()
        self.breaks_with: type[BaseException] = RuntimeError
        self.unloadable: set[int] = set()
        self.capturing: set[int] = set()
        self.stuck: set[int] = set()
        self.cards: dict[int, Card] = {}
        self.no_nvlink = False
        self._lock = threading.RLock()  # a buffer may go in the middle of anything
        self._buffers: dict[int, list[int]] = {}
        self._groups: dict[str, Group] = {}
        self._comms: dict[int, DoubleComm] = {}

    def comm(self, rank: int) -> DoubleComm:
        """`flashinfer.comm` of a rank: one module, however many communicators."""
        with self._lock:
            return self._comms.setdefault(rank, DoubleComm(self, rank))

    def card(self, rank: int) -> Card:
        """The GPU of a rank."""
        return self.cards.get(rank, Card(f"GPU-{rank}", "H200", (9, 0), False))

    def group(self, token: str, world_size: int, major: int) -> Group:
        """Where the kernels of one workspace meet."""
        with self._lock:
            return self._groups.setdefault(token, Group(world_size, major))

    def give(self, rank: int, nbytes: int) -> None:
        """Allocate, or raise."""
        with self._lock:
            if self.allocated(rank) + self.cached.get(rank, 0) + nbytes > self.limit.get(rank, 1 << 62):
                raise RuntimeError("CUDA error: out of memory")
            self._buffers.setdefault(rank, []).append(nbytes)

    def take_back(self, rank: int, nbytes: int) -> None:
        """Free."""
        with self._lock:
            self._buffers[rank].remove(nbytes)

    def allocated(self, rank: int) -> int:
        """Bytes of a rank."""
        with self._lock:
            return sum(self._buffers.get(rank, ()))

    def buffers(self) -> int:
        """How many there are on all ranks."""
        with self._lock:
            return sum(map(len, self._buffers.values()))

    def count(self, what: str, rank: int = 0) -> int:
        """How often a rank called that."""
        return sum(entry[:2] == (rank, what) for entry in list(self.log))


def probe(request: ProbeRequest, facts: Facts) -> Verdict:
    """The real look for modules, on a machine without flashinfer where a test says."""
    absent = request.ranks[request.rank] in ABSENT
    reason = missing_module(lambda name: None if absent and name == "flashinfer" else name)
    return Unusable(reason) if reason is not None else Usable({"flashinfer": "double"})


def flashinfer_of(machine: Machine, rank: int) -> PluginHost:
    """Core's plugin, and `flashinfer` for groups on CPU over the double."""

    class Here(FlashInfer):
        boundary = partial(DoubleBoundary, machine, rank)

    class Plugin:
        @hookimpl
        def commplane_register_comm_backends(self) -> list[BackendSpec]:
            (spec,) = plugin.commplane_register_comm_backends()
            same = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
            return [BackendSpec(**{**same, "device": "cpu", "probe": "flashinfer_double:probe", "options": dict(spec.options)})]

        @hookimpl
        def commplane_build_communicator(self, spec: BackendSpec, context: BuildContext) -> CommBackend | None:
            return Here() if spec.name == "flashinfer" else None

    host = PluginHost()
    host.register(Plugin(), "flashinfer")
    return host


def ranks_on(
    machine: Machine,
    world_size: int,
    function: Callable[[Plane], Any],
    options: Mapping[str, Any] | None = None,
    timeout: float = 40.0,
) -> list[Any]:
    """``function(plane)`` on ranks that are threads; small workspaces unless `options` say otherwise."""
    small = {"max_bytes": 1 << 16, "float32_max_bytes": 1 << 14, "any_topology": False, **(options or {})}
    return run_threads(
        world_size,
        function,
        plugins=lambda rank: flashinfer_of(machine, rank),
        config=lambda _rank: {"startup_timeout": 15, **{f"flashinfer.{name}": value for name, value in small.items()}},
        timeout=timeout,
    )


def plan_of(comm: Communicator) -> dict[str, str]:
    """Why each backend is in the plan or not."""
    return {c.name: f"{c.state}: {c.reason}" if c.reason else c.state for c in comm.plan.candidates}
