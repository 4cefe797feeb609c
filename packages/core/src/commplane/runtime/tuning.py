"""The file that ``commplane tune`` writes and the setting ``tuning`` names: timings, and the facts that they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commplane.api import Facts
from commplane.errors import CommplaneError, ConfigError
from commplane.select import Plan, Timings

__all__ = ["Tuning", "facts_of"]

_VERSION = 1


def facts_of(plan: Plan, facts: Facts, device: str) -> dict[str, Any]:
    """What timings of this group depend on: ranks, how many share each host, device, distributions of the backends. Local."""
    if device.startswith("cuda"):
        import torch

        name = torch.cuda.get_device_name(torch.device(device))
    else:
        name = f"cpu {facts[plan.key.ranks[0]].machine}"
    return {
        "ranks": len(plan.key.ranks),
        "hosts": [len(host) for host in facts.hosts(plan.key.ranks)],
        "device": name,
        "torch": facts[plan.key.ranks[0]].torch,
        "backends": {c.name: c.dist for c in plan.candidates if c.ready},
    }


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
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{who} cannot be read: {error.strerror}: write it with commplane tune --out") from error
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
        """How the facts of a group differ from those that the timings belong to, or None. Pure."""
        differ = [k for k in sorted({*self.facts, *found}) if self.facts.get(k) != found.get(k)]
        return "; ".join(f"{k} was {self.facts.get(k)!r}, here it is {found.get(k)!r}" for k in differ) or None
