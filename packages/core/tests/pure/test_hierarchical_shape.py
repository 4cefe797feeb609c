"""Which ranks of a group meet whom, the way, and whom reports of a failure name. Pure."""

from __future__ import annotations

import pytest

from commplane.backends.hierarchical.shape import Shape, describe
from commplane.runtime.inquest import named

EVEN = ((0, 1), (2, 3))
UNEVEN = ((0, 3), (1,), (2, 4, 5))


def test_on_even_hosts_each_rank_meets_its_counterparts() -> None:
    assert [Shape(EVEN, r).across for r in range(4)] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert Shape(EVEN, 3).even and Shape(EVEN, 3).mine == (2, 3) and Shape(EVEN, 3).place == 1


def test_on_uneven_hosts_the_first_ranks_meet_and_the_others_nobody() -> None:
    assert [Shape(UNEVEN, r).across for r in range(6)] == [(0, 1, 2), (0, 1, 2), (0, 1, 2), (), (), ()]
    assert not Shape(UNEVEN, 0).even and Shape(UNEVEN, 0).host_of(4) == (2, 4, 5)
    assert describe(UNEVEN) == "ranks 0, 3 | rank 1 | ranks 2, 4, 5"


@pytest.mark.parametrize(
    ("suspects", "present", "ended", "names", "sure"),
    [
        pytest.param([], [0], [], (), True, id="nobody is suspected"),
        pytest.param([[3]], [2], [3], (3,), True, id="a rank that has ended"),
        pytest.param([[3]], [2], [], (3,), False, id="a rank of which nothing is known"),
        pytest.param([[2, 3], [3]], [0, 2], [3], (3,), True, id="its host is cleared by the other rank of it"),
        pytest.param([[2, 3]], [0], [], (2, 3), False, id="a host of which nothing is known"),
        pytest.param([[2, 3]], [0], [2], (2,), False, id="of a host, one that has ended: the other may come"),
        pytest.param([[2, 3]], [0], [2, 3], (2, 3), True, id="a host that has ended"),
        pytest.param([[0], [2, 3]], [0, 1], [], (2, 3), False, id="who gave up because of another is cleared"),
        pytest.param([[0, 1], [2, 3]], [0, 2], [], (), True, id="all have answered"),
        pytest.param([[2, 3], [0, 1]], [0, 2, 1], [5], (), True, id="who has ended and is not suspected is not named"),
    ],
)
def test_reports_name_those_that_are_suspected_and_do_not_answer(
    suspects: list[list[int]], present: list[int], ended: list[int], names: tuple[int, ...], sure: bool
) -> None:
    assert named(suspects, present, ended) == (names, sure)


def test_the_first_ranks_meet_unless_counterparts_are_asked_for() -> None:
    ways = pytest.importorskip("commplane.backends.hierarchical.ways", reason="wants torch: pip install commplane[torch]")
    assert [ways.chosen(Shape(hosts, 0), "auto") for hosts in (EVEN, UNEVEN)] == ["leaders"] * 2
    assert ways.chosen(Shape(EVEN, 0), "shards") == "shards"
