# SPDX-License-Identifier: Apache-2.0
"""The library's flight recorder as the contract's records. Local, from any thread."""

from __future__ import annotations

from typing import Protocol

from commplane.api import FlightRecord
from commplane_custom_ar._abi import FlightEntry
from commplane_custom_ar.codes import DTYPE_BYTES, DTYPE_NAMES, KIND_NAMES, MAX_WORLD, OP_NAMES, STATUS

__all__ = ["records"]

_RUNNING = 1


class _Recorded(Protocol):
    world_size: int

    def flight(self) -> list[FlightEntry]: ...


def records(comm: _Recorded) -> list[FlightRecord]:
    """The last calls on `comm`, oldest first."""
    return [_record(entry, comm.world_size) for entry in comm.flight()]


def _record(entry: FlightEntry, world_size: int) -> FlightRecord:
    call = entry.call
    dtype = DTYPE_NAMES.get(call.dtype)
    collective = KIND_NAMES.get(call.kind, f"kind {call.kind}")
    # A reduce-scatter is counted in elements of one part, its input has all of them.
    parts = world_size if collective == "reduce_scatter" else 1
    detail = [f"status {STATUS.get(entry.status, entry.status)}"] if entry.status not in (0, _RUNNING) else []
    if call.symmetric:
        detail.append(f"symmetric region {call.region} at {call.offset}")
    if collective == "broadcast":
        detail.append(f"src {call.root}")
    return FlightRecord(
        seq=entry.sequence,
        collective=collective,
        op=OP_NAMES.get(call.op),
        dtype=dtype,
        nbytes=0 if dtype is None else call.count * DTYPE_BYTES[dtype] * parts,
        state="running" if entry.status == _RUNNING else "done" if entry.status == 0 else "failed",
        started_ns=entry.begun_ns,
        finished_ns=entry.ended_ns or None,
        waiting_for=tuple(rank for rank in range(MAX_WORLD) if entry.waiting_mask >> rank & 1),
        detail=", ".join(detail),
    )
