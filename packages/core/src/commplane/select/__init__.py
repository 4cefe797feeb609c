"""Pure functions from gathered values to a plan: no I/O, no clock, no rank of one's own."""

from __future__ import annotations

from commplane.select.alike import Gathered, alike
from commplane.select.choose import LAST_RESORT, Draft, choose, difference, disagreement, static_refusal
from commplane.select.plan import Candidate, Explanation, Plan, Route, compile_routes

__all__ = [
    "LAST_RESORT",
    "Candidate",
    "Draft",
    "Explanation",
    "Gathered",
    "Plan",
    "Route",
    "alike",
    "choose",
    "compile_routes",
    "difference",
    "disagreement",
    "static_refusal",
]
