"""What the adapter says of a vLLM that it does not know, before it touches anything."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from commplane.engines import lost
from commplane.errors import CaptureError, PluginCompatibilityError
from commplane_vllm import register
from commplane_vllm.plugin import _hooks, destroy, groups
from commplane_vllm.seams import ENGINE

STANDIN = Path(__file__).parent / "vllm_standin"
HOOKED = ("__init__", "_all_reduce_out_place", "graph_capture", "destroy")


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A stand-in of a test's own, on the path; its folder."""
    for name in [m for m in sys.modules if m.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(groups, "problem", None)
    shutil.copytree(STANDIN, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [m for m in sys.modules if m.partition(".")[0] == "vllm"]:
        sys.modules.pop(name)


def test_vllm_may_load_the_adapter_again_and_again(engine):
    from vllm.distributed.parallel_state import GroupCoordinator

    before = {name: getattr(GroupCoordinator, name) for name in HOOKED}
    register()
    once = {name: getattr(GroupCoordinator, name) for name in HOOKED}
    register()
    assert {name: getattr(GroupCoordinator, name) for name in HOOKED} == once
    assert {name: hook.__wrapped__ for name, hook in once.items()} == before
    assert ENGINE.problem() is None


@pytest.mark.parametrize(
    ("file", "was", "becomes", "text"),
    [
        ("distributed/parallel_state.py", "def destroy(", "def close(", "wanted GroupCoordinator.destroy(self)"),
        (
            "distributed/parallel_state.py",
            "def _all_reduce_out_place(self, input_)",
            "def _all_reduce_out_place(self, input_, op)",
            "found GroupCoordinator._all_reduce_out_place(self, input_, op)",
        ),
        ("distributed/parallel_state.py", "self.device =", "self.place =", "to set self.device, found that it does not"),
        (
            "config/model.py",
            "def get_hidden_size",
            "def hidden_size",
            "wanted ModelConfig.get_hidden_size(self) in vllm.config.model",
        ),
    ],
    ids=["renamed", "one-more", "not-set", "config"],
)
def test_a_vllm_that_is_not_as_it_was_does_not_start_and_is_not_touched(engine, file, was, becomes, text):
    path = engine / "vllm" / file
    assert was in path.read_text()
    path.write_text(path.read_text().replace(was, becomes))
    with pytest.raises(PluginCompatibilityError) as refusal:
        register()
    assert text in str(refusal.value)
    assert "or start without it (VLLM_PLUGINS with the names of the plugins that are wanted)" in str(refusal.value)
    from vllm.distributed.parallel_state import GroupCoordinator

    assert not any(
        hasattr(getattr(GroupCoordinator, name, None), "__wrapped__") for name in ("__init__", "_all_reduce_out_place")
    )


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0"])
def test_another_version_does_not_start(engine, version):
    metadata = engine / "vllm-0.33.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 0.33.0", f"Version: {version}"))
    with pytest.raises(
        PluginCompatibilityError, match=rf"wanted vllm>=0\.32\.0,<0\.34, found {version}: install a commplane-vllm"
    ):
        register()


def test_a_hook_that_another_plugin_has_put_away_is_found(engine, monkeypatch):
    from vllm.distributed.parallel_state import GroupCoordinator

    register()
    assert lost(GroupCoordinator, _hooks()) is None
    monkeypatch.setattr(GroupCoordinator, "_all_reduce_out_place", lambda self, input_: input_)
    assert lost(GroupCoordinator, _hooks()) == (
        "wanted hooks on GroupCoordinator._all_reduce_out_place, found that they are not there"
    )


def test_vllm_destroys_its_group_also_where_ours_cannot_close(monkeypatch):
    def refuse(group):
        raise CaptureError("close inside a capture: do it after")

    monkeypatch.setattr(groups, "detach", refuse)
    destroyed = []
    with pytest.raises(CaptureError):
        destroy(destroyed.append, "tp")
    assert destroyed == ["tp"]
