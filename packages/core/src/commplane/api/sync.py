"""The sync round as plugins see it: one unconditional exchange of a fixed schema a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

__all__ = ["Agreed", "SyncRound"]

Agreed = Mapping[str, int | tuple[int, ...]]
"""``"spec.field"`` -> the agreed value; a tuple where the field's count is above one."""


class SyncRound(Protocol):
    """Votes over one group; made by ``plane.sync_round``. Every rank runs the same rounds, whatever it has to say.

    Either `step`, or `issue` in one step and `result` in a later one: at most one round is out at a time.
    """

    @property
    def rank(self) -> int:
        """Group rank."""

    @property
    def world_size(self) -> int:
        """Number of ranks in the group."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks in group order."""

    @property
    def steps(self) -> int:
        """Rounds completed."""

    def step(self, values: Mapping[str, int | Sequence[int]], *, digest: int = 0) -> Agreed:
        """One round: this rank's value of every field in, the agreed value of every field out. Collective, blocking.

        Args:
            values: for each field an integer of at most 63 bits, or as many as the field counts.
            digest: of this rank's state before the step, at most 63 bits; must be equal on all ranks.

        Raises:
            UnsupportedOperation: a field is missing, unknown or of another count; nothing was sent.
            MismatchError: ranks are at different steps, have different schemas, or their digests differ: their state diverged.
            PeerError: a rank is missing at the deadline; it is named.
        """

    def issue(self, values: Mapping[str, int | Sequence[int]], *, digest: int = 0) -> None:
        """Send this rank's values of the next round and return. Local.

        Raises:
            UnsupportedOperation: as in `step`, or a round is out already.
        """

    def result(self) -> Agreed:
        """Wait for the round that `issue` sent; every rank must have issued it. Collective. Raises what `step` raises."""

    def note(self, what: str, *numbers: int) -> None:
        """Remember a decision that followed from what was agreed, for the flight records. Local; costs well below 1 us.

        It is kept with the number of the last round, and is in every dump. ``commplane trace`` compares the notes of all ranks
        and names the first step in which they differ: note what all ranks decide alike, in the order in which they do.

        Args:
            what: the kind of decision.
            numbers: of what; shown after `what`. Formatted when records are dumped, not before.
        """

    def close(self) -> None:
        """Leave the group. Collective, idempotent."""
