"""Which ranks share a host, and who meets whom between the hosts. Pure: from facts alone, so equal on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from commplane.api import Facts

__all__ = ["Shape", "describe"]


@dataclass(frozen=True)
class Shape:
    """A group and its hosts, as one of its ranks sees them.

    Attributes:
        hosts: global ranks of each host, hosts in order of their first rank in the group, ranks in group order.
        rank: global rank of this process.
    """

    hosts: tuple[tuple[int, ...], ...]
    rank: int

    @classmethod
    def of(cls, facts: Facts, ranks: Sequence[int], rank: int) -> Shape:
        """Of the group with global `ranks`, for global `rank`."""
        return cls(facts.hosts(ranks), rank)

    @property
    def mine(self) -> tuple[int, ...]:
        """Global ranks of this process's host."""
        return next(host for host in self.hosts if self.rank in host)

    @property
    def place(self) -> int:
        """Of this process among `mine`."""
        return self.mine.index(self.rank)

    @property
    def even(self) -> bool:
        """Whether each host has as many ranks as any other, so that every rank has a counterpart on each."""
        return len({len(host) for host in self.hosts}) == 1

    @property
    def across(self) -> tuple[int, ...]:
        """Global ranks that this process meets between the hosts, by host: its counterparts, or among the first ranks the others.

        Empty where only the first ranks of the hosts meet and this one is none.
        """
        if self.even:
            return tuple(host[self.place] for host in self.hosts)
        return tuple(host[0] for host in self.hosts) if self.place == 0 else ()

    def host_of(self, rank: int) -> tuple[int, ...]:
        """Global ranks of the host of global `rank`."""
        return next(host for host in self.hosts if rank in host)


def describe(hosts: Sequence[Sequence[int]]) -> str:
    """``ranks 0, 1 | ranks 2, 3``: the ranks of each host."""
    return " | ".join(f"{'rank' if len(host) == 1 else 'ranks'} {', '.join(map(str, host))}" for host in hosts)
