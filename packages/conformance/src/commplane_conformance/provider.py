"""The transfer engine or page store under test, as its wheel declares it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from commplane.api import PageStore, PageStoreSpec, Spec, TransferEngine, TransferSpec
from commplane.config import Config
from commplane.errors import CommplaneError
from commplane.plugins import PluginHost, Registered, core_version
from commplane_conformance.subject import AnySubject

__all__ = ["EngineSubject", "ProviderSubject", "StoreSubject", "find_engine", "find_store", "load"]

_OPEN_SECONDS = 60.0


@dataclass(frozen=True)
class ProviderSubject(AnySubject):
    """What has a factory without arguments, and settings of its own.

    Attributes:
        spec: as the plugin registered it.
        dist: the distribution and its version.
        options: settings that it is opened with in every test.
        full: whether all cases are run.
    """

    kind: ClassVar[str]

    spec: TransferSpec | PageStoreSpec
    dist: str
    options: Mapping[str, Any] = field(default_factory=dict)
    full: bool = False
    ranks: tuple[int, ...] = ()

    @property
    def declaration(self) -> Spec:
        """As the plugin registered it."""
        return self.spec

    def describe(self) -> str:
        """One line for the head of a report."""
        api = ".".join(map(str, self.spec.api))
        options = "".join(f", {key}={value}" for key, value in self.options.items())
        return f"{self.kind} {self.name} from {self.dist}, {self.contract} API {api}, commplane {core_version()}{options}"

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            self.kind: self.name,
            "dist": self.dist,
            "commplane": core_version(),
            "options": dict(self.options),
            "full": self.full,
            "spec": {
                "api": list(self.spec.api),
                "factory": self.spec.factory,
                "capabilities": sorted(map(str, self.capabilities)),
            },
        }


@dataclass(frozen=True)
class EngineSubject(ProviderSubject):
    """A transfer engine."""

    folder: ClassVar[str] = "transfer"
    contract: ClassVar[str] = "transfer"
    page: ClassVar[str] = "docs/write-an-engine.md"
    kind: ClassVar[str] = "engine"

    def make(self) -> TransferEngine:
        """A new one, not open."""
        engine = load(self.spec.factory)()
        assert isinstance(engine, TransferEngine), f"{self.spec.factory} made a {type(engine).__name__}, not a TransferEngine"
        return engine


@dataclass(frozen=True)
class StoreSubject(ProviderSubject):
    """A page store."""

    folder: ClassVar[str] = "pages"
    contract: ClassVar[str] = "cache"
    page: ClassVar[str] = "docs/write-a-store.md"
    kind: ClassVar[str] = "store"

    def make(self) -> PageStore:
        """A new one, not open."""
        store = load(self.spec.factory)()
        assert isinstance(store, PageStore), f"{self.spec.factory} made a {type(store).__name__}, not a PageStore"
        return store


def load(path: str) -> Any:
    """What ``"package.module:attribute"`` names.

    Raises:
        CommplaneError: there is no such thing, or importing it failed.
    """
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise CommplaneError(f"factory {path!r} cannot be imported: {error}") from error


def _registered(kind: type[Spec], what: str, name: str) -> Registered:
    host = PluginHost.discover(Config.load({}))
    known = host.registered(kind)
    if name not in known:
        raise host.not_found(what, name, known)
    return known[name]


def find_engine(name: str, options: Mapping[str, Any], full: bool) -> EngineSubject:
    """The installed transfer engine of that name.

    Raises:
        PluginError: it is not installed or cannot be used; the text lists what there is.
        CommplaneError: it cannot be opened on this machine; the text has its reason.
    """
    found = _registered(TransferSpec, "transfer engine", name)
    assert isinstance(found.spec, TransferSpec)
    subject = EngineSubject(found.spec, f"{found.dist or found.plugin} {found.version}", dict(options), full)
    _check_opens(subject)
    return subject


def find_store(name: str, options: Mapping[str, Any], full: bool) -> StoreSubject:
    """The installed page store of that name.

    Raises:
        PluginError: it is not installed or cannot be used; the text lists what there is.
    """
    found = _registered(PageStoreSpec, "page store", name)
    assert isinstance(found.spec, PageStoreSpec)
    return StoreSubject(found.spec, f"{found.dist or found.plugin} {found.version}", dict(options), full)


def _check_opens(subject: EngineSubject) -> None:
    """In a process of its own: what a native library leaves behind there cannot bear on the tests."""
    command = [
        sys.executable,
        "-m",
        "commplane_conformance.transfer.opens",
        subject.spec.factory,
        json.dumps(dict(subject.options)),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_OPEN_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise CommplaneError(f"engine {subject.name!r} did not open within {_OPEN_SECONDS:.0f} s on this machine") from error
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
        raise CommplaneError(f"engine {subject.name!r} cannot be opened here: {said}")
