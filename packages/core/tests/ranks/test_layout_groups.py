"""The groups of a layout on real ranks, and the mesh of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from commplane.api import ParallelLayout
from commplane.errors import ConfigError, MismatchError
from commplane.runtime import Plane
from commplane.testing import run_threads

pytestmark = pytest.mark.timeout(60)

LAYOUT = ParallelLayout(world_size=4, tensor=4, data=2, expert=4)


def test_the_communicators_of_a_layout_are_made_in_one_order_whatever_order_they_are_asked_for_in() -> None:
    def rank_main(plane: Plane) -> dict[str, Any]:
        wanted = ["moe_ep", "attention_tp", "dp", "world"]
        if plane.rank % 2:
            wanted.reverse()
        made = plane.groups(LAYOUT, wanted, prefix="model_", backends=["torch"])
        place = LAYOUT.of(plane.rank).groups
        sums = {f: c.all_reduce(torch.tensor([2.0**plane.rank])).item() for f, c in made.items()}
        assert {f: c.ranks for f, c in made.items()} == {f: place[f] for f in made}
        assert sums == {f: float(sum(2**r for r in place[f])) for f in made}
        assert made["world"].ranks == made["moe_ep"].ranks and made["world"].key != made["moe_ep"].key
        return {f: c.key.purpose for f, c in made.items()}

    named = {f: f"model_{f}" for f in ("world", "dp", "attention_tp", "moe_ep")}
    outcomes = run_threads(4, rank_main)
    assert outcomes == [named] * 4, outcomes
    assert [list(o) for o in outcomes if isinstance(o, dict)] == [list(named)] * 4


def test_without_names_the_families_whose_groups_have_several_ranks_are_made() -> None:
    outcomes = run_threads(4, lambda plane: list(plane.groups(LAYOUT, backends=["torch"])))
    assert outcomes == [["world", "tp", "dp", "attention_tp", "attention", "moe_ep"]] * 4, outcomes


def test_ranks_that_want_other_groups_are_told_and_none_waits() -> None:
    def rank_main(plane: Plane) -> None:
        plane.groups(LAYOUT, ["tp", "dp"] if plane.rank == 2 else ["tp"])

    for error in run_threads(4, rank_main):
        assert isinstance(error, MismatchError), error
        assert "ranks disagree on the groups of a layout: ranks 0, 1, 3 have" in str(error) and "'dp'" in str(error)


def test_a_family_that_one_rank_does_not_know_is_told_to_all_at_once() -> None:
    outcomes = run_threads(4, lambda plane: plane.groups(LAYOUT, ["tpp"] if plane.rank == 2 else ["tp"]))
    for rank, error in enumerate(outcomes):
        assert isinstance(error, ConfigError if rank == 2 else MismatchError) and "'tpp'" in str(error), error


def test_a_layout_of_another_world_is_refused() -> None:
    for error in run_threads(2, lambda plane: plane.groups(LAYOUT)):
        assert isinstance(error, ConfigError) and "layout of 4 ranks: wanted one of the plane's 2" in str(error)


@pytest.fixture
def one_of_eight() -> Iterator[Callable[[int], None]]:
    """Makes this process one rank of a default group of eight, whose others are not there."""

    def become(rank: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)

    yield become
    dist.destroy_process_group()


def test_a_mesh_has_the_groups_of_its_layout_and_gives_it_back(one_of_eight: Callable[[int], None]) -> None:
    layout = ParallelLayout(world_size=8, tensor=4, pipeline=2, data=2, expert=2, moe_data=2)
    names = {"pp": "pp", "dp": "dp", "cp": "attention_cp", "tp": "attention_tp"}
    for rank in range(8):
        one_of_eight(rank)
        attention, moe = layout.to_mesh(), layout.to_mesh(cut="moe")
        found = {family: dist.get_process_group_ranks(attention[dim].get_group()) for dim, family in names.items()}
        found |= {family: dist.get_process_group_ranks(moe[family].get_group()) for family in ("moe_dp", "moe_ep", "moe_tp")}
        assert found == {family: list(layout.of(rank).groups[family]) for family in found}
    back = ParallelLayout.from_mesh(attention)
    assert back == ParallelLayout(world_size=8, tensor=4, pipeline=2, data=2)
    assert ParallelLayout.from_mesh(moe) == ParallelLayout(world_size=8, tensor=4, pipeline=2, expert=2, moe_data=2)
    whole = ParallelLayout.from_mesh(dist.init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp")))
    assert whole == ParallelLayout(world_size=8, tensor=8, data=2) and whole.attention_tensor == 4


def mesh(ranks: torch.Tensor, *names: str) -> Any:
    return SimpleNamespace(mesh=ranks, mesh_dim_names=names or None)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (mesh(torch.arange(4)), "whose dimensions are named, .* found no names"),
        (mesh(torch.arange(4).view(2, 2), "tp", "dp"), "in that order, found tp, dp: name and order them so"),
        (mesh(torch.arange(4).view(2, 2), "dp", "moe_ep"), "found dp, moe_ep"),
        (mesh(torch.arange(4).view(2, 2), "dp", "dp"), "found dp, dp"),
        (mesh(torch.arange(4).view(2, 2).T, "dp", "tp"), r"found rank 2 at \(0, 1\) where rank 1 belongs"),
        (mesh(torch.arange(4, 8), "tp"), r"found rank 4 at \(0,\) where rank 0 belongs"),
    ],
)
def test_a_mesh_of_no_layout_is_refused_with_what_was_found_and_wanted(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ParallelLayout.from_mesh(given)


def test_a_mesh_of_no_known_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="wanted a cut of attention, moe, found 'both'"):
        ParallelLayout(world_size=1, tensor=1).to_mesh(cut="both")
