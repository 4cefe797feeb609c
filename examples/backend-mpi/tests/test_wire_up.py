"""Groups become MPI communicators, however the ranks were started; what the conformance kit cannot know of MPI."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commplane_mpi.probe import probe

import commplane
from commplane.api import Facts, GroupKey, ProbeRequest, RankFacts, Unusable, Usable
from commplane.testing import run_processes as run_some_processes

pytestmark = pytest.mark.timeout(170)


def run_processes(*arguments: Any, **options: Any) -> list[Any]:
    return run_some_processes(*arguments, timeout=150, **options)  # a machine with much to do imports torch slowly


def candidate(communicator: Any) -> Any:
    return next(c for c in communicator.plan.candidates if c.name == "mpi")


def sums(communicator: Any, rank: int) -> float:
    return communicator.all_reduce(torch.full((5,), float(10**rank))).tolist()[0]


def results(outcomes: list[Any]) -> list[Any]:
    for outcome in outcomes:
        assert outcome.returncode == 0, outcome.output
    return [outcome.result for outcome in outcomes]


def several_groups(store: Any, rank: int, world_size: int) -> Any:
    with commplane.init(store=store, rank=rank, world_size=world_size) as plane:
        seen = []
        groups = [[0, 1, 2], [2, 1, 0], [0, 1], [1, 2], [2, 0]]
        made = [plane.communicator(f"g{i}", ranks=g, backends=["mpi"]) for i, g in enumerate(groups) if rank in g]
        for _ in range(3):
            for group in made:
                assert candidate(group).state == "ready", candidate(group)
                first = torch.tensor([float(rank)])
                seen.append(
                    [sums(group, rank), group.broadcast(first, src=0).item(), group.all_gather(torch.tensor([rank])).tolist()]
                )
        for _ in range(3):  # one after the other, over the same processes
            with plane.communicator("again", backends=["mpi"]) as again:
                assert sums(again, rank) == 111.0
        return seen


def test_groups_that_overlap_have_their_own_ranks_in_their_own_order() -> None:
    expected = {
        0: [[111.0, 0.0, [0, 1, 2]], [111.0, 2.0, [2, 1, 0]], [11.0, 0.0, [0, 1]], [101.0, 2.0, [2, 0]]],
        1: [[111.0, 0.0, [0, 1, 2]], [111.0, 2.0, [2, 1, 0]], [11.0, 0.0, [0, 1]], [110.0, 1.0, [1, 2]]],
        2: [[111.0, 0.0, [0, 1, 2]], [111.0, 2.0, [2, 1, 0]], [110.0, 1.0, [1, 2]], [101.0, 2.0, [2, 0]]],
    }
    assert results(run_processes(3, several_groups)) == [expected[rank] * 3 for rank in range(3)]


def a_name_for_each_rank(store: Any, rank: int, world_size: int) -> Any:
    before = set(os.listdir("/dev/shm"))
    with commplane.init(store=store, rank=rank, world_size=world_size) as plane:
        group = plane.communicator("tp", backends=["mpi"])
        assert sums(group, rank) == 11.0
        return [name for name in set(os.listdir("/dev/shm")) - before if name.startswith(("mpich", "ucx"))]


def test_nothing_in_shared_memory_has_a_name_while_a_group_lives() -> None:
    assert results(run_processes(2, a_name_for_each_rank)) == [[], []]


def a_rank_ends(store: Any, rank: int, world_size: int) -> Any:
    plane = commplane.init(store=store, rank=rank, world_size=world_size, config={"run_timeout": 30.0})
    everyone = plane.communicator("all", backends=["mpi"])
    pair = plane.communicator("pair", ranks=[0, 1], backends=["mpi"]) if rank < 2 else None
    assert sums(everyone, rank) == 111.0
    if pair is None:
        os._exit(0)
    with pytest.raises(commplane.errors.PeerError) as caught:
        sums(everyone, rank)
    assert sums(pair, rank) == 11.0
    plane.close()
    return [list(caught.value.missing_ranks), str(caught.value)]


def test_a_rank_that_ends_is_named_and_the_others_go_on_without_it() -> None:
    for rank, (missing, text) in enumerate(results(run_processes(3, a_rank_ends))[:2]):
        assert missing == [2]
        assert text.startswith(f"[all rank {rank}/3 mpi]")


def a_rank_stays_away(store: Any, rank: int, world_size: int) -> Any:
    plane = commplane.init(store=store, rank=rank, world_size=world_size, config={"run_timeout": 1.0})
    group = plane.communicator("tp", backends=["mpi"])
    text = ""
    if rank == 0:
        with pytest.raises(commplane.errors.PeerError, match="within 1 s") as caught:
            group.barrier()
        text = str(caught.value)
    plane.gather(rank, what="both are here")
    group.poison(commplane.errors.CommunicatorError("the test is over"))
    plane.close()
    return text


def test_a_rank_that_stays_away_is_an_error_at_the_deadline() -> None:
    assert "MPI does not tell who is missing" in results(run_processes(2, a_rank_stays_away))[0]


def a_rank_ends_while_it_connects(store: Any, rank: int, world_size: int) -> Any:
    from commplane_mpi import process

    if rank == 2:

        def leave(context: Any) -> Any:
            context.bootstrap.broadcast(None, what="MPI ports")
            os._exit(0)

        assert callable(process._join)
        process._join = leave
    config = {"startup_timeout": 10.0}
    with commplane.init(store=store, rank=rank, world_size=world_size, config=config) as plane:
        plane.communicator("tp", backends=["mpi"])


def test_a_rank_that_ends_while_it_connects_leaves_nobody_hanging() -> None:
    outcomes = run_processes(3, a_rank_ends_while_it_connects)
    for outcome in outcomes[:2]:
        assert (outcome.returncode, outcome.error) == (1, "PeerError"), outcome.output
        assert "2" in outcome.message
    assert outcomes[2].returncode == 0


def what_the_probe_says(store: Any, rank: int, world_size: int, initialise: str) -> Any:
    if initialise:
        from mpi4py import MPI

        MPI.Init()
        if initialise == "finalized":
            MPI.Finalize()
    with commplane.init(store=store, rank=rank, world_size=world_size) as plane:
        reason = candidate(plane.communicator("tp")).reason
    if initialise == "initialised":
        MPI.Finalize()  # else MPICH's own shared memory keeps its name
    return reason


@pytest.mark.parametrize(
    ("initialise", "env", "wanted"),
    [
        ("", {"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}, "no MPI library loads: install mpi4py and mpich"),
        ("", {"MPI4PY_MPIABI": "none"}, "no MPI library loads"),
        ("initialised", {}, "in a world of 1 where the group has 2 ranks: start them with mpiexec"),
        ("finalized", {}, "cannot be initialised a second time"),
    ],
    ids=["no library", "no extension module", "initialised without mpiexec", "finalized"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_probe_says_why_not(initialise: str, env: dict[str, str], wanted: str) -> None:
    for reason in results(run_processes(2, what_the_probe_says, initialise, env=lambda _: {"MPI4PY_RC_INITIALIZE": "0", **env})):
        assert wanted in reason


def verdict(*ranks: dict[str, Any]) -> Any:
    machine = {"machine": "x86_64", "python": "3.11", "torch": None, "memory_limit": 1, "cores": (0,), "devices": ()}
    process = {"pid_start": 1, "pid_namespace": "n", "shm_free": 1}
    facts = Facts(RankFacts(rank=i, **rank, **process, **machine) for i, rank in enumerate(ranks))  # type: ignore[arg-type]
    return probe(ProbeRequest(GroupKey(tuple(facts), "cpu", "tp"), 0, {}), facts)


def test_a_group_that_spans_hosts_is_refused_where_ranks_connect_one_by_one() -> None:
    refused = verdict({"host": "a", "pid": 1, "shm_domain": 0}, {"host": "b", "pid": 2, "shm_domain": 1})
    assert isinstance(refused, Unusable)
    assert "the group spans hosts (rank 0 on a; rank 1 on b)" in refused.reason
    assert isinstance(verdict({"host": "a", "pid": 1, "shm_domain": 0}, {"host": "a", "pid": 2, "shm_domain": 0}), Usable)


def test_threads_of_one_process_are_refused() -> None:
    refused = verdict({"host": "a", "pid": 1, "shm_domain": 0}, {"host": "a", "pid": 1, "shm_domain": 0})
    assert isinstance(refused, Unusable)
    assert "threads of one process" in refused.reason


MPIEXEC = """
import json, sys
from mpi4py import MPI
from torch.distributed import FileStore
sys.path.insert(0, {tests!r})
import test_wire_up
world = MPI.COMM_WORLD
seen = test_wire_up.several_groups(FileStore({store!r}, world.size), world.rank, world.size)
print(json.dumps([world.rank, seen]))
"""


def mpiexec() -> Path:
    files = importlib.metadata.files("mpich") or []
    return next(Path(str(f.locate())).resolve() for f in files if f.match("bin/mpiexec"))


def test_ranks_of_mpiexec_get_a_part_of_its_world(tmp_path: Path) -> None:
    code = MPIEXEC.format(tests=str(Path(__file__).parent), store=str(tmp_path / "store"))
    command = [str(mpiexec()), "-n", "3", sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("111.0") == 18
