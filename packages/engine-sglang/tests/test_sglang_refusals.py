"""What the adapter says of an SGLang that it does not know, before it touches anything; and how ranks vote on it."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from commplane.errors import CaptureError, PluginCompatibilityError, UnsupportedOperation
from commplane_sglang import register
from commplane_sglang.plugin import _hooks, _not_applied, create, destroy, groups
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


@pytest.mark.parametrize("given", [((), {"recovered_rank": True}), (("tp", True), {}), (("tp", False), {"rank_offset": 4})])
def test_a_rank_that_joins_a_running_job_is_refused(given):
    def made(self, group_name=None, recovered_rank=False, rank_offset=0):
        raise AssertionError("the group was made")

    args, kwargs = given
    with pytest.raises(UnsupportedOperation, match="wanted all ranks to start together"):
        create(made, None, *args, **kwargs)


@pytest.mark.parametrize("why", ["of another version", "wants repeatable sums"])
def test_a_rank_that_joins_a_job_which_goes_on_without_the_adapter_gets_its_group_and_waits_for_no_vote(why, monkeypatch):
    made = []

    def make(self, group_name=None, recovered_rank=False, rank_offset=0):
        made.append((group_name, recovered_rank))

    def attach(group):
        raise AssertionError("voted alone")

    monkeypatch.setattr(groups, "attach", attach)
    if why == "of another version":
        monkeypatch.setattr(groups, "problem", "commplane-sglang does not touch sglang")
    else:
        monkeypatch.setenv(ENGINE.repeatable, "1")
    create(make, None, "tp", recovered_rank=True)
    assert made == [("tp", True)]


@pytest.mark.parametrize("skipped", ["graph_capture", "destroy"])
def test_a_hook_that_sglang_could_not_apply_is_found(engine, skipped):
    engine(
        "srt/plugins/hook_registry.py",
        "for hook in cls._hooks[target]:",
        f'for hook in cls._hooks[target] * (name != "{skipped}"):',
    )
    register()
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.apply_hooks()
    text = _not_applied(GroupCoordinator, _hooks())
    assert text is not None and text.startswith(f"wanted hooks on GroupCoordinator.{skipped}, found that they are not there")


def test_sglang_destroys_its_group_also_where_ours_cannot_close(monkeypatch):
    def refuse(group):
        raise CaptureError("close inside a capture: do it after")

    monkeypatch.setattr(groups, "detach", refuse)
    destroyed = []
    with pytest.raises(CaptureError):
        destroy(destroyed.append, "tp")
    assert destroyed == ["tp"]
