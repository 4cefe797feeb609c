"""What is wrong with a plugin, as data, and as the one text that errors and ``doctor`` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from commplane.errors import (
    PluginCompatibilityError,
    PluginConflict,
    PluginError,
    PluginLoadError,
)

__all__ = ["Kind", "Mismatch", "Problem", "as_error"]


class Kind(str, Enum):
    """Why a plugin is left out; the value is shown by ``commplane plugins``."""

    LOAD = "failed to load"
    COMPATIBILITY = "incompatible"
    CONFLICT = "conflict"
    DENIED = "left out by COMMPLANE_PLUGINS"


_ERRORS: dict[Kind, type[PluginError]] = {
    Kind.LOAD: PluginLoadError,
    Kind.COMPATIBILITY: PluginCompatibilityError,
    Kind.CONFLICT: PluginConflict,
    Kind.DENIED: PluginError,
}


@dataclass(frozen=True)
class Mismatch:
    """One thing that was wanted and not found."""

    wanted: str
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Problem:
    """One plugin that cannot be used.

    Attributes:
        plugin: entry-point name.
        title: the plugin with its distribution and entry point.
        kind: class of the problem.
        summary: one sentence.
        mismatches: what was wanted and found, for incompatibilities.
        traceback: where it failed, for load failures.
        names: backend names that are lost with it, as far as they are known.
    """

    plugin: str
    title: str
    kind: Kind
    summary: str
    mismatches: tuple[Mismatch, ...] = ()
    traceback: str = ""
    names: tuple[str, ...] = field(default=())

    def concerns(self, name: str) -> bool:
        """Whether somebody who asked for `name` should see this problem."""
        return name == self.plugin or name in self.names

    def lines(self) -> list[str]:
        """The report, without the traceback."""
        out = [self.title] if self.mismatches else [f"{self.title}: {self.summary}"]
        for m in self.mismatches:
            out.append(f"  wanted  {m.wanted:<28} found  {m.found}")
        fixes = dict.fromkeys(m.fix for m in self.mismatches if m.fix)
        out.extend(f"  fix     {fix}" for fix in fixes)
        return out


def as_error(problems: Sequence[Problem], total: int, core: str) -> PluginError:
    """One error for all `problems`; its class is that of the first."""
    kinds = {p.kind for p in problems}
    what = {
        frozenset({Kind.COMPATIBILITY}): f"cannot be used with commplane {core}",
        frozenset({Kind.CONFLICT}): "claim a name that another distribution claims too",
        frozenset({Kind.LOAD}): "failed to load",
    }.get(frozenset(kinds), "cannot be used")
    out = [f"{len({p.title for p in problems})} of {total} plugins {what}"]
    for problem in problems:
        out.extend(f"  {line}" for line in problem.lines())
        if problem.traceback:
            out.extend(f"    {line}" for line in problem.traceback.rstrip().splitlines())
    names = ",".join(f"-{p.plugin}" for p in {p.plugin: p for p in problems}.values())
    out.append(f"  to leave out: COMMPLANE_PLUGINS={names}      to see all plugins: commplane plugins")
    return _ERRORS[problems[0].kind]("\n".join(out))
