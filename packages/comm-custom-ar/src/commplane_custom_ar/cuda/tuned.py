# SPDX-License-Identifier: Apache-2.0
"""Which algorithm of all_reduce serves which sizes on which GPUs, and up to where the backend should be chosen at all. Pure data.

What was measured says where; the rest is derived from it and says so. A group finds its row by the compute capability of its
GPUs, what connects them (`gpu.gate.Allowed.kind`) and its number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Final

from commplane.api import SizeRange

__all__ = ["ROWS", "Choice", "Row", "force", "look_up", "norm_ranges", "size_ranges"]

_KIB: Final = 1 << 10
_MIB: Final = 1 << 20


@dataclass(frozen=True)
class Choice:
    """`algorithm` serves messages of up to `max_bytes` bytes, None for all. 0 `blocks` or `threads`: the library's choice."""

    max_bytes: int | None
    algorithm: str
    blocks: int = 0
    threads: int = 0


@dataclass(frozen=True)
class Row:
    """What is right for a class of groups.

    Attributes:
        source: where the figures are from.
        capability: lowest and highest compute capability, as 10 * major + minor.
        links: kinds of connection.
        ranks: fewest and most ranks.
        staged: for inputs that only their rank reads. Above the last entry's bytes the backend offers nothing.
        readable: for inputs that all ranks can read; an entry that does not read them there means that `staged` serves. Pulls
            serve one way each, in place or out of place; for the other `staged` serves too.
        moves: largest message of all_gather, reduce_scatter and broadcast; None for all.
        staged_graph: `staged` inside of captures, None for the same.
        readable_graph: `readable` inside of captures, None for the same.
    """

    source: str
    capability: tuple[int, int]
    links: tuple[str, ...]
    ranks: tuple[int, int]
    staged: tuple[Choice, ...]
    readable: tuple[Choice, ...]
    moves: int | None
    staged_graph: tuple[Choice, ...] | None = None
    readable_graph: tuple[Choice, ...] | None = None

    def of_staged(self, *, capturing: bool) -> tuple[Choice, ...]:
        """For inputs that only their rank reads."""
        return self.staged_graph if capturing and self.staged_graph is not None else self.staged

    def of_readable(self, *, capturing: bool) -> tuple[Choice, ...]:
        """For inputs that all ranks can read."""
        return self.readable_graph if capturing and self.readable_graph is not None else self.readable


_ANY_CAPABILITY: Final = (0, 9999)
_FAST_LINKS: Final = ("nvlink", "shared")


def _derived(ranks: tuple[int, int], one_shot: int, most: int) -> Row:
    """Of more ranks than were measured: one-shot up to `one_shot` bytes, two-shot up to `most`.

    Of n ranks a one-shot sends n - 1 times the message and a two-shot 2 (n - 1) / n times, a hop later: 1.2 us at 360 GB/s.
    """
    return Row(
        source="derived from 2 x H200, not measured: where the bytes that a two-shot saves take as long as its second hop",
        capability=_ANY_CAPABILITY,
        links=_FAST_LINKS,
        ranks=ranks,
        staged=(Choice(one_shot, "one_shot_push"), Choice(most, "two_shot_push")),
        readable=(),
        moves=most,
    )


ROWS: Final[tuple[Row, ...]] = (
    Row(
        source="2 x H200 over NVLink, bfloat16, graph replay; taken over for other capabilities, and for ranks that share a GPU",
        capability=_ANY_CAPABILITY,
        links=_FAST_LINKS,
        ranks=(2, 2),
        staged=(Choice(None, "one_shot_push"),),
        readable=(),
        moves=None,
    ),
    _derived(ranks=(3, 3), one_shot=512 * _KIB, most=64 * _MIB),
    _derived(ranks=(4, 4), one_shot=256 * _KIB, most=64 * _MIB),
    _derived(ranks=(5, 6), one_shot=128 * _KIB, most=32 * _MIB),
    _derived(ranks=(7, 8), one_shot=64 * _KIB, most=32 * _MIB),
    Row(
        source="2 GPUs without NVLink: small messages only, where the latency of a launch decides; not measured",
        capability=_ANY_CAPABILITY,
        links=("pcie",),
        ranks=(2, 2),
        staged=(Choice(256 * _KIB, "one_shot_push"),),
        readable=(),
        moves=256 * _KIB,
    ),
)


def look_up(capability: int, link: str, world_size: int) -> Row | None:
    """The row of a group, None where there is none."""
    for row in ROWS:
        fits = row.capability[0] <= capability <= row.capability[1] and row.ranks[0] <= world_size <= row.ranks[1]
        if fits and link in row.links:
            return row
    return None


def force(row: Row, algorithm: str) -> Row:
    """`row` with `algorithm` at every size that it can serve, for comparisons.

    Args:
        row: of the group.
        algorithm: its name. One that reads the ranks' inputs changes nothing for inputs that it cannot read.
    """
    if algorithm.endswith("_pull"):
        only = (Choice(None, algorithm),)
        return replace(row, readable=only, readable_graph=None)
    only = (Choice(None, algorithm),)
    return replace(row, staged=only, staged_graph=None, readable=(), readable_graph=None)


def size_ranges(choices: Sequence[Choice]) -> list[SizeRange]:
    """What the plan shows of a table: neighbours of one algorithm are one range."""
    out: list[SizeRange] = []
    low = 0
    for one in choices:
        high = None if one.max_bytes is None else one.max_bytes + 1
        if out and out[-1].algorithm == one.algorithm:
            low = out.pop().low
        out.append(SizeRange(low, high, one.algorithm))
        low = high or 0
    return out


def norm_ranges(choices: Sequence[Choice], capacity: int) -> list[SizeRange]:
    """Of all_reduce_rms_norm: one kernel up to `capacity` bytes and twice those that go one-shot, above it a kernel more.

    As `all_reduce_rms_norm` of collective.cc decides.
    """
    if not choices:
        return []
    fused, rest = "fused_one_shot", "all_reduce, then add_rms_norm"
    end, whole = choices[-1].max_bytes, capacity
    one_shot = [one.max_bytes for one in takewhile(lambda one: one.algorithm == "one_shot_push", choices)]
    if len(one_shot) < len(choices):
        whole = min(capacity, 2 * (one_shot[-1] or 0)) if one_shot else -1
    if end is not None and end <= whole:
        return [SizeRange(0, end + 1, fused)]
    out = [SizeRange(0, whole + 1, fused)] if whole >= 0 else []
    return [*out, SizeRange(whole + 1, None if end is None else end + 1, rest)]
