# SPDX-License-Identifier: Apache-2.0
"""The tables of algorithms by size: every group that may use the backend has one, and what the plan is told covers it. Pure."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from commplane.api import SizeRange
from commplane_custom_ar.cuda import abi, tuned
from commplane_custom_ar.cuda.tuned import Choice, Row

pytestmark = pytest.mark.timeout(60)

# What the gate allows: any number of ranks over NVLink or on one GPU, two over PCIe.
GROUPS = [(kind, ranks) for kind in ("nvlink", "shared") for ranks in range(2, 9)] + [("pcie", 2)]
CAPABILITIES = (80, 86, 89, 90, 100, 103, 120, 121)


def tables(row: Row) -> list[tuple[Choice, ...]]:
    return [of(capturing=c) for of in (row.of_staged, row.of_readable) for c in (False, True)]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("link", "ranks"), GROUPS)
def test_every_group_that_the_gate_allows_has_exactly_one_row(capability: int, link: str, ranks: int) -> None:
    fitting = [
        row
        for row in tuned.ROWS
        if row.capability[0] <= capability <= row.capability[1] and row.ranks[0] <= ranks <= row.ranks[1] and link in row.links
    ]
    assert fitting == [tuned.look_up(capability, link, ranks)]


def test_a_group_that_the_gate_refuses_has_none() -> None:
    assert tuned.look_up(90, "pcie", 3) is None
    assert tuned.look_up(90, "nvlink", 9) is None
    assert tuned.look_up(90, "ethernet", 2) is None


@pytest.mark.parametrize("row", tuned.ROWS, ids=lambda row: f"{row.links[0]}-{row.ranks[0]}")
def test_a_row_is_what_the_library_takes_and_says_where_it_is_from(row: Row) -> None:
    assert row.source
    assert row.of_staged(capturing=False)
    for choices in tables(row):
        assert len(choices) <= abi.MAX_CHOICES
        assert all(one.algorithm in abi.ALGORITHMS for one in choices)
        assert all(one.threads % 64 == 0 and one.threads <= 512 and one.blocks >= 0 for one in choices)
        assert all(one.max_bytes is not None for one in choices[:-1])
        assert all((a.max_bytes or 0) < (b.max_bytes or 1 << 64) for a, b in pairwise(choices))
    # Inputs that only their rank reads cannot be pulled.
    assert not any(c.algorithm.endswith("_pull") for capturing in (False, True) for c in row.of_staged(capturing=capturing))


def covers(ranges: list[SizeRange], most: int | None) -> None:
    """From 0 to `most` without a gap, without an overlap, no two neighbours alike."""
    assert ranges[0].low == 0
    assert ranges[-1].high == (None if most is None else most + 1)
    for a, b in pairwise(ranges):
        assert a.high == b.low
        assert a.algorithm != b.algorithm


@pytest.mark.parametrize("row", tuned.ROWS, ids=lambda row: f"{row.links[0]}-{row.ranks[0]}")
@pytest.mark.parametrize("capacity", [4096, 64 << 10, 1 << 20, 8 << 20, 64 << 20])
def test_what_the_plan_is_told_covers_the_table_without_gap_or_overlap(row: Row, capacity: int) -> None:
    for capturing in (False, True):
        choices = row.of_staged(capturing=capturing)
        covers(tuned.size_ranges(choices), choices[-1].max_bytes)
        covers(tuned.norm_ranges(choices, capacity), choices[-1].max_bytes)


@pytest.mark.parametrize("seed", range(50))
def test_any_sorted_table_becomes_ranges_that_serve_each_size_as_the_library_would(seed: int) -> None:
    chance = random.Random(seed)
    ends: list[int | None] = sorted(chance.sample(range(1, 1 << 24), chance.randint(1, 6)))  # type: ignore[assignment]
    if chance.random() < 0.5:
        ends[-1] = None
    pushes = ("one_shot_push", "two_shot_push")
    row = Row("drawn", (0, 1), ("nvlink",), (2, 2), tuple(Choice(end, chance.choice(pushes)) for end in ends), (), None)
    ranges = tuned.size_ranges(row.staged)
    covers(ranges, ends[-1])
    for nbytes in (0, 1, *(e + d for e in ends if e is not None for d in (0, 1))):
        serving = [r.algorithm for r in ranges if nbytes in r]
        wanted = [one for one in row.staged if one.max_bytes is None or nbytes <= one.max_bytes][:1]
        assert serving == [one.algorithm for one in wanted], nbytes


@pytest.mark.parametrize("algorithm", sorted(abi.ALGORITHMS))
@pytest.mark.parametrize("row", tuned.ROWS, ids=lambda row: f"{row.links[0]}-{row.ranks[0]}")
def test_an_algorithm_that_is_asked_for_serves_all_that_it_can(algorithm: str, row: Row) -> None:
    forced = tuned.force(row, algorithm)
    if algorithm.endswith("_pull"):
        assert forced.staged == row.staged
        assert [forced.of_readable(capturing=c) for c in (False, True)] == [(Choice(None, algorithm),)] * 2
    else:
        assert [forced.of_staged(capturing=c) for c in (False, True)] == [(Choice(None, algorithm),)] * 2
        assert [forced.of_readable(capturing=c) for c in (False, True)] == [()] * 2
