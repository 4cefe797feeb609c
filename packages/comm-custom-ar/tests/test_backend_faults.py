"""Real processes that die, stop, sit on different hosts or run out of shared memory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import commplane
from commplane import errors
from commplane.testing import Outcome, PluginHost, run_processes, shm_leftovers
from commplane_custom_ar import plugin

TIMEOUT_S = 3.0


def host() -> PluginHost:
    out = PluginHost()
    out.register(plugin, "custom_ar", dist="commplane-custom-ar", version="0.1.0")
    return out


def start(store: Any, rank: int, world_size: int, **config: Any) -> commplane.Plane:
    return commplane.init(store=store, rank=rank, world_size=world_size, plugins=host(), config=config)


def results(outcomes: Sequence[Outcome]) -> list[Any]:
    for o in outcomes:
        assert o.error is None and o.returncode == 0, o.output
    return [o.result for o in outcomes]


@pytest.fixture(autouse=True)
def shared_memory_is_left_as_it_was() -> Iterator[None]:
    before = shm_leftovers()
    yield
    assert shm_leftovers() <= before


def names_are_gone_while_in_use(store: Any, rank: int, world_size: int) -> list[str]:
    with start(store, rank, world_size) as plane:
        tp = plane.communicator("tp")
        buffer = tp.empty(100_000, dtype=torch.float32).fill_(1.0)
        tp.all_reduce_(buffer)
        tp.barrier()
        return sorted(shm_leftovers())


def test_no_name_exists_while_a_communicator_is_in_use() -> None:
    before = shm_leftovers()
    for names in results(run_processes(2, names_are_gone_while_in_use)):
        assert set(names) <= before


def loses_a_rank(store: Any, rank: int, world_size: int, how: str, symmetric: bool) -> dict[str, Any]:
    plane = start(store, rank, world_size, timeout=TIMEOUT_S, startup_timeout=20)
    tp = plane.communicator("tp")
    x = (tp.empty(300_000, dtype=torch.float32) if symmetric else torch.empty(300_000)).fill_(1.0)
    for i in range(1_000_000):
        if rank == 1 and i == 50:
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        began = time.monotonic()
        try:
            tp.all_reduce_(x)
        except errors.PeerError as error:
            waited = time.monotonic() - began
            began = time.monotonic()
            with pytest.raises(errors.PeerError, match="poisoned"):
                tp.all_reduce_(x)
            again = time.monotonic() - began
            plane.close()
            return {"missing": list(error.missing_ranks), "text": str(error), "waited": waited, "again": again}
    return {}


@pytest.mark.parametrize(("how", "symmetric"), [("kill", False), ("kill", True), ("stop", False)])
def test_a_rank_lost_in_an_all_reduce_is_named_by_every_survivor(how: str, symmetric: bool) -> None:
    outcomes = run_processes(3, loses_a_rank, how, symmetric, timeout=TIMEOUT_S + 12)
    assert outcomes[1].returncode == (-signal.SIGKILL if how == "kill" else None), outcomes[1].output
    for survivor in (outcomes[0], outcomes[2]):
        assert survivor.error is None, survivor.output
        said = survivor.result
        # Also where another survivor reached its deadline first and gave up: the lost rank is named, not the survivor.
        assert said["missing"] == [1] and "all_reduce" in said["text"], said
        assert said["waited"] < TIMEOUT_S + 5 and said["again"] < 1.0


def leaves_by_an_exception(store: Any, rank: int, world_size: int) -> dict[str, Any]:
    began = 0.0
    try:
        with start(store, rank, world_size, timeout=20) as plane:
            tp = plane.communicator("tp")
            tp.barrier()
            began = time.monotonic()
            if rank == 1:
                raise ValueError("user code fails here")
            tp.all_reduce(torch.ones(3))
    except (errors.PeerError, ValueError) as error:
        return {"kind": type(error).__name__, "text": str(error), "waited": time.monotonic() - began}
    return {}


def test_an_exception_in_user_code_reaches_waiting_ranks_at_once() -> None:
    said = results(run_processes(2, leaves_by_an_exception))
    assert said[1]["kind"] == "ValueError"
    assert said[0]["kind"] == "PeerError" and "rank 1 gave up" in said[0]["text"]
    assert said[0]["waited"] < 10  # of a deadline of 20 s


def two_hosts(store: Any, rank: int, world_size: int, wanted: list[str]) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with start(store, rank, world_size, backends=wanted) as plane:
            everyone = plane.communicator("tp")
            inside = plane.communicator("tp_host", [0, 1] if rank < 2 else [2, 3])
            return {
                "hosts": [list(h) for h in plane.facts.hosts(range(world_size))],
                "all": list(everyone.plan.backends),
                "reason": everyone.plan.candidates[-1].reason,
                "inside": list(inside.plan.backends),
                "sums": [everyone.all_reduce(torch.ones(1)).item(), inside.all_reduce(torch.ones(1)).item()],
                "digest": everyone.plan.digest,
                "warnings": [str(w.message) for w in caught if issubclass(w.category, errors.CommplaneWarning)],
            }


def may_unshare() -> bool:
    """Whether this user may make a mount namespace with a /dev/shm of its own: root, or a container that allows it."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*own_shm("16m"), "true"], capture_output=True, check=False).returncode == 0


def own_shm(size: str) -> list[str]:
    """A command prefix: run in a mount namespace whose /dev/shm is private and of `size`."""
    return ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"', "sh"]


needs_namespaces = pytest.mark.skipif(not may_unshare(), reason="wants the right to create mount namespaces (root)")


def check_two_hosts(outcomes: Sequence[Outcome], wanted: list[str]) -> None:
    said = results(outcomes)
    assert len({s["digest"] for s in said}) == 1
    for s in said:
        assert s["hosts"] == [[0, 1], [2, 3]]
        assert s["all"] == ["torch"] and s["inside"] == ["custom_ar", "torch"]
        assert "spans hosts" in s["reason"] and "ranks 0, 1 on" in s["reason"] and "ranks 2, 3 on" in s["reason"]
        assert s["sums"] == [4.0, 2.0]
    told = [s["warnings"] for s in said]
    if wanted:  # one warning in the whole group, naming group, hosts and reason
        assert [len(t) for t in told] == [1, 0, 0, 0]
        assert "'tp' over [0, 1, 2, 3]" in told[0][0] and "ranks 2, 3 on" in told[0][0] and "spans hosts" in told[0][0]
    else:
        assert told == [[], [], [], []]


@pytest.mark.parametrize("wanted", [[], ["custom_ar"]])
def test_ranks_held_apart_by_a_fact_do_not_share_memory(wanted: list[str]) -> None:
    apart = {"COMMPLANE_HOST_ALIAS": "other"}
    check_two_hosts(run_processes(4, two_hosts, wanted, env=lambda rank: apart if rank > 1 else {}), wanted)


def shares_shm_with_nobody(store: Any, rank: int, world_size: int) -> dict[str, Any]:
    with start(store, rank, world_size) as plane:
        tp = plane.communicator("tp")
        return {
            "hosts": [list(h) for h in plane.facts.hosts(range(world_size))],
            "names": len({f.host for f in plane.facts.values()}),
            "backends": list(tp.plan.backends),
            "sum": tp.all_reduce(torch.ones(1)).item(),
        }


@needs_namespaces
def test_one_host_name_with_two_shared_memories_counts_as_two_hosts() -> None:
    def command(rank: int) -> list[str]:
        return [*(own_shm("64m") if rank == 1 else []), sys.executable]

    said = results(run_processes(2, shares_shm_with_nobody, command=command))
    assert said == [{"hosts": [[0], [1]], "names": 1, "backends": ["torch"], "sum": 2.0}] * 2


def tiny_shm(store: Any, rank: int, world_size: int) -> dict[str, Any]:
    with start(store, rank, world_size, custom_ar={"chunk_bytes": 65536}) as plane:
        tp = plane.communicator("tp")
        out = {"backends": list(tp.plan.backends), "reason": tp.plan.candidates[0].reason}
        if "custom_ar" in tp.plan.backends:
            with pytest.raises(errors.CommunicatorError, match=r"empty failed and was rolled back on all ranks.*ENOSPC"):
                tp.empty(64 << 20, dtype=torch.float32)
        out["sum"] = tp.all_reduce(torch.ones(100_000))[-1].item()
        return out


@needs_namespaces
@pytest.mark.parametrize(("size", "fits"), [("100k", False), ("4m", True)])
def test_a_full_shared_memory_is_a_joint_refusal_and_never_a_bus_error(size: str, fits: bool, tmp_path: Any) -> None:
    # Both ranks have to be in one namespace: a helper process makes it and starts them.
    script = tmp_path / "in_namespace.py"
    script.write_text(
        "import json, sys\n"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "import test_backend_faults as t\n"
        "print(json.dumps(t.results(t.run_processes(2, t.tiny_shm))))\n"
    )
    out = subprocess.run([*own_shm(size), sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    if fits:
        assert '"backends": ["custom_ar", "torch"]' in out.stdout
    else:
        assert '"backends": ["torch"]' in out.stdout and "ENOSPC" in out.stdout
    assert out.stdout.count('"sum": 2.0') == 2


def oversubscribed(store: Any, rank: int, world_size: int) -> float:
    with start(store, rank, world_size) as plane:
        assert plane.facts.oversubscribed(range(world_size))
        tp = plane.communicator("tp")
        for _ in range(2000):
            last = tp.all_reduce(torch.ones(100))
        return last[0].item()


def test_more_ranks_than_cores_still_move() -> None:
    one_core = {min(os.sched_getaffinity(0))}
    taskset = shutil.which("taskset")
    if taskset is None:
        pytest.skip("wants taskset (util-linux) to give all ranks the same core")
    command = [taskset, "-c", str(next(iter(one_core))), sys.executable]
    assert results(run_processes(3, oversubscribed, command=lambda _rank: command)) == [3.0] * 3


def exits_with_a_live_tensor(store: Any, rank: int, world_size: int) -> None:
    import atexit

    keep: list[torch.Tensor] = []
    atexit.register(lambda: print("at exit", keep[0].sum().item(), flush=True))
    plane = start(store, rank, world_size)
    keep.append(plane.communicator("tp").empty(1000, dtype=torch.float32).fill_(2.0))
    plane.close()


def test_a_symmetric_tensor_may_be_used_while_the_interpreter_exits() -> None:
    for o in run_processes(2, exits_with_a_live_tensor):
        assert o.returncode == 0 and "at exit 2000.0" in o.output, o.output


def forks(store: Any, rank: int, world_size: int) -> list[Any]:
    with start(store, rank, world_size, timeout=10) as plane:
        tp = plane.communicator("tp")
        tp.all_reduce(torch.ones(1))
        child = os.fork()
        if child == 0:
            try:
                tp.all_reduce(torch.ones(1))
            except errors.CommunicatorError as error:
                plane.close()
                os._exit(0 if "belongs to the parent" in str(error) else 1)
            os._exit(2)
        _, status = os.waitpid(child, 0)
        return [os.waitstatus_to_exitcode(status), tp.all_reduce(torch.ones(1)).item()]


def test_a_forked_child_may_not_use_the_communicator_and_does_the_parent_no_harm() -> None:
    assert results(run_processes(2, forks)) == [[0, 2.0]] * 2


def refused_where_warnings_are_errors(store: Any, rank: int, world_size: int) -> list[str]:
    warnings.simplefilter("error", errors.CommplaneWarning)
    with start(store, rank, world_size, backends=["custom_ar"], timeout=20) as plane:
        try:
            plane.communicator("tp")
        except (errors.CommplaneWarning, errors.AgreementError) as error:
            return [type(error).__name__, str(error), str(len(plane.communicators))]
    return []


def test_where_warnings_are_errors_a_refusal_is_one_on_all_ranks() -> None:
    apart = {"COMMPLANE_HOST_ALIAS": "other"}
    said = results(run_processes(2, refused_where_warnings_are_errors, env=lambda rank: apart if rank else {}))
    assert said[0][0] == "CommplaneWarning" and said[1][0] == "PeerFailed", said
    assert all("spans hosts" in s[1] and s[2] == "0" for s in said)
