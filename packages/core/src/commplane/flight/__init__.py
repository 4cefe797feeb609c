"""The flight recorder: the last calls of every communicator, written to a file when something fails, and read back."""

from __future__ import annotations

from commplane.flight import signals
from commplane.flight.folder import Folder, new_job
from commplane.flight.group import GroupFlight
from commplane.flight.notes import RoundNotes
from commplane.flight.read import read_job
from commplane.flight.recorder import FlightRecorder
from commplane.flight.report import Report, report
from commplane.flight.ring import Bindable

__all__ = [
    "Bindable",
    "FlightRecorder",
    "Folder",
    "GroupFlight",
    "Report",
    "RoundNotes",
    "new_job",
    "read_job",
    "report",
    "signals",
]
