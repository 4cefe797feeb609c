"""The runtime: `init`, planes and communicators."""

from __future__ import annotations

from commplane.runtime.communicator import Communicator
from commplane.runtime.plane import Plane, init
from commplane.runtime.sync import SyncRound

__all__ = ["Communicator", "Plane", "SyncRound", "init"]
