"""Where the store under test keeps its pages in one test: a fresh folder, a fresh namespace."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commplane.api import PageStore, StoreContext
from commplane_conformance.provider import StoreSubject

__all__ = ["FOLDER", "Place"]

FOLDER = "{tmp}"
"""In an option's value: a folder of the test's own."""


@dataclass
class Place:
    """Opens stores that find each other's pages; each that is still open at the end of the test is closed.

    Attributes:
        folder: what `FOLDER` stands for.
        page_bytes: of the pages of most tests: odd, so that nothing can count on alignment.
    """

    subject: StoreSubject
    folder: Path
    namespace: str = field(default_factory=lambda: f"conformance {secrets.token_hex(8)}")
    page_bytes: int = 5003
    timeout: float = 20.0
    opened: list[PageStore] = field(default_factory=list)

    def options(self, **more: Any) -> dict[str, Any]:
        """Those of the command line, with the folder in them."""
        filled: dict[str, Any] = {key: _fill(value, str(self.folder)) for key, value in self.subject.options.items()}
        return {**filled, **more}

    @property
    def is_in_folder(self) -> bool:
        """Whether the store keeps its pages in the folder."""
        return self.options() != dict(self.subject.options)

    def context(self, namespace: str = "", page_bytes: int = 0, **more: Any) -> StoreContext:
        """What a store is opened with."""
        return StoreContext(page_bytes or self.page_bytes, namespace or self.namespace, self.timeout, self.options(**more))

    def open(self, namespace: str = "", page_bytes: int = 0) -> PageStore:
        """A store that is open."""
        store = self.subject.make()
        store.open(self.context(namespace, page_bytes))
        self.opened.append(store)
        return store

    def writer(self, seed: str, count: int, batch: int, page_bytes: int) -> subprocess.Popen[str]:
        """A process that puts pages of ``keys_of(seed, count)`` and prints how many are acknowledged, after each batch.

        It stays until it is killed, or its standard input ends.
        """
        asked = {
            "factory": self.subject.spec.factory,
            "namespace": self.namespace,
            "options": self.options(),
            "page_bytes": page_bytes,
            "timeout": self.timeout,
            "seed": seed,
            "count": count,
            "batch": batch,
        }
        command = [sys.executable, "-m", "commplane_conformance.pages.writer", json.dumps(asked)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def files(self) -> Iterator[Path]:
        """All regular files of the folder."""
        return (path for path in sorted(self.folder.rglob("*")) if path.is_file())

    def close(self) -> None:
        """Close what is open."""
        for store in self.opened:
            store.close()
        self.opened.clear()


def _fill(value: Any, folder: str) -> Any:
    if isinstance(value, str):
        return value.replace(FOLDER, folder)
    if isinstance(value, dict):
        return {key: _fill(inner, folder) for key, inner in value.items()}
    return value
