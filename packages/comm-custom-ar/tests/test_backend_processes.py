"""What only shows between processes: hosts, forks, threads, Ctrl-C, more ranks than cores, the end of the interpreter."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from car_calls import KINDS, prepared, raised, right, start
from car_forks import Server
from car_namespaces import needs_namespaces, own_shm

from commplane import errors
from commplane.testing import Outcome, run_processes, shm_leftovers

# A deadline that no test would survive: nobody has sat it out.
NEVER = {"timeout": 600}
PATIENCE_S = 120.0


def results(outcomes: Sequence[Outcome]) -> list[Any]:
    for o in outcomes:
        assert o.error is None and o.returncode == 0, o.output
    return [o.result for o in outcomes]


def names_are_gone_while_in_use(store: Any, rank: int, world_size: int) -> list[str]:
    with start(store, rank, world_size) as plane:
        tp = plane.communicator("tp")
        buffer = tp.empty(100_000, dtype=torch.float32).fill_(1.0)
        tp.prepare("all_reduce", dtype=torch.float32, max_bytes=1 << 20)
        tp.all_reduce_(buffer)
        tp.barrier()
        return sorted(shm_leftovers())


def test_no_name_exists_while_a_communicator_is_in_use(forks: Server) -> None:
    before = shm_leftovers()
    for names in results(forks.run(2, names_are_gone_while_in_use)):
        assert set(names) <= before


def two_hosts(store: Any, rank: int, world_size: int, wanted: list[str]) -> dict[str, Any]:
    if rank > 1:
        os.environ["COMMPLANE_HOST_ALIAS"] = "other"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with start(store, rank, world_size, backends=wanted) as plane:
            everyone = plane.communicator("tp")
            inside = plane.communicator("tp_host", [0, 1] if rank < 2 else [2, 3])
            return {
                "hosts": [list(h) for h in plane.facts.hosts(range(world_size))],
                "all": list(everyone.plan.backends),
                "reason": next(c.reason for c in everyone.plan.candidates if c.name == "custom_ar"),
                "inside": list(inside.plan.backends),
                "sums": [everyone.all_reduce(torch.ones(1)).item(), inside.all_reduce(torch.ones(1)).item()],
                "digest": everyone.plan.digest,
                "warnings": [str(w.message) for w in caught if issubclass(w.category, errors.CommplaneWarning)],
            }


@pytest.mark.parametrize("wanted", [[], ["custom_ar"]])
def test_ranks_held_apart_by_a_fact_do_not_share_memory(forks: Server, wanted: list[str]) -> None:
    said = results(forks.run(4, two_hosts, wanted))
    assert len({s["digest"] for s in said}) == 1
    for s in said:
        assert s["hosts"] == [[0, 1], [2, 3]]
        assert s["all"] == (["torch"] if wanted else ["hierarchical", "torch"]) and s["inside"] == ["custom_ar", "torch"]
        assert "spans hosts" in s["reason"] and "ranks 0, 1 on" in s["reason"] and "ranks 2, 3 on" in s["reason"]
        assert s["sums"] == [4.0, 2.0]
    told = [s["warnings"] for s in said]
    if wanted:  # one warning in the whole group, naming group, hosts and reason
        assert [len(t) for t in told] == [1, 0, 0, 0]
        assert "'tp' over [0, 1, 2, 3]" in told[0][0] and "ranks 2, 3 on" in told[0][0] and "spans hosts" in told[0][0]
    else:
        assert told == [[], [], [], []]


def refused_where_warnings_are_errors(store: Any, rank: int, world_size: int) -> list[str]:
    if rank:
        os.environ["COMMPLANE_HOST_ALIAS"] = "other"
    warnings.simplefilter("error", errors.CommplaneWarning)
    with start(store, rank, world_size, backends=["custom_ar"], timeout=60) as plane:
        try:
            plane.communicator("tp")
        except (errors.CommplaneWarning, errors.AgreementError) as error:
            return [type(error).__name__, str(error), str(len(plane.communicators))]
    return []


def test_where_warnings_are_errors_a_refusal_is_one_on_all_ranks(forks: Server) -> None:
    said = results(forks.run(2, refused_where_warnings_are_errors))
    assert said[0][0] == "CommplaneWarning" and said[1][0] == "PeerFailed", said
    assert all("spans hosts" in s[1] and s[2] == "0" for s in said)


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

    said = results(run_processes(2, shares_shm_with_nobody, command=command, timeout=PATIENCE_S))
    assert said == [{"hosts": [[0], [1]], "names": 1, "backends": ["torch"], "sum": 2.0}] * 2


def oversubscribed(store: Any, rank: int, world_size: int) -> bool:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with start(store, rank, world_size) as plane:
        assert plane.facts.oversubscribed(range(world_size))
        for kind in KINDS:
            with plane.communicator(kind) as tp:
                call, wanted = prepared(tp, kind)
                assert all(right(call(), wanted) for _ in range(20)), kind
    return True


@pytest.mark.long
def test_more_ranks_than_cores_still_move(forks: Server) -> None:
    assert results(forks.run(3, oversubscribed, timeout=PATIENCE_S)) == [True] * 3


def exits_with_a_live_tensor(store: Any, rank: int, world_size: int) -> None:
    import atexit

    keep: list[torch.Tensor] = []
    atexit.register(lambda: print("at exit", keep[0].sum().item(), flush=True))
    plane = start(store, rank, world_size)
    keep.append(plane.communicator("tp").empty(1000, dtype=torch.float32).fill_(2.0))
    plane.close()


def test_a_symmetric_tensor_may_be_used_while_the_interpreter_exits() -> None:
    for o in run_processes(2, exits_with_a_live_tensor, timeout=PATIENCE_S):
        assert o.returncode == 0 and "at exit 2000.0" in o.output, o.output


def forks_a_child(store: Any, rank: int, world_size: int) -> list[Any]:
    with start(store, rank, world_size, **NEVER) as plane:
        tp = plane.communicator("tp")
        calls = {kind: prepared(tp, kind)[0] for kind in KINDS}
        child = os.fork()
        if child == 0:
            refused = [raised(call) for call in (*calls.values(), lambda: tp.prepare(max_bytes=1), lambda: tp.empty(1))]
            plane.close()
            os._exit(0 if all("belongs to the parent" in said.get("text", "") for said in refused) else 1)
        _, status = os.waitpid(child, 0)
        return [os.waitstatus_to_exitcode(status), tp.all_reduce(torch.ones(1)).item()]


def test_a_forked_child_may_not_use_the_communicator_and_does_the_parent_no_harm(forks: Server) -> None:
    assert results(forks.run(2, forks_a_child, timeout=PATIENCE_S)) == [[0, 2.0]] * 2


def calls_from_two_threads(store: Any, rank: int, world_size: int) -> list[Any]:
    """On rank 0 one thread waits in a call for rank 1, which comes when another thread has been refused."""
    with start(store, rank, world_size, **NEVER) as plane:
        tp, other = plane.communicator("tp"), plane.communicator("other")
        call, wanted = prepared(tp, "all_reduce")
        if rank == 1:
            store.get("refused")  # waits until it is there
            return [right(call(), wanted), other.all_reduce(torch.ones(1)).item()]
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(right(call(), wanted)))
        thread.start()
        while tp.backends[0].flight_records()[-1].state != "running":
            time.sleep(0.001)
        refused = [raised(prepared_call) for prepared_call in (call, lambda: tp.barrier())]
        store.set("refused", "1")
        thread.join()
        return [*answers, other.all_reduce(torch.ones(1)).item(), refused]


def test_a_second_thread_is_refused_while_the_first_goes_on(forks: Server) -> None:
    (first, summed, refused), second = results(forks.run(2, calls_from_two_threads, timeout=PATIENCE_S))
    assert (first, summed) == (True, 2.0) and second == [True, 2.0]
    for said in refused:
        assert said["error"] == "UnsupportedOperation" and "one thread at a time" in said["text"], said


def is_interrupted(store: Any, rank: int, world_size: int, kind: str) -> dict[str, Any]:
    """Rank 1 gets SIGINT while it waits for rank 0 inside the library, and rank 2 waits too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    plane = start(store, rank, world_size, **NEVER)
    tp = plane.communicator("tp", [1, 2, 0])
    call, _ = prepared(tp, kind)
    if rank == 0:
        store.get("waits")
        time.sleep(0.2)  # by now it sleeps in the library
        os.kill(plane.facts[1].pid, signal.SIGINT)
        store.get("interrupted")
        said = raised(call)
    elif rank == 1:
        store.set("waits", "1")
        try:
            call()
            said = {}
        except KeyboardInterrupt:
            said = {"error": "KeyboardInterrupt", "after": raised(call)}
        store.set("interrupted", "1")
    else:
        said = raised(call)
    plane.close()
    return said


@pytest.mark.parametrize("kind", ["all_reduce", "all_reduce_ symmetric", "broadcast", "all_reduce_rms_norm", "barrier"])
def test_ctrl_c_ends_a_wait_at_once_and_its_peers_are_told(forks: Server, kind: str) -> None:
    said = results(forks.run(3, is_interrupted, kind, timeout=PATIENCE_S))
    assert said[1]["error"] == "KeyboardInterrupt" and said[1]["after"]["error"] == "CommunicatorError", said[1]
    for peer in (said[0], said[2]):
        assert peer["error"] == "PeerError" and peer["missing"] == [1] and "rank 1 gave up" in peer["text"], peer
