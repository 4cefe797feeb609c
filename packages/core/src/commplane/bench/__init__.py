"""Measure every eligible backend side by side in one run, and what lies between a user's call and a backend."""

from __future__ import annotations

from commplane.bench.cases import Case, Step, form
from commplane.bench.machine import describe, in_words
from commplane.bench.measure import Row, measure, pinnings, steps
from commplane.bench.null import NAME as NULL
from commplane.bench.overhead import OverheadRow, Subject, form_null, measure_overhead
from commplane.bench.report import overhead_table, plot, require_plotting, table
from commplane.bench.startup import StartupRow, measure_startup
from commplane.bench.startup_report import plot_startup, startup_table

__all__ = [
    "NULL",
    "Case",
    "OverheadRow",
    "Row",
    "StartupRow",
    "Step",
    "Subject",
    "describe",
    "form",
    "form_null",
    "in_words",
    "measure",
    "measure_overhead",
    "measure_startup",
    "overhead_table",
    "pinnings",
    "plot",
    "plot_startup",
    "require_plotting",
    "startup_table",
    "steps",
    "table",
]
