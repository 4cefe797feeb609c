# SPDX-License-Identifier: Apache-2.0
"""A native status as an exception of the contract, with ranks as global ranks. Local."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from commplane.api import BuildContext
from commplane.errors import CommunicatorError, MismatchError, PeerError, UnsupportedOperation
from commplane_custom_ar import _native
from commplane_custom_ar._native import StatusDetail
from commplane_custom_ar.codes import STATUS

__all__ = ["explain"]


class _Detailed(Protocol):
    def detail(self) -> StatusDetail: ...


def explain(context: BuildContext, comm: _Detailed, status: int) -> CommunicatorError:
    """What to raise for `status`, which a call on `comm` returned."""
    who, ranks = context.who, context.ranks
    name = STATUS.get(status, str(status))
    if name == "EBUSY":
        return UnsupportedOperation(f"{who} wanted one thread at a time, found another in a call: give each its communicator")
    detail = comm.detail()
    at = f"{detail.operation} number {detail.seq}"
    missing = [ranks[r] for r in detail.missing if r not in detail.aborted]
    gone = [ranks[r] for r in detail.aborted if r != context.rank]
    if name == "EMISMATCH":
        shown = "; ".join(f"rank {ranks[r]} called {text}" for r, text in sorted(detail.mismatched.items()))
        return MismatchError(f"{who} {at}: ranks called with different arguments: {shown}")
    first = f" (rank {_names(gone)} gave up first)" if name == "EABORTED" else ""
    # A process that is on its way out counts, though /proc does not say so yet: EPEERDEAD is certain of whom it misses.
    ended = {*context.facts.dead(missing), *(ranks[r] for r in (detail.missing if name == "EPEERDEAD" else detail.dead))}
    dead = [r for r in missing if r in ended]
    if name in ("EPEERDEAD", "ETIMEDOUT", "EABORTED") and dead:
        return PeerError(
            f"{who} {at}: the process of rank {_names(dead)} has ended{first}: close and start over without it", dead
        )
    if name in ("ETIMEDOUT", "EABORTED") and missing:
        return PeerError(
            f"{who} {at}: waited up to {context.timeout:g} s for rank {_names(missing)}{first}: did it make the same calls? "
            f"COMMPLANE_TIMEOUT sets the limit",
            missing,
        )
    if name == "EABORTED" and gone:
        left = [ranks[r] for r in detail.missing if r in detail.aborted] or gone  # who began, where that is known
        return PeerError(f"{who} {at}: rank {_names(left)} gave up", left)
    return CommunicatorError(f"{who} {at}: native status {name}: {_native.last_error()}")


def _names(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
