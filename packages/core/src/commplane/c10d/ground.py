"""The plane under one or more process groups, closed with the last of them."""

from __future__ import annotations

from collections.abc import Sequence

from commplane.runtime import Communicator, Plane

__all__ = ["Ground"]


class Ground:
    """A plane, who stands on it, and how its ranks are called elsewhere: the one place where the two counts meet.

    Attributes:
        plane: over the whole job, or over the ranks of one group.
        renamed: the global rank of each rank of the plane, where the two differ.
    """

    def __init__(self, plane: Plane, renamed: Sequence[int] | None) -> None:
        self.plane = plane
        self.renamed = renamed
        self._users = 1

    def share(self) -> Ground:
        """One more process group stands on it. Local."""
        self._users += 1
        return self

    def communicator(self, name: str, ranks: Sequence[int], device: str, seconds: float) -> Communicator:
        """A communicator over global `ranks`. Collective over them."""
        own = ranks if self.renamed is None else range(len(self.renamed))
        return self.plane.communicator(name, list(own), device=device, timeout=seconds)

    def release(self, *, wait: bool) -> None:
        """One process group less; the plane is closed with the last. Collective over its ranks with `wait`, else local."""
        self._users -= 1
        if self._users == 0:
            self.plane._close(wait=wait and not self.plane._faulted)
