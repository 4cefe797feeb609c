"""Disaggregated prefill: bootstrap registry, port sync, rank maps, rooms and KV transfer."""

from __future__ import annotations

__version__ = "0.1.0"
