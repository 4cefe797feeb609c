"""By which algorithm a shape goes, and that no plan is one that the kernels refuse."""

from typing import Any

import pytest
import torch
from flashinfer_world import NORM, World

from commplane_flashinfer import checks, plans
from commplane_flashinfer.patterns import one_shot_limit

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(
    ("algorithm", "tokens", "wanted"),
    [("one_shot", 9, True), ("two_shot", 9, False), ("two_shot", 4, True), ("auto", 9, True), ("auto", 4097, False)],
)
def test_a_two_shot_is_only_made_of_more_tokens_than_ranks(algorithm: str, tokens: int, wanted: bool) -> None:
    world = World(4, most=1 << 22, options={"algorithm": algorithm})
    value, weight = torch.ones((tokens, 512), dtype=torch.bfloat16), torch.ones(512, dtype=torch.bfloat16)
    world.run(lambda rank, r: rank.bind(NORM)(value, value, weight, 1e-5, 0.0))
    assert world.ranks[0].comm.calls[0]["use_oneshot"] is wanted


@pytest.mark.parametrize(("world_size", "hidden"), [(2, 8), (4, 24), (8, 32), (8, 56)])
@pytest.mark.parametrize("algorithm", ["auto", "two_shot"])
def test_rows_of_fewer_vectors_than_ranks_go_by_one_shot(world_size: int, hidden: int, algorithm: str) -> None:
    world = World(world_size, most=1 << 20, options={"algorithm": algorithm}, major=9)
    limit = one_shot_limit("auto", 1 << 30, world_size, 9)
    tokens = min(limit // hidden // 2 + world_size + 1, (1 << 20) // hidden)  # more than `auto` has one-shots for, where it fits
    value, weight = torch.ones((tokens, hidden), dtype=torch.bfloat16), torch.ones(hidden, dtype=torch.bfloat16)
    found = world.run(lambda rank, r: rank.bind(NORM)(value, value, weight, 1e-5, 0.0)[1])
    assert all(torch.equal(total, value * (world_size + 1)) for total in found)
    assert world.ranks[0].comm.calls[0]["use_oneshot"] is True


@pytest.mark.parametrize("world_size", checks.WORLD_SIZES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("limit", [0, 1 << 14])
def test_every_plan_of_a_norm_has_a_launch(world_size: int, itemsize: int, limit: int) -> None:
    planner = plans.Planner("", world_size, itemsize, 1 << 24, limit)
    for hidden in range(1, 70):
        for tokens in (1, world_size, world_size + 1, 5000):
            plan = planner.norm(torch.Size([tokens, hidden]))
            assert plan.fused is (hidden * itemsize % 16 == 0)
            assert plan.one_shot or (tokens > world_size and hidden * itemsize // 16 >= world_size)
            assert plan.one_shot or tokens * hidden * itemsize > limit


def test_the_imitation_refuses_a_two_shot_of_rows_that_are_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_short(*args: Any) -> None:
        return None

    monkeypatch.setattr(checks, "two_shot", too_short)
    world = World(4, options={"algorithm": "two_shot"})
    value, weight = torch.ones((5, 24), dtype=torch.bfloat16), torch.ones(24, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="block_size < nranks"):
        world.run(lambda rank, r: rank.bind(NORM)(value, value, weight, 1e-5, 0.0))


def test_shapes_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_MOST_PLANS", 3)
    made: list[torch.Size] = []

    def make(shape: torch.Size) -> plans.Plan:
        made.append(shape)
        return plans.Plan(1, 1, True)

    made_once = plans.Plans(make)
    for n in (1, 2, 3, 1, 4, 1):
        assert made_once[torch.Size([n])].tokens == 1
        assert len(made_once) <= 3
    assert [list(shape) for shape in made] == [[1], [2], [3], [4], [1]]
