"""The pieces of one transfer: checked as a whole before anything starts, and joined where they adjoin."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from commplane.errors import CommplaneError

__all__ = ["Pieces"]


class Pieces:
    """What one `submit` asked for, copied from the caller's sequences.

    Args:
        peer: whose pool is written, for the texts of errors.
        local: offsets in this pool.
        remote: offsets in the peer's.
        nbytes: sizes, or one for all.
        local_pool: bytes of this pool.
        remote_pool: bytes of the peer's.

    Raises:
        CommplaneError: the lengths differ, or a piece is empty or outside of a pool.
    """

    def __init__(
        self,
        peer: str,
        local: Sequence[int],
        remote: Sequence[int],
        nbytes: int | Sequence[int],
        local_pool: int,
        remote_pool: int,
    ) -> None:
        try:
            self.local, self.remote = array("q", local), array("q", remote)
            # An array's own repetition and minimum are native: a page more costs tens of nanoseconds.
            self.nbytes = array("q", [nbytes]) * len(self.local) if isinstance(nbytes, int) else array("q", nbytes)
        except (TypeError, OverflowError) as error:
            raise CommplaneError(f"a transfer to {peer!r}: wanted offsets and sizes that are whole numbers, {error}") from error
        if not len(self.local) == len(self.remote) == len(self.nbytes):
            found = f"{len(self.local)}, {len(self.remote)} and {len(self.nbytes)}"
            raise CommplaneError(f"a transfer to {peer!r}: wanted as many local and remote offsets as sizes, found {found}")
        self.total = sum(self.nbytes)
        if not self.nbytes:
            return
        if min(self.nbytes) <= 0:
            raise CommplaneError(f"a transfer to {peer!r}: wanted pieces of 1 byte or more, found one of {min(self.nbytes)}")
        for whose, offsets, size in (("this", self.local, local_pool), ("the peer's", self.remote, remote_pool)):
            self._check(peer, whose, offsets, size)

    def _check(self, peer: str, whose: str, offsets: array[int], size: int) -> None:
        if min(offsets) >= 0 and max(offsets) + max(self.nbytes) <= size:
            return
        for offset, nbytes in zip(offsets, self.nbytes, strict=True):
            if offset < 0 or offset + nbytes > size:
                raise CommplaneError(
                    f"a transfer to {peer!r}: wanted pieces inside of {whose} pool of {size} bytes, found {nbytes} bytes at "
                    f"{offset}; nothing was started"
                )

    def joined(self, most: int) -> Iterator[tuple[int, int, int]]:
        """Local offset, remote offset and size of each run that is contiguous at both ends, none above `most` bytes."""
        start, to, length = 0, 0, 0
        for local, remote, nbytes in zip(self.local, self.remote, self.nbytes, strict=True):
            if length and local == start + length and remote == to + length:
                length += nbytes
            else:
                if length:
                    yield start, to, length
                start, to, length = local, remote, nbytes
            while length >= most:
                yield start, to, most
                start, to, length = start + most, to + most, length - most
        if length:
            yield start, to, length
