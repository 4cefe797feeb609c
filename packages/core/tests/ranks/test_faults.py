"""One rank fails: every rank ends on the same next backend, or every rank raises. On real processes."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import faulty
import pytest
import torch

import commplane
from commplane import errors
from commplane.testing import Outcome, run_processes, shm_leftovers

# Long enough for a loaded two-core machine, short enough to sit out.
TIMEOUT_S = 4.0


@pytest.fixture(autouse=True)
def shared_memory_is_left_as_it_was() -> Any:
    before = shm_leftovers()
    yield
    assert shm_leftovers() <= before


def results(outcomes: list[Outcome]) -> list[Any]:
    for o in outcomes:
        assert o.error is None and o.returncode == 0, o.output
    return [o.result for o in outcomes]


def joins_after(store: Any, rank: int, world_size: int, stage: str, how: str) -> dict[str, Any]:
    faulty.FAULT = faulty.Fault(stage, how, 1)
    config = {"timeout": 20, "startup_timeout": 2}
    with commplane.init(store=store, rank=rank, world_size=world_size, plugins=faulty.host(), config=config) as plane:
        tp = plane.communicator("tp")
        value = tp.all_reduce(torch.full((3,), float(rank + 1)))
        left_out = next(c for c in tp.plan.candidates if c.name == faulty.NAME)
        return {
            "backends": list(tp.plan.backends),
            "digest": tp.plan.digest,
            "state": left_out.state,
            "reason": left_out.reason,
            "value": value.tolist(),
        }


@pytest.mark.parametrize(
    ("stage", "how", "state", "words"),
    [
        ("probe", "refuse", "probe", "injected refusal"),
        ("probe", "raise", "probe", "injected into probe"),
        ("probe", "stall", "probe", "did not finish"),
        ("open", "raise", "build", "injected into open"),
        pytest.param("open", "stall", "build", "did not finish", marks=pytest.mark.long),
        ("canary", "raise", "canary", "injected into canary"),
        pytest.param("canary", "stall", "canary", "did not finish", marks=pytest.mark.long),
        ("canary", "wrong", "canary", "is wrong: element"),
    ],
)
def test_a_backend_that_fails_on_one_rank_is_left_out_on_all(stage: str, how: str, state: str, words: str) -> None:
    said = results(run_processes(2, joins_after, stage, how))
    assert said[0] == said[1]
    assert said[0]["backends"] == ["torch"]
    assert said[0]["state"] == state
    assert words in said[0]["reason"] and re.search(r"ranks? (0, )?1", said[0]["reason"])
    assert said[0]["value"] == [3.0, 3.0, 3.0]


def works_without_faults(store: Any, rank: int, world_size: int) -> list[str]:
    with commplane.init(store=store, rank=rank, world_size=world_size, plugins=faulty.host()) as plane:
        return list(plane.communicator("tp").plan.backends)


def test_without_a_fault_the_backend_is_in_the_plan() -> None:
    assert results(run_processes(2, works_without_faults)) == [["faulty", "torch"]] * 2


class TorchCannotOpen:
    """Site plugin whose wrapper around every backend of rank 1 raises."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    @commplane.hookimpl(tryfirst=True)
    def commplane_build_communicator(self, spec: Any, context: Any) -> None:
        if context.rank == 1:
            raise RuntimeError("this rank builds nothing")


def nothing_is_left(store: Any, rank: int, world_size: int) -> None:
    host = faulty.host()
    host.register(TorchCannotOpen(rank), "site")
    commplane.init(store=store, rank=rank, world_size=world_size, plugins=host).communicator("tp")


def test_when_no_backend_is_left_all_ranks_raise_with_every_reason() -> None:
    outcomes = run_processes(2, nothing_is_left)
    assert [o.error for o in outcomes] == ["SelectionError"] * 2, [o.output for o in outcomes]
    assert outcomes[0].message == outcomes[1].message
    assert "faulty (build)" in outcomes[0].message and "torch (build)" in outcomes[0].message
    assert "rank 1: RuntimeError: this rank builds nothing" in outcomes[0].message


def with_version(store: Any, rank: int, world_size: int, versions: list[str]) -> None:
    commplane.init(store=store, rank=rank, world_size=world_size, plugins=faulty.host(version=versions[rank]))


def with_config(store: Any, rank: int, world_size: int, configs: list[dict[str, Any]]) -> None:
    commplane.init(store=store, rank=rank, world_size=world_size, plugins=faulty.host(), config=configs[rank])


def without_plugin(store: Any, rank: int, world_size: int) -> None:
    plugins = faulty.host() if rank == 0 else faulty.PluginHost()
    commplane.init(store=store, rank=rank, world_size=world_size, plugins=plugins)


def same_error_everywhere(outcomes: list[Outcome], kind: type[Exception]) -> str:
    assert [o.error for o in outcomes] == [kind.__name__] * len(outcomes), [o.output for o in outcomes]
    assert len({o.message for o in outcomes}) == 1, [o.message for o in outcomes]
    return outcomes[0].message


def test_ranks_with_different_plugin_versions_raise_one_error() -> None:
    text = same_error_everywhere(run_processes(2, with_version, ["1.0", "1.1"]), errors.AgreementError)
    assert "rank 0 has faulty='faulty-wheel 1.0'" in text and "rank 1 has faulty='faulty-wheel 1.1'" in text


def test_ranks_with_different_settings_raise_one_error_with_the_difference_only() -> None:
    outcomes = run_processes(2, with_config, [{"timeout": 5}, {"timeout": 6}])
    text = same_error_everywhere(outcomes, errors.AgreementError)
    assert "rank 0 has timeout=5.0" in text and "rank 1 has timeout=6.0" in text and "numerics" not in text


def test_a_plugin_that_is_missing_on_one_rank_is_an_error_on_all() -> None:
    text = same_error_everywhere(run_processes(2, without_plugin), errors.AgreementError)
    assert "rank 1 has faulty='nothing'" in text


def with_ranks(store: Any, rank: int, world_size: int, names: list[str], lists: list[list[int]]) -> None:
    config = {"timeout": 15}
    plane = commplane.init(store=store, rank=rank, world_size=world_size, plugins=faulty.PluginHost(), config=config)
    plane.communicator(names[rank], lists[rank])


@pytest.mark.parametrize(
    ("names", "lists"),
    [
        (["tp", "tp"], [[0, 1], [1, 0]]),
        (["tp", "ep"], [[0, 1], [0, 1]]),
        (["tp", "tp", "tp"], [[0, 1, 2], [0, 1, 2], [2, 1]]),
    ],
)
def test_ranks_with_different_rank_lists_raise_at_once_with_both_lists(names: list[str], lists: list[list[int]]) -> None:
    began = time.monotonic()
    outcomes = run_processes(len(names), with_ranks, names, lists)
    assert [o.error for o in outcomes] == ["AgreementError"] * len(names), [o.output for o in outcomes]
    for o in outcomes:
        assert f"{names[0]!r} over {lists[0]}" in o.message or f"over {lists[-1]}" in o.message
        assert "every rank must create the same communicators in the same order" in o.message
    assert time.monotonic() - began < 15 + 30  # it did not take the deadline of 15 s, start-up of processes included


def asks_by_name_for_nothing(store: Any, rank: int, world_size: int) -> None:
    config = {"backends": "nosuch"} if rank == 0 else {}
    commplane.init(store=store, rank=rank, world_size=world_size, plugins=faulty.PluginHost(), config=config)


def test_a_rank_that_fails_alone_before_the_first_round_is_heard_by_the_others() -> None:
    outcomes = run_processes(2, asks_by_name_for_nothing)
    assert outcomes[0].error == "PluginNotFound"
    assert outcomes[1].error == "AgreementError" and "no installed wheel provides backend 'nosuch'" in outcomes[1].message


def killed_in(store: Any, rank: int, world_size: int, where: str) -> dict[str, Any]:
    config = {"timeout": TIMEOUT_S}
    if where == "open":
        faulty.FAULT = faulty.Fault("open", "kill", 1)
    if where == "init" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        plane = commplane.init(store=store, rank=rank, world_size=world_size, plugins=faulty.host(), config=config)
        backends = ["torch"] if where == "all_reduce" else None
        tp = plane.communicator("tp", backends=backends)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        tp.all_reduce(torch.ones(1000))
    except errors.PeerError as error:
        said = {"missing": list(error.missing_ranks), "text": str(error)}
        if where == "all_reduce":
            with pytest.raises(errors.PeerError, match="poisoned"):
                tp.all_reduce(torch.ones(1))
            plane.close()
        return said
    return {"missing": None, "text": "nothing was raised"}


@pytest.mark.parametrize("where", [pytest.param("init", marks=pytest.mark.long), "open", "all_reduce"])
def test_survivors_of_a_kill_raise_peer_error_naming_the_rank(where: str) -> None:
    outcomes = run_processes(3, killed_in, where)
    assert outcomes[1].returncode == -signal.SIGKILL
    for survivor in (outcomes[0], outcomes[2]):
        assert survivor.error is None, survivor.output
        assert survivor.result["missing"] == [1], survivor.result


def stalls(store: Any, rank: int, world_size: int) -> dict[str, Any]:
    config = {"timeout": TIMEOUT_S}
    plane = commplane.init(store=store, rank=rank, world_size=world_size, plugins=faulty.PluginHost(), config=config)
    if rank == 1:
        store.wait(["rank 0 has given up"])  # alive, and never where it is waited for
        return {}
    with pytest.raises(errors.PeerError) as caught:
        plane.communicator("tp", [0, 1])
    store.set("rank 0 has given up", "1")
    return {"missing": list(caught.value.missing_ranks), "text": str(caught.value)}


def test_a_rank_that_never_comes_is_named_with_what_it_did_last() -> None:
    said = results(run_processes(2, stalls))
    assert said[0]["missing"] == [1] and "rank 1 last: is up" in said[0]["text"]
    assert "COMMPLANE_TIMEOUT" in said[0]["text"]


def test_this_file_is_loaded_by_path_in_ranks() -> None:
    # run_processes loads it under another name: the functions above must not depend on pytest's own import of it.
    assert Path(__file__).name == "test_faults.py"
