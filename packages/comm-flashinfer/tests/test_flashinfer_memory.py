"""The preflight asks the driver for what FlashInfer will, and gives it back; a free leaves nothing in FlashInfer's global."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from flashinfer_double import Alone

from commplane.errors import CommunicatorError, UnsupportedOperation
from commplane_flashinfer import capacity
from commplane_flashinfer.boundary import Boundary
from commplane_flashinfer.exchange import Exchange
from commplane_flashinfer.preflight import AllocationProp, spare
from commplane_flashinfer.workspace import Workspaces

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def _without_collector() -> Iterator[None]:
    """Memory has to go when the last reference does: on a device nobody waits for Python to look for cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Driver:
    """``libcuda`` with `room` bytes; keeps what was asked and what is allocated. It may answer with errors of its own."""

    def __init__(self, room: int, init: int = 0, granularity: int = 0, create: int = 0) -> None:
        self.room, self.init, self.granularity, self.create, self.unit = room, init, granularity, create, 2 << 20
        self.held: dict[int, int] = {}
        self.asked: list[int] = []
        self.props: list[tuple[int, int, int, int, int]] = []

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.init

    def cuMemGetAllocationGranularity(self, out: Any, prop: Any, flag: int) -> int:  # noqa: N802
        out._obj.value = self.unit
        return self.granularity

    def cuMemCreate(self, out: Any, size: Any, prop: Any, flags: Any) -> int:  # noqa: N802
        if self.create:
            return self.create
        if sum(self.held.values()) + size.value > self.room:
            return 2
        p = prop._obj
        self.props.append((p.type, p.handle_types, p.location.type, p.location.id, p.flags.gpu_direct_rdma))
        self.asked.append(size.value)
        out._obj.value = len(self.asked)
        self.held[len(self.asked)] = size.value
        return 0

    def cuMemRelease(self, handle: Any) -> int:  # noqa: N802
        del self.held[handle.value]
        return 0


def test_what_fits_is_asked_for_at_once_in_whole_units_and_given_back() -> None:
    driver = Driver(1 << 30)
    assert spare(3, (1, (2 << 20) - 2047, 5 << 20), driver) is None
    assert driver.asked == [2 << 20, 4 << 20, 6 << 20]
    assert driver.props == [(1, 1, 1, 3, 1)] * 3
    assert driver.held == {}


def test_what_does_not_fit_is_said_with_sizes_and_given_back() -> None:
    driver = Driver(5 << 20)
    reason = spare(0, (1, 1, 1), driver)
    assert reason == (
        "wanted 6291456 bytes of shareable memory on GPU 0, it is out of memory after 4194304: give it room, or lower "
        "max_tokens or max_bytes"
    )
    assert driver.held == {}


@pytest.mark.parametrize(
    ("errors", "text"),
    [
        ({"init": 100}, "wanted memory of GPU 3, cuInit answered error 100: look at nvidia-smi"),
        ({"granularity": 801}, "wanted shareable memory of GPU 3, the driver answered error 801 for its granularity"),
        (
            {"create": 801},
            "wanted 2097152 bytes of shareable memory on GPU 3, it answered error 801 after 0: give it room, or lower "
            "max_tokens or max_bytes",
        ),
    ],
)
def test_an_error_of_the_driver_is_said_with_its_number(errors: dict[str, int], text: str) -> None:
    assert spare(3, (1,), Driver(1 << 30, **errors)) == text


def test_the_structure_is_laid_out_as_the_drivers_is() -> None:
    assert ctypes.sizeof(AllocationProp) == 32
    assert AllocationProp.win32.offset == 16
    assert AllocationProp.flags.offset == 24


def test_it_is_laid_out_as_nvidias_own_binding_has_it() -> None:
    cuda = pytest.importorskip("cuda.bindings.driver", reason="wants cuda-bindings: pip install cuda-bindings")
    theirs = cuda.CUmemAllocationProp()
    theirs.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    theirs.requestedHandleTypes = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    location = cuda.CUmemLocation()
    location.type, location.id = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE, 5
    theirs.location = location
    theirs.allocFlags.gpuDirectRDMACapable = 1
    same = AllocationProp.from_address(theirs.getPtr())
    assert (same.type, same.handle_types, same.location.type, same.location.id, same.flags.gpu_direct_rdma) == (1, 1, 1, 5, 1)


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Any:
    """FlashInfer's own module with CUDA calls replaced: the sizes that are allocated, and the pointers that were freed."""
    trtllm_ar = pytest.importorskip(
        "flashinfer.comm.trtllm_ar", reason="wants flashinfer-python: pip install 'commplane-flashinfer[flashinfer]'"
    )
    from flashinfer.comm import allreduce, cuda_ipc

    class State:
        module = trtllm_ar
        allocated: ClassVar[list[int]] = []
        made = 0
        freed: ClassVar[list[int]] = []
        breaks = False

    class Memory:
        def __init__(self, buf_size: int, group_size: int, comm_backend_for_handle_transfer: Any, **rest: Any) -> None:
            assert rest["enable_multicast"] is False
            self.comm_backend = comm_backend_for_handle_transfer
            State.allocated.append(buf_size)
            State.made += 1
            weakref.finalize(self, State.allocated.remove, buf_size)
            self.ptrs = list(self.comm_backend.allgather(4096))  # as it does, once its own part is there

        def get_buffer_ptrs_host(self) -> list[int]:
            return self.ptrs

    class Cudart:
        def cudaMalloc(self, size: int) -> Any:  # noqa: N802
            return ctypes.c_void_p(64)

        def cudaMemset(self, *args: Any) -> None:  # noqa: N802
            pass

        cudaMemcpy = cudaMemset  # noqa: N815

        def cudaFree(self, pointer: Any) -> None:  # noqa: N802
            State.freed.append(pointer.value)

    def lamport(*args: Any) -> None:
        if State.breaks:
            raise RuntimeError("out of memory")

    State.allocated.clear(), State.freed.clear()
    monkeypatch.setattr(trtllm_ar, "SymmDeviceMemory", Memory)
    monkeypatch.setattr(trtllm_ar, "trtllm_lamport_initialize", lamport)
    monkeypatch.setattr(trtllm_ar, "cudart", Cudart())
    monkeypatch.setattr(cuda_ipc, "cudart", Cudart())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: None)
    make = torch.tensor
    on_cpu = SimpleNamespace(**{**vars(torch), "tensor": lambda data, dtype=None, device=None: make(data, dtype=dtype)})
    monkeypatch.setattr(trtllm_ar, "torch", on_cpu)
    monkeypatch.setattr(allreduce, "is_confidential_compute", lambda: False)
    return State


def create(exchange: Any) -> Any:
    """FlashInfer's own trtllm workspace, for 8 tokens of 4096."""
    from flashinfer.comm.allreduce import TRTLLMAllReduceFusionWorkspace

    return TRTLLMAllReduceFusionWorkspace(
        tp_size=2, tp_rank=0, max_token_num=8, hidden_dim=4096, dtype=torch.bfloat16, comm_backend=exchange
    )


def test_the_real_workspace_asks_for_what_the_formula_says_and_free_leaves_nothing(real: Any) -> None:
    boundary = Boundary()
    raw = create(Exchange(Alone(), "workspace"))  # type: ignore[arg-type]
    assert tuple(real.allocated) == capacity.requests(2, 8 * 4096, 2)
    assert len(boundary.references()) == 1
    boundary.free(raw)
    del raw
    assert (real.allocated, boundary.references(), real.freed) == ([], {}, [64])


def test_destroy_alone_would_leave_all_of_it(real: Any) -> None:
    raw = create(Exchange(Alone(), "workspace"))  # type: ignore[arg-type]
    raw.destroy()
    del raw
    gc.collect()
    left = len(real.allocated)
    real.module._symm_workspace_refs.clear()
    assert left == 3, "FlashInfer frees now by itself: Boundary.free may become simpler"


def test_a_real_creation_that_fails_half_way_leaves_nothing_after_free_partial(real: Any) -> None:
    boundary, exchange, other = Boundary(), Exchange(Alone(), "one"), Exchange(Alone(), "other")  # type: ignore[arg-type]
    kept = create(other)
    real.breaks = True
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        create(exchange)
    assert len(boundary.references()) == 2
    boundary.free_partial(exchange, caught.value)
    del caught
    assert len(boundary.references()) == 1, "that of another communicator stays"
    assert len(real.allocated) == 3
    boundary.free(kept)
    assert real.allocated == []


def build(boundary: Boundary, made_by: Callable[[Any], Any], fails: int) -> None:
    """A build whose creation is `made_by`, in whose round `fails` the other rank says that it broke."""
    context: Any = SimpleNamespace(
        bootstrap=Alone(fails=2 + fails),  # after the look for captures and the preflight
        world_size=2,
        rank=0,
        ranks=(0, 1),
        key=SimpleNamespace(purpose="tp"),
        backend="flashinfer",
        who="[tp rank 0/2 flashinfer]",
        device="cpu",
    )
    asked: Any = SimpleNamespace(
        comm=SimpleNamespace(create_allreduce_fusion_workspace=lambda comm_backend, **rest: made_by(comm_backend)),
        capturing=lambda: False,
        spare=lambda device, sizes: None,
        free=boundary.free,
        free_partial=boundary.free_partial,
    )
    Workspaces(context, asked, (9, 0), 1 << 30).build(False, 8 * 4096)


# Three buffers, each with the names of sockets exchanged, and a barrier: the rounds of FlashInfer's creation.
@pytest.mark.parametrize("fails", [1, 2, 3, 4], ids=["first buffer", "second buffer", "third buffer", "barrier"])
def test_where_the_other_rank_fails_this_one_keeps_nothing_of_a_real_creation_and_says_why(real: Any, fails: int) -> None:
    boundary = Boundary()
    with pytest.raises(CommunicatorError) as caught:
        build(boundary, create, fails)
    assert str(caught.value) == (
        f"[tp flashinfer] workspace of flashinfer for 32768 elements of 16 bits ({6 << 20} bytes a rank) failed and is undone on "
        f"all ranks: rank 1: it broke"
    )
    assert real.made == min(fails, 3)
    # Also while the error is still there, as it is where a communicator keeps it.
    assert (real.allocated, boundary.references(), real.freed) == ([], {}, [64] if fails == 4 else [])


def test_where_the_other_rank_fails_the_descriptor_that_was_for_it_is_closed(real: Any) -> None:
    from flashinfer.comm.fd_exchange import exchange_fds

    # What cuMemExportToShareableHandle gives is FlashInfer's own, and it leaves it open where its exchange raises.
    mine = os.open(os.devnull, os.O_RDONLY)
    with pytest.raises(CommunicatorError, match="it broke"):
        build(Boundary(), lambda exchange: exchange_fds(exchange, mine), 1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(mine)


def test_settle_says_why_a_device_does_not_come_to_rest(real: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    boundary, let_go = Boundary(), threading.Event()
    assert boundary.settle("cuda:1", 5.0) is None

    def broken(device: Any) -> None:
        raise RuntimeError("CUDA error: misaligned address\nCUDA kernel errors might be reported elsewhere")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert boundary.settle("cuda:1", 5.0) == (
        "wanted cuda:1 to come to rest, found a fault of an earlier call (CUDA error: misaligned address CUDA kernel errors "
        "might be reported elsewhere)"
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: let_go.wait(20))
    said = boundary.settle("cuda:1", 0.05)
    let_go.set()
    assert said == "wanted its kernels to end within 0.05 s, found them waiting for a lost rank"


def test_a_split_of_the_group_is_refused() -> None:
    with pytest.raises(UnsupportedOperation) as caught:
        Exchange(Alone(), "opening").Split(0, 0)  # type: ignore[arg-type]
    assert str(caught.value) == "opening wanted to split the group, which only multicast kernels need: use trtllm's"
