"""The plugin plane: discovery, version checks and hook calls."""

from __future__ import annotations

from commplane.plugins.discovery import ENTRY_POINT_GROUP, Candidate, core_version, find_candidates
from commplane.plugins.host import PluginHost, Registered
from commplane.plugins.report import Kind, Mismatch, Problem, as_error

__all__ = [
    "ENTRY_POINT_GROUP",
    "Candidate",
    "Kind",
    "Mismatch",
    "PluginHost",
    "Problem",
    "Registered",
    "as_error",
    "core_version",
    "find_candidates",
]
