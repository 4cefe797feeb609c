"""Measurements: each module has ``add_arguments(parser)`` and ``run(arguments) -> dict``."""

from __future__ import annotations
