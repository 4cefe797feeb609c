"""Measure every eligible backend side by side in one run."""

from __future__ import annotations

from commplane.bench.measure import Case, Row, measure
from commplane.bench.report import plot, require_plotting, table

__all__ = ["Case", "Row", "measure", "plot", "require_plotting", "table"]
