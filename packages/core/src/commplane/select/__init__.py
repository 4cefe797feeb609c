"""Pure functions from gathered values to a plan: no I/O, no clock, no rank of one's own."""

from __future__ import annotations

from commplane.select.choose import LAST_RESORT, Draft, choose, difference, static_refusal
from commplane.select.plan import Candidate, Explanation, Plan, Route, compile_routes

__all__ = [
    "LAST_RESORT",
    "Candidate",
    "Draft",
    "Explanation",
    "Plan",
    "Route",
    "choose",
    "compile_routes",
    "difference",
    "static_refusal",
]
