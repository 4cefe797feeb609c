"""Workspaces are built on every rank or on none, grow only by a prepare of all, and go whole."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flashinfer_double import ABSENT, Alone, DoubleBoundary, Machine, plan_of, ranks_on

from commplane.api import ReduceOp
from commplane.errors import CommunicatorError, UnsupportedOperation, WorkspaceTooSmall
from commplane.runtime import Plane
from commplane_flashinfer.backend import FlashInfer
from commplane_flashinfer.exchange import Exchange
from commplane_flashinfer.workspace import Workspaces

pytestmark = pytest.mark.timeout(60)

LEAN = {"max_bytes": 1 << 16, "open_bytes": 8192, "float32_max_bytes": 4096}


@pytest.fixture(autouse=True)
def _without_collector() -> Iterator[None]:
    """Memory has to go when the last reference does: on a device nobody waits for Python to look for cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def ones(plane: Plane, nbytes: int = 4096, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """What a rank brings: its rank, plus 1."""
    return torch.full((nbytes // dtype.itemsize // 256, 256), plane.rank + 1.0, dtype=dtype)


def test_what_the_settings_declare_is_built_at_open_and_all_of_it_freed_at_close() -> None:
    machine = Machine()

    def rank(plane: Plane) -> Any:
        with plane.communicator("tp") as comm:
            during = machine.allocated(plane.rank)
            return plan_of(comm)["flashinfer"], comm.all_reduce(ones(plane)).unique().tolist(), during

    assert ranks_on(machine, 2, rank) == [("ready", [3.0], 2 * 3 * (2 << 20))] * 2
    assert machine.buffers() == 0
    assert machine.count("create") == machine.count("destroy") == 2
    assert not machine.comm(0).references


def test_one_rank_without_the_package_leaves_the_backend_out_on_all_with_the_reason() -> None:
    machine = Machine()
    ABSENT.add(1)
    try:

        def rank(plane: Plane) -> Any:
            with plane.communicator("tp") as comm:
                return plan_of(comm)["flashinfer"], comm.all_reduce(ones(plane)).unique().tolist()

        said = ranks_on(machine, 2, rank)
    finally:
        ABSENT.clear()
    assert said[0] == said[1], said
    assert "wanted the module flashinfer, found none: pip install 'commplane-flashinfer[flashinfer]'" in said[0][0]
    assert said[0][1] == [3.0]
    assert machine.log == []


@pytest.mark.parametrize("misses", [False, True], ids=["the preflight finds it", "the creation finds it"])
def test_one_rank_out_of_memory_leaves_the_backend_out_on_all_and_nothing_allocated(misses: bool) -> None:
    machine = Machine()
    machine.limit[1] = 3 << 20  # one buffer of three
    machine.preflight_misses = {1} if misses else set()

    def rank(plane: Plane) -> Any:
        with plane.communicator("tp") as comm:
            return plan_of(comm)["flashinfer"], machine.allocated(plane.rank), comm.all_reduce(ones(plane)).unique().tolist()

    said = ranks_on(machine, 2, rank)
    assert said[0] == said[1], said
    assert "rank 1:" in said[0][0]
    assert "out of memory" in said[0][0]
    assert said[0][1:] == (0, [3.0])
    assert machine.count("create") == (1 if misses else 0)
    assert not machine.comm(0).references and not machine.comm(1).references


def test_a_creation_that_fails_after_its_memory_is_registered_leaves_nothing_in_the_global() -> None:
    machine = Machine()
    machine.breaks_late = {0}

    def rank(plane: Plane) -> Any:
        with plane.communicator("tp") as comm:
            return plan_of(comm)["flashinfer"]

    said = ranks_on(machine, 2, rank)
    assert "rank 0: RuntimeError: the lamport buffer could not be set" in said[0]
    assert machine.buffers() == 0
    assert not machine.comm(0).references


def test_a_rank_whose_library_does_not_load_leaves_the_backend_out_on_all() -> None:
    machine = Machine()
    machine.unloadable = {0}

    def rank(plane: Plane) -> Any:
        with plane.communicator("tp") as comm:
            return plan_of(comm)["flashinfer"]

    said = ranks_on(machine, 2, rank)
    assert said[0] == said[1]
    assert "rank 0: flashinfer does not load: ImportError: libcudart.so.13" in said[0]


def test_prepare_grows_beside_what_is_there_and_the_old_one_goes() -> None:
    machine = Machine()

    def rank(plane: Plane) -> Any:
        with plane.communicator("tp", options={"flashinfer": LEAN}) as comm:
            with pytest.raises(WorkspaceTooSmall, match="prepare"):
                comm.all_reduce(ones(plane, 1 << 16))
            return None

    def grown(plane: Plane) -> Any:
        with plane.communicator("tp", options={"flashinfer": LEAN}) as comm:
            small = machine.count("create", plane.rank)
            comm.prepare("all_reduce", dtype=torch.bfloat16, max_bytes=1 << 16)
            comm.prepare("all_reduce_rms_norm", dtype=torch.float16, max_bytes=1 << 15)  # fits: nothing to build
            comm.prepare("all_reduce", dtype=torch.bfloat16, max_bytes=1 << 30)  # beyond the cap another backend serves
            made = machine.count("create", plane.rank) - small
            return made, machine.count("destroy", plane.rank), comm.all_reduce(ones(plane, 1 << 16)).unique().tolist()

    assert ranks_on(machine, 2, rank) == [None, None]
    machine.log.clear()
    assert ranks_on(machine, 2, grown) == [(1, 1, [3.0])] * 2
    assert machine.buffers() == 0


def test_a_growth_that_one_rank_cannot_give_is_undone_on_all_cached_and_never_tried_again() -> None:
    machine = Machine()

    def rank(plane: Plane) -> Any:
        errors = []
        with plane.communicator("tp", options={"flashinfer": LEAN}) as comm:
            before = machine.allocated(plane.rank)
            comm.barrier()
            machine.limit[1], machine.preflight_misses = before + (3 << 20), {1}
            comm.barrier()
            for _ in range(2):
                try:
                    comm.prepare("all_reduce", dtype=torch.bfloat16, max_bytes=1 << 16)
                except CommunicatorError as error:
                    errors.append(str(error))
                comm.barrier()
            tried = machine.count("create", plane.rank)
            after = machine.allocated(plane.rank)
            works = comm.all_reduce(ones(plane)).unique().tolist()
            comm.barrier()
            machine.limit.clear()
            comm.barrier()
            comm.prepare("all_reduce", dtype=torch.bfloat16, max_bytes=1 << 15)  # another need may try
            larger = comm.all_reduce(ones(plane, 1 << 15)).unique().tolist()
        return errors, tried, before == after, works, larger

    said = ranks_on(machine, 2, rank)
    for errors, tried, as_before, works, larger in said:
        assert len(errors) == 2
        assert "rank 1: RuntimeError: CUDA error: out of memory" in errors[0]
        assert "rank 1: RuntimeError: CUDA error: out of memory" in errors[1]
        assert "it failed before and is not tried again" in errors[1]
        assert (tried, as_before, works, larger) == (3, True, [3.0], [3.0])
    assert machine.buffers() == 0


def test_an_interrupt_in_a_creation_leaves_nothing_in_the_global() -> None:
    machine = Machine()
    machine.breaks_late, machine.breaks_with = {0}, KeyboardInterrupt
    comm, exchange = machine.comm(0), Exchange(Alone(1), "workspace")  # type: ignore[arg-type]
    context: Any = SimpleNamespace(world_size=1, rank=0, device="cpu")
    workspaces = Workspaces(context, DoubleBoundary(machine, 0), (9, 0), 1 << 30)
    with pytest.raises(KeyboardInterrupt):
        workspaces._create(exchange, False, 4096)
    assert not comm.references


def test_what_torch_only_keeps_is_given_back_where_the_preflight_fails_and_nowhere_else() -> None:
    machine = Machine()
    machine.limit, machine.cached = {0: 1 << 30, 1: 13 << 20}, {0: 4 << 20, 1: 4 << 20}

    def rank(plane: Plane) -> Any:
        with plane.communicator("tp") as comm:
            return plan_of(comm)["flashinfer"]

    assert ranks_on(machine, 2, rank) == ["ready"] * 2
    assert (machine.count("empty_cache", 0), machine.count("empty_cache", 1)) == (0, 1)
    assert machine.cached == {0: 4 << 20}


@pytest.mark.parametrize(("short", "state"), [(0, "ready"), (1, "out of memory")])
def test_the_preflight_and_the_creation_ask_for_the_same_to_the_byte(short: int, state: str) -> None:
    machine = Machine()
    options = {"max_bytes": 1 << 20, "float32_max_bytes": 4096}  # 2 MiB of two-shot, and FlashInfer's pad makes it two units
    machine.limit = dict.fromkeys(range(2), (4 + 2 + 8 << 20) + (6 << 20) - short)

    def rank(plane: Plane) -> Any:
        with plane.communicator("tp", options={"flashinfer": options}) as comm:
            return plan_of(comm)["flashinfer"]

    for said in ranks_on(machine, 2, rank):
        assert state in said
    # The 16-bit workspace fits in both cases; that for float32 is not even begun where it would be one byte too many.
    assert machine.count("create") == (1 if short else 2)
    assert machine.buffers() == 0


def test_a_fault_of_an_earlier_call_keeps_what_a_growth_replaces_until_close() -> None:
    machine = Machine()

    def rank(plane: Plane) -> Any:
        with plane.communicator("tp", options={"flashinfer": LEAN}) as comm:
            comm.barrier()
            machine.faults = {0: "wanted cuda:0 to come to rest, found a fault of an earlier call (misaligned address)"}
            comm.barrier()
            comm.prepare("all_reduce", dtype=torch.bfloat16, max_bytes=1 << 16)
            held = machine.allocated(plane.rank)
            comm.barrier()
            machine.faults = {}
            comm.barrier()
            return held, comm.all_reduce(ones(plane, 1 << 16)).unique().tolist()

    assert ranks_on(machine, 2, rank) == [(9 * (2 << 20), [3.0]), (6 * (2 << 20), [3.0])]
    assert machine.buffers() == 0


def test_two_communicators_over_the_same_ranks_share_nothing() -> None:
    machine = Machine()

    def rank(plane: Plane) -> Any:
        with plane.communicator("attention") as one, plane.communicator("experts") as other:
            made = machine.count("create", plane.rank)
            return made, one.all_reduce(ones(plane)).unique().tolist(), other.all_reduce(ones(plane)).unique().tolist()

    assert ranks_on(machine, 2, rank) == [(4, [3.0], [3.0])] * 2
    assert machine.buffers() == 0


def test_close_with_a_kernel_that_waits_for_a_lost_rank_does_not_hang_and_frees_nothing_under_it() -> None:
    machine = Machine()

    def rank(plane: Plane) -> Any:
        comm = plane.communicator("tp")
        comm.barrier()
        machine.stuck = {0}
        comm.barrier()
        if plane.rank == 0:
            with pytest.warns(UserWarning, match="waiting for a lost rank: 12582912 bytes of device memory stay"):
                comm.close()
        else:
            comm.close()
        return machine.allocated(plane.rank)

    said = ranks_on(machine, 2, rank)
    assert said == [2 * 3 * (2 << 20), 0], said


def test_cards_that_differ_or_have_no_nvlink_are_refused_on_all_alike() -> None:
    machine = Machine()
    machine.no_nvlink = True

    def rank(plane: Plane) -> Any:
        with plane.communicator("tp") as comm:
            without = plan_of(comm)["flashinfer"]
        with plane.communicator("forced", options={"flashinfer": {"any_topology": True}}) as comm:
            return without, plan_of(comm)["flashinfer"]

    said = ranks_on(machine, 2, rank)
    assert said[0] == said[1], said
    assert "wanted NVLink between all GPUs, found none between ranks 0 and 1" in said[0][0]
    assert said[0][1] == "ready"


def test_a_rank_that_cannot_tell_about_nvlink_leaves_the_backend_out_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def linked(self: DoubleBoundary, uuid: str, others: Any) -> list[str]:
        if uuid == "GPU-1":
            raise OSError("NVML Shared Library Not Found")
        return list(others)

    monkeypatch.setattr(DoubleBoundary, "linked", linked)

    def rank(plane: Plane) -> Any:
        with plane.communicator("tp") as comm:
            return plan_of(comm)["flashinfer"]

    said = ranks_on(Machine(), 2, rank)
    assert said[0] == said[1], said
    assert (
        "opening failed and is undone on all ranks: rank 1: cannot tell whether there is NVLink between the GPUs: "
        "OSError: NVML Shared Library Not Found; set flashinfer.any_topology=true to run"
    ) in said[0]


def test_a_backend_that_is_closed_says_so() -> None:
    backend = FlashInfer()
    backend.close()
    with pytest.raises(UnsupportedOperation) as caught:
        backend.all_reduce(torch.zeros(8), ReduceOp.SUM)
    assert str(caught.value) == "FlashInfer wanted to be open, found closed: create the communicator again"


def test_of_a_process_that_was_killed_no_file_stays() -> None:
    """The exchange is on the control plane alone: no socket and no name of ours is made at all."""
    machine = Machine()
    before = set(os.listdir("/dev/shm"))

    def rank(plane: Plane) -> Any:
        with plane.communicator("tp"):
            return sorted(set(os.listdir("/dev/shm")) - before)

    found = ranks_on(machine, 2, rank)
    assert not [name for names in found for name in names if "flashinfer" in name]
