"""Rooms: one status for each on all ranks of a group, and pages that go back only when no write can land any more."""

from __future__ import annotations

from commplane_disagg.rooms.pages import PageLedger
from commplane_disagg.rooms.schema import CAPACITY, ROOMS
from commplane_disagg.rooms.state import Cause, Key, Reason, Room, Status
from commplane_disagg.rooms.table import Change, RoomTable

__all__ = ["CAPACITY", "ROOMS", "Cause", "Change", "Key", "PageLedger", "Reason", "Room", "RoomTable", "Status"]
