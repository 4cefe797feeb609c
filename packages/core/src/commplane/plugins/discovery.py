"""Find plugins among installed distributions, without importing any of their code."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import importlib_metadata
from packaging.utils import canonicalize_name

__all__ = ["ENTRY_POINT_GROUP", "Candidate", "core_version", "find_candidates"]

ENTRY_POINT_GROUP = "commplane.plugins"


@dataclass(frozen=True)
class Candidate:
    """An entry point of an installed distribution.

    Attributes:
        name: name of the entry point; what the allow/deny list speaks of.
        value: what it points to, ``package.module``.
        dist: name of the distribution.
        version: version of the distribution.
        requires: its ``Requires-Dist`` lines.
        entry_point: loads the plugin.
    """

    name: str
    value: str
    dist: str
    version: str
    requires: tuple[str, ...]
    entry_point: Any

    def __str__(self) -> str:
        return f"{self.name} from {self.dist} {self.version} ({ENTRY_POINT_GROUP}: {self.name} = {self.value})"


def find_candidates(path: Sequence[str | os.PathLike[str]] | None = None) -> list[Candidate]:
    """All entry points of the group, ordered by name and distribution, whatever order the file system gives. Local.

    Args:
        path: folders to search instead of ``sys.path``.
    """
    found: dict[tuple[str, str, str], Candidate] = {}
    seen: set[str] = set()
    for dist in importlib_metadata.distributions(path=[os.fspath(p) for p in (sys.path if path is None else path)]):
        try:
            name = canonicalize_name(dist.name)
            entry_points = list(dist.entry_points.select(group=ENTRY_POINT_GROUP))
        except Exception as error:  # what an uninstall left behind: no metadata, or none that can be read
            logging.getLogger(__name__).info("an installed distribution has no readable metadata and is passed over: %r", error)
            continue
        # The same distribution may be seen twice, through an editable install or a repeated sys.path entry; the first
        # is the one that Python imports.
        if name in seen:
            continue
        seen.add(name)
        for ep in entry_points:
            found[ep.name, name, ep.value] = Candidate(ep.name, ep.value, dist.name, dist.version, tuple(dist.requires or ()), ep)
    return [found[key] for key in sorted(found)]


def core_version() -> str:
    """The installed version of commplane."""
    return str(importlib_metadata.version("commplane"))
