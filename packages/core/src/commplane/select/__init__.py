"""Pure functions from gathered values to a plan: no I/O, no clock, no rank of one's own."""

from __future__ import annotations

from commplane.select.alike import Gathered, alike
from commplane.select.choose import LAST_RESORT, Draft, choose, difference, disagreement, static_refusal
from commplane.select.offers import Offer, ask, said
from commplane.select.plan import Candidate, Explanation, Plan
from commplane.select.routes import Route, compile_routes
from commplane.select.timings import Curve, Timings

__all__ = [
    "LAST_RESORT",
    "Candidate",
    "Curve",
    "Draft",
    "Explanation",
    "Gathered",
    "Offer",
    "Plan",
    "Route",
    "Timings",
    "alike",
    "ask",
    "choose",
    "compile_routes",
    "difference",
    "disagreement",
    "said",
    "static_refusal",
]
