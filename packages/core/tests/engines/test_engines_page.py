"""The adapter that docs/engines.md shows runs as it stands there."""

from __future__ import annotations

import importlib
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[4] / "docs" / "engines.md"

ENGINE = """
class Group:
    def __init__(self, ranks, name):
        self.unique_name, self.ranks, self.world_size, self.device = f"{name}:0", ranks, len(ranks), "cpu"

    def all_reduce(self, x):
        return x

    def capture(self):
        yield

    def destroy(self):
        pass
"""


@pytest.mark.skipif(not PAGE.exists(), reason="wants docs/engines.md: run it in a checkout")
def test_the_adapter_on_the_page_stands_in_an_engine(monkeypatch, tmp_path):
    blocks = dict(re.findall(r"```python\n# mine/(\w+)\.py[^\n]*\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    assert sorted(blocks) == ["plugin", "seams"]
    for package in ("mine", "theengine"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    for name, code in blocks.items():
        (tmp_path / "mine" / f"{name}.py").write_text(code)
    (tmp_path / "theengine" / "groups.py").write_text(ENGINE)
    metadata = (("theengine", "1.4"), ("commplane_theengine", "0.1"))
    for name, version in metadata:
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    try:
        plugin, engine = importlib.import_module("mine.plugin"), importlib.import_module("theengine.groups")
        plugin.register()
        group = engine.Group.__new__(engine.Group)
        plugin.create(engine.Group.__init__, group, [0], "tp")
        assert plugin.all_reduce(engine.Group.all_reduce, group, 5) == 5
        with plugin.capture(contextmanager(engine.Group.capture), group):
            assert not plugin.groups.capturing
        plugin.destroy(engine.Group.destroy, group)

        (tmp_path / "theengine" / "groups.py").write_text(ENGINE.replace("(self, x)", "(self, x, op)"))
        with pytest.raises(plugin.PluginCompatibilityError, match=r"wanted Group\.all_reduce\(self, x\) in theengine\.groups"):
            plugin.register()
    finally:
        for name in [m for m in sys.modules if m.partition(".")[0] in ("mine", "theengine")]:
            del sys.modules[name]
