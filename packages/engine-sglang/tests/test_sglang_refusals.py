"""What the adapter says of an SGLang that it does not know, before it touches anything; and how ranks vote on it."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Thread

import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore

from commplane.engines.vote import active, vote
from commplane.errors import AgreementError, PeerError, PluginCompatibilityError, UnsupportedOperation
from commplane_sglang import register
from commplane_sglang.plugin import create, groups
from commplane_sglang.seams import ENGINE

STANDIN = Path(__file__).parent / "sglang_standin"
STATE = "srt/distributed/parallel_state.py"
RUNNER = "srt/model_executor/runner/base_runner.py"


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """An engine on the path that a test may change: `engine(file, was, becomes)`, and its version with `engine(version=...)`."""
    for name in [m for m in sys.modules if m.partition(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(groups, "problem", None)
    shutil.copytree(STANDIN, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(str(tmp_path))

    def change(file=STATE, was="", becomes="", version=None):
        if version is not None:
            metadata = tmp_path / "sglang-0.5.23.dist-info" / "METADATA"
            metadata.write_text(metadata.read_text().replace("Version: 0.5.23", f"Version: {version}"))
            return
        path = tmp_path / "sglang" / file
        assert was in path.read_text()
        path.write_text(path.read_text().replace(was, becomes))

    yield change
    for name in [m for m in sys.modules if m.partition(".")[0] == "sglang"]:
        sys.modules.pop(name)


def test_an_engine_as_it_is_known_is_no_problem(engine):
    assert ENGINE.problem() is None


@pytest.mark.parametrize("version", ["0.5.20", "0.5.24", "0.6.0rc1", "not-a-version"])
def test_another_version_is_refused_with_wanted_found_and_what_to_do(engine, version):
    engine(version=version)
    assert ENGINE.problem() == (
        f"commplane-sglang 0.1.0 does not touch sglang: wanted sglang>=0.5.21,<0.5.24, found {version}: "
        "install a commplane-sglang that was made for this sglang (pip install --upgrade commplane-sglang), "
        "or start without it (SGLANG_PLUGINS with the names of the plugins that are wanted)"
    )


def test_a_local_version_of_a_known_one_is_no_problem(engine):
    engine(version="0.5.23.post1+cu130")
    assert ENGINE.problem() is None


@pytest.mark.parametrize(
    ("file", "was", "becomes", "text"),
    [
        (
            STATE,
            "def destroy(",
            "def close(",
            "wanted GroupCoordinator.destroy(self) in sglang.srt.distributed.parallel_state, found nothing",
        ),
        (
            STATE,
            "def all_reduce(self, input_)",
            "def all_reduce(self, input_, op)",
            "found GroupCoordinator.all_reduce(self, input_, op)",
        ),
        (
            STATE,
            "graph_capture_context=None, stream=None",
            "*, stream=None",
            "found GroupCoordinator.graph_capture(self, stream)",
        ),
        (STATE, "recovered_rank=False,", "", "wanted GroupCoordinator.__init__(self, group_ranks, torch_distributed_backend"),
        (
            STATE,
            "self.unique_name =",
            "name =",
            "wanted GroupCoordinator.__init__ in sglang.srt.distributed.parallel_state to set self.unique_name",
        ),
        (STATE, "class GroupCoordinator", "class Coordinator", "found nothing of that name"),
        (RUNNER, "class BaseRunner", "class Runner", "wanted BaseRunner._pre_initialize_flashinfer_allreduce_workspace(self)"),
        ("srt/plugins/hook_registry.py", "hook_type=", "kind=", "found HookRegistry.register(cls, target, hook, kind, source)"),
    ],
    ids=["renamed", "one-more", "keyword-only", "one-less", "not-set", "class-renamed", "runner", "registry"],
)
def test_what_is_hooked_must_be_as_it_was(engine, file, was, becomes, text):
    engine(file, was, becomes)
    problem = ENGINE.problem()
    assert problem is not None and text in problem
    assert "wanted sglang>=" not in problem  # the version is right


def test_all_that_is_wrong_is_said_at_once(engine):
    engine(version="0.7.0")
    engine(STATE, "def destroy(", "def close(")
    shutil.rmtree(Path(sys.path[0]) / "sglang" / "srt" / "model_executor")
    problem = ENGINE.problem()
    assert problem is not None
    assert problem.count("; wanted") == 2 and problem.count(": wanted") == 1  # the version, the method, the runner
    assert "found no source of that module" in problem


def test_where_no_engine_is_installed_that_is_what_is_said():
    problem = replace(ENGINE, name="sglang-of-nobody").problem()
    assert problem is not None and "wanted sglang-of-nobody>=0.5.21,<0.5.24, found none installed: install" in problem


def test_a_refusal_hooks_nothing_but_the_creation_of_groups(engine):
    engine(STATE, "def destroy(", "def close(")
    with pytest.raises(PluginCompatibilityError, match=r"wanted GroupCoordinator\.destroy\(self\)"):
        register()
    from sglang.srt.plugins.hook_registry import HookRegistry

    assert list(HookRegistry._hooks) == ["sglang.srt.distributed.parallel_state.GroupCoordinator.__init__"]


def test_without_sglangs_registry_nothing_is_hooked(engine):
    engine("srt/plugins/hook_registry.py", "def register(", "def add(")
    with pytest.raises(PluginCompatibilityError, match=r"wanted HookRegistry\.register"):
        register()
    from sglang.srt.plugins.hook_registry import HookRegistry

    assert not HookRegistry._hooks


def test_a_rank_that_joins_a_running_job_is_refused():
    with pytest.raises(UnsupportedOperation, match="wanted all ranks to start together"):
        create(lambda *a, **k: None, None, recovered_rank=True)


# The vote.

READY = {"adapter": "commplane-sglang 0.1.0", "engine": "sglang 0.5.23", "problem": None}


def voters(store, ballots, timeout, late=()):
    """The outcome of each rank, as threads; those of `late` vote when the others have given up."""
    said = {}

    def one(rank):
        try:
            said[rank] = vote(
                store(), rank, len(ballots), ballots[rank], timeout, f"[adapter rank {rank}/{len(ballots)}]", "do it"
            )
        except PeerError as error:
            said[rank] = error

    for ranks in ([r for r in range(len(ballots)) if ballots[r] is not None and r not in late], late):
        threads = [Thread(target=one, args=(r,)) for r in ranks]
        for t in threads:
            t.start()
        for t in threads:
            t.join(30)
    return said


@pytest.mark.timeout(60)
def test_every_rank_gets_all_ballots():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ballots = [{**READY, "adapter": f"of rank {r}"} for r in range(4)]
    said = voters(lambda: PrefixStore("v", TCPStore("127.0.0.1", server.port)), ballots, 20)
    assert said == dict.fromkeys(range(4), ballots)


@pytest.mark.timeout(60)
def test_all_ranks_name_the_missing_one_and_one_that_comes_late_learns_that_it_was():
    store = HashStore()
    said = voters(lambda: store, [READY, None, READY, READY], 0.3, late=[3])
    assert sorted(said) == [0, 2, 3]
    for rank, error in said.items():
        assert isinstance(error, PeerError) and error.missing_ranks == (1, 3)
        assert str(error) == (
            f"[adapter rank {rank}/4] vote: wanted the adapter on all 4 ranks, found no answer from rank 1, 3 within 0.3 s: do it"
        )


@pytest.mark.timeout(60)
def test_a_store_that_is_gone_is_an_error_and_no_wait():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    client = TCPStore("127.0.0.1", server.port, timeout=timedelta(seconds=5))
    del server
    with pytest.raises(PeerError, match="wanted the store of the default group, found that it is gone"):
        vote(client, 0, 2, READY, 20, "[adapter rank 0/2]", "do it")


def test_the_adapter_works_on_all_ranks_or_on_none():
    refusing = {**READY, "problem": "wanted a, found b"}
    assert active([READY] * 3, "w", "f")
    assert not active([refusing, {**refusing, "problem": "wanted c, found d"}], "w", "f")
    with pytest.raises(AgreementError) as some:
        active([READY, refusing, READY], "[w]", "do it")
    assert str(some.value) == (
        "[w] vote: wanted the same adapter at work on all ranks, found rank 0, 2: commplane-sglang 0.1.0 for sglang 0.5.23; "
        "rank 1: wanted a, found b: do it"
    )
    with pytest.raises(AgreementError, match=r"rank 1: commplane-sglang 0\.2\.0 for"):
        active([READY, {**READY, "adapter": "commplane-sglang 0.2.0"}], "w", "f")
    with pytest.raises(
        AgreementError, match=r"rank 0: commplane-sglang 0\.1\.0 for sglang 0\.5\.23; rank 1: .* for sglang 0\.5\.22"
    ):
        active([READY, {**READY, "engine": "sglang 0.5.22"}], "w", "f")
