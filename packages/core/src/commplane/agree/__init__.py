"""The control plane: what all ranks of a group find out and decide together. Every wait has a deadline."""

from __future__ import annotations

from commplane.agree.bootstrap import PeerFailed, StoreBootstrap
from commplane.agree.build import Attempt, Setback, abort_backend, build_backend, close_backend, joint_verdict, setback
from commplane.agree.clock import REAL, Clock
from commplane.agree.device import on_device, on_device_if_possible
from commplane.agree.facts import exchange_facts
from commplane.agree.guard import Activity, CaptureGuard, Forming
from commplane.agree.probe import own_options, probe_all
from commplane.agree.store import BoundedStore

__all__ = [
    "REAL",
    "Activity",
    "Attempt",
    "BoundedStore",
    "CaptureGuard",
    "Clock",
    "Forming",
    "PeerFailed",
    "Setback",
    "StoreBootstrap",
    "abort_backend",
    "build_backend",
    "close_backend",
    "exchange_facts",
    "joint_verdict",
    "on_device",
    "on_device_if_possible",
    "own_options",
    "probe_all",
    "setback",
]
