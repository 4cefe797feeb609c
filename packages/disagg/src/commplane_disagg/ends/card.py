"""What two ends know of each other before the first room: their grids, layouts and engines, and whether these fit."""

from __future__ import annotations

import msgspec

from commplane.errors import CommplaneError, ConfigError
from commplane_disagg.ends.layout import KvLayout
from commplane_disagg.ranks import Grid, Kv, holding

__all__ = ["Card", "decode_card", "encode_card"]


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """One end.

    Attributes:
        side: ``"prefill"`` or ``"decode"``.
        kv: the model's cache.
        grid: the ranks of its replica.
        rank: its number in that grid.
        layout: of its pool.
        engine: name of its transfer engine; both sides need the same.
        metadata: of that engine, for who writes into this pool.
    """

    side: str
    kv: Kv
    grid: Grid
    rank: int
    layout: KvLayout
    engine: str
    metadata: bytes = b""

    def check(self) -> None:
        """Compare the layout with the grid.

        Raises:
            ConfigError: the pool does not hold what this rank of this grid holds.
        """
        want = holding(self.kv, self.grid, self.rank)
        for name in ("layers", "heads"):
            if getattr(self.layout, name) != getattr(want, name):
                raise ConfigError(
                    f"{self.side} rank {self.rank}/{self.grid.size}: its layout holds {name} {getattr(self.layout, name)}, "
                    f"the grid gives it {getattr(want, name)}; mend the layout, or give the grid its stages="
                )

    def refusal(self, peer: Card) -> str | None:
        """Why these two ends cannot serve one room, or None."""
        if self.side == peer.side:
            return f"both ends are {self.side}"
        for name in ("kv", "engine"):
            if getattr(self, name) != getattr(peer, name):
                return f"{name} is {getattr(self, name)} on {self.side} and {getattr(peer, name)} on {peer.side}"
        return self.layout.differs(peer.layout)


def encode_card(card: Card) -> bytes:
    """A card as msgpack."""
    return msgspec.msgpack.encode(card)


def decode_card(body: bytes) -> Card:
    """Read a card.

    Raises:
        CommplaneError: it is none, or contradicts itself.
    """
    try:
        return msgspec.msgpack.decode(body, type=Card)
    except (msgspec.DecodeError, ConfigError, UnicodeDecodeError) as error:
        raise CommplaneError(f"what the peer says of itself cannot be read: {error}") from error
