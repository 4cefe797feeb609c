"""The file that ``commplane tune`` writes and the setting ``tuning`` names: timings, and the facts that they belong to.

Files of the same kind are shipped in ``commplane/tunings``, with fewer facts: the device, and how many ranks of one host have it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from commplane.config import NO_FILE
from commplane.errors import CommplaneError, ConfigError
from commplane.select import Timings

__all__ = ["Tuning", "named", "shipped"]

_VERSION = 2


@dataclass(frozen=True)
class Tuning:
    """What is in a file. `path` is where it was read."""

    facts: Mapping[str, Any]
    timings: Timings
    path: str = ""

    @classmethod
    def read(cls, path: str) -> Tuning:
        """Read a file. Local.

        Raises:
            ConfigError: there is none, or it is no such file.
        """
        who = f"tuning file {path!r} named by the setting 'tuning'"
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{who} cannot be read: {error.strerror}: write it with commplane tune --out") from error
        return cls.parse(text, path, who)

    @classmethod
    def parse(cls, text: str, path: str, who: str) -> Tuning:
        """The content of a file that lies at `path` and that errors call `who`. Pure; raises as `read` does."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{who} is not valid JSON: {error}: write it anew with commplane tune --out") from error
        if not isinstance(data, dict) or data.get("version") != _VERSION or not isinstance(data.get("facts"), dict):
            raise ConfigError(
                f"{who} wants version {_VERSION} and facts, found {data!r:.80}: write it anew with commplane tune --out"
            )
        try:
            return cls(data["facts"], Timings.from_json(data.get("timings")), path)
        except ValueError as error:
            raise ConfigError(f"{who} is broken: {error}: write it anew with commplane tune --out") from error

    def write(self, path: str) -> None:
        """Write a file, whole or not at all. Local.

        Raises:
            CommplaneError: it cannot be written.
        """
        target = Path(path)
        text = json.dumps({"version": _VERSION, "facts": dict(self.facts), "timings": self.timings.to_json()}, indent=1)
        try:
            # One name, so that a process killed in between leaves no more than one, which the next one replaces.
            partial = target.with_name(f".{target.name}.partial")
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(target)
        except OSError as error:
            raise CommplaneError(f"tuning file {path!r} cannot be written: {error.strerror}: give another --out") from error

    @property
    def digest(self) -> str:
        """Hash of what is in it, wherever it lies."""
        text = json.dumps([dict(self.facts), self.timings.to_json()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def misfit(self, found: Mapping[str, Any]) -> str | None:
        """How the facts of a group differ from those that the timings belong to, or None. Pure.

        A fact that the file does not have may be anything.
        """
        mine, theirs = _flat(self.facts), _flat({k: v for k, v in found.items() if k in self.facts})
        differ = [k for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)]
        return "; ".join(f"{k} was {mine.get(k)!r}, here it is {theirs.get(k)!r}" for k in differ) or None


def _flat(facts: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Facts of facts by their path, such as ``backends.torch.dist``."""
    out: dict[str, Any] = {}
    for key, value in facts.items():
        out |= _flat(value, f"{within}{key}.") if isinstance(value, Mapping) else {f"{within}{key}": value}
    return out


def named(setting: str) -> Tuning | None:
    """The file that the setting `tuning` names, read; None where it names none. Local; raises as `Tuning.read` does."""
    return None if setting in NO_FILE else Tuning.read(setting)


@cache
def shipped() -> tuple[Tuning, ...]:
    """What is shipped, by name. Local; read once."""
    found = sorted(
        (f for f in files("commplane").joinpath("tunings").iterdir() if f.name.endswith(".json")), key=lambda f: f.name
    )
    texts = ((f"commplane/tunings/{f.name}", f.read_text(encoding="utf-8")) for f in found)
    return tuple(Tuning.parse(text, path, f"shipped tuning file {path}") for path, text in texts)
