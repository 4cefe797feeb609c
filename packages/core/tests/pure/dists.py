"""Distributions of a test's own: real metadata folders and modules on ``sys.path``, as an installer leaves them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from commplane.config import Config
from commplane.plugins import PluginHost, find_candidates

__all__ = ["Wheels", "register", "spec"]


class Wheels:
    """Folders on ``sys.path`` with distributions in them, as an installer would leave them."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root = root
        self._monkeypatch = monkeypatch
        self._modules: set[str] = set()
        self.folders: list[Path] = []

    def folder(self, name: str = "site") -> Path:
        """A folder of that name, on ``sys.path``."""
        path = self._root / name
        if path not in self.folders:
            path.mkdir()
            self._monkeypatch.syspath_prepend(str(path))
            self.folders.append(path)
        return path

    def add(
        self,
        dist: str,
        plugins: Mapping[str, str] | None = None,
        *,
        version: str = "1.0",
        requires: Sequence[str] = (),
        folder: str = "site",
    ) -> Path:
        """Write the metadata of one distribution; `plugins` are entry points (name -> module)."""
        info = self.folder(folder) / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = [
            "Metadata-Version: 2.1",
            f"Name: {dist}",
            f"Version: {version}",
            *(f"Requires-Dist: {r}" for r in requires),
        ]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        if plugins:
            entries = "".join(f"{name} = {value}\n" for name, value in plugins.items())
            (info / "entry_points.txt").write_text(f"[commplane.plugins]\n{entries}")
        importlib.invalidate_caches()
        return info

    def module(self, name: str, source: str, folder: str = "site") -> None:
        """Write a module that the entry points can name."""
        (self.folder(folder) / f"{name}.py").write_text(source)
        self._modules.add(name)
        importlib.invalidate_caches()

    def backend(self, dist: str, *names: str, plugin: str = "", version: str = "1.0", requires: Sequence[str] = ()) -> None:
        """A distribution with one plugin, by default named like its first backend, that registers backends `names`."""
        plugin = plugin or names[0]
        module = f"plugin_of_{dist.replace('-', '_')}"
        self.module(module, register(*(spec(name) for name in names)))
        self.add(dist, {plugin: module}, version=version, requires=requires)

    def discover(self, argument: Mapping[str, Any] | None = None) -> PluginHost:
        """Load what these folders hold and nothing else that the machine has."""
        return PluginHost.discover(Config.load(argument, environ={}), candidates=find_candidates(self.folders))

    def forget(self) -> None:
        """Drop the modules, so that another test may write others of the same name."""
        for name in self._modules:
            sys.modules.pop(name, None)


def spec(name: str, api: str = "(1, 0)", more: str = "") -> str:
    """Source of a `BackendSpec`."""
    return (
        f"BackendSpec(name={name!r}, api={api}, factory='m:C', probe='m:p', capabilities={{'all_reduce'}}, "
        f"dtypes={{'float32'}}, device='cpu', {more})"
    )


def register(*specs: str) -> str:
    """Source of a plugin module that registers `specs`."""
    return (
        "from commplane.api import BackendSpec, hookimpl\n\n\n"
        f"@hookimpl\ndef commplane_register_comm_backends():\n    return [{', '.join(specs)}]\n"
    )
