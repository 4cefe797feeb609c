"""Group ranks are group ranks: our exchange says what FlashInfer's own says over real gloo sub-groups."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from typing import Any

import pytest

from commplane.testing import run_processes

pytestmark = pytest.mark.timeout(90)
GROUPS = [[0, 1], [2, 3], [0, 2], [3, 1]]


def protocol(comm: Any, mine: Any) -> list[Any]:
    """Everything FlashInfer asks of a `CommBackend`, as JSON."""
    said: list[Any] = [comm.Get_rank(), comm.Get_size(), list(comm.allgather({"from": mine}))]
    said += [comm.bcast({"from": mine}, root) for root in range(comm.Get_size())]
    comm.barrier()
    return [*said, list(comm.allgather(b"\x00\xff".hex()))]


def both(store: Any, rank: int, world_size: int) -> list[Any]:
    """What ours and FlashInfer's `TorchDistBackend` say in each group of this rank."""
    import torch.distributed as dist
    from flashinfer.comm.abstractions import CommBackend
    from flashinfer.comm.comm_backend import TorchDistBackend

    from commplane.agree import StoreBootstrap
    from commplane.runtime import init
    from commplane_flashinfer.exchange import Exchange

    dist.init_process_group(
        "gloo", store=dist.PrefixStore("gloo", store), rank=rank, world_size=world_size, timeout=timedelta(seconds=30)
    )
    out = []
    with init(store=dist.PrefixStore("plane", store), rank=rank, world_size=world_size) as plane:
        for number, ranks in enumerate(GROUPS):
            group = dist.new_group(sorted(ranks), backend="gloo")
            if rank not in ranks:
                continue
            with plane.communicator(f"g{number}", ranks=sorted(ranks)) as comm:
                bootstrap = comm._bootstrap
                assert isinstance(bootstrap, StoreBootstrap)
                ours = Exchange(bootstrap, "exchange")
                assert isinstance(ours, CommBackend)
                out.append([protocol(ours, rank), protocol(TorchDistBackend(group), rank)])
    dist.destroy_process_group()
    return out


def lost(store: Any, rank: int, world_size: int) -> Any:
    """Rank 1 is killed after it has built a workspace; what the other is told when it wants a larger one, and what stays."""
    import gc

    from flashinfer_double import DoubleBoundary, Machine

    from commplane.api import BuildContext, Deadline
    from commplane.errors import PeerError
    from commplane.runtime import init
    from commplane_flashinfer.workspace import Workspaces

    with init(store=store, rank=rank, world_size=world_size) as plane:
        comm = plane.communicator("tp")
        machine = Machine()
        context = BuildContext("flashinfer", comm.key, rank, "cpu", comm._bootstrap, plane.facts, Deadline(20), 5.0, options={})
        workspaces = Workspaces(context, DoubleBoundary(machine, rank), (9, 0), 1 << 30)
        workspaces.take(False, workspaces.build(False, 4096))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        said = []
        for _ in range(2):
            try:
                workspaces.build(False, 8192)
            except PeerError as error:
                said.append(list(error.missing_ranks))
                comm.poison(error)
        before = machine.buffers()
        workspaces.close()
        workspaces.close()
        gc.collect()
        return [said, before, machine.buffers(), workspaces.elements(False)]


@pytest.mark.long  # four processes import flashinfer.comm
def test_in_orthogonal_sub_groups_it_says_what_the_real_torch_dist_backend_says() -> None:
    pytest.importorskip("flashinfer.comm", reason="wants flashinfer-python: pip install 'commplane-flashinfer[flashinfer]'")
    outcomes = run_processes(4, both, timeout=80)
    assert [o.error for o in outcomes] == [None] * 4, [o.output[-800:] for o in outcomes]
    for outcome in outcomes:
        assert len(outcome.result) == 2
        for ours, theirs in outcome.result:
            assert ours == theirs
    # Of rank 3: second in [2, 3], second in [1, 3].
    (first, _), (second, _) = outcomes[3].result
    assert first == [1, 2, [{"from": 2}, {"from": 3}], {"from": 2}, {"from": 3}, ["00ff", "00ff"]]
    assert second[2] == [{"from": 1}, {"from": 3}]


def test_after_kill_9_of_a_peer_a_build_names_it_and_close_frees_everything() -> None:
    outcomes = run_processes(2, lost, timeout=60)
    assert outcomes[1].returncode == -signal.SIGKILL
    assert outcomes[0].error is None, outcomes[0].output[-2000:]
    assert outcomes[0].result == [[[1], [1]], 3, 0, 0]
