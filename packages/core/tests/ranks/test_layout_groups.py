"""The groups of a layout on real ranks, and the mesh of one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from commplane.api import ParallelLayout
from commplane.errors import ConfigError, MismatchError
from commplane.runtime import Plane
from commplane.testing import run_processes, run_threads

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


def test_a_layout_of_another_world_is_refused() -> None:
    for error in run_threads(2, lambda plane: plane.groups(LAYOUT)):
        assert isinstance(error, ConfigError) and "layout of 4 ranks: wanted one of the plane's 2" in str(error)


def on_a_mesh(store: Any, rank: int, world_size: int) -> dict[str, Any]:
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    layout = ParallelLayout(world_size=4, tensor=2, pipeline=2, context=2, expert=2)
    mesh, moe = layout.to_mesh(), layout.to_mesh(cut="moe")
    back, moe_back = ParallelLayout.from_mesh(mesh), ParallelLayout.from_mesh(moe)
    whole = ParallelLayout.from_mesh(dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")))
    names = {"pp": "pp", "dp": "dp", "cp": "attention_cp", "tp": "attention_tp"}
    found = {family: tuple(mesh[dim].mesh.tolist()) for dim, family in names.items()}
    found |= {family: tuple(moe[family].mesh.tolist()) for family in ("moe_dp", "moe_ep", "moe_tp")}
    total = torch.tensor([2.0**rank])
    dist.all_reduce(total, group=mesh["tp"].get_group())
    dist.destroy_process_group()
    place = layout.of(rank).groups
    return {
        "differ": [f for f, ranks in found.items() if ranks != place[f]],
        "attention": back.attention == layout.attention and back.pp == layout.pp,
        "moe": moe_back == ParallelLayout(world_size=4, tensor=2, pipeline=2, expert=2),
        "whole": [whole.data, whole.tensor, whole.attention_tensor],
        "sum": total.item() - sum(2**r for r in place["attention_tp"]),
    }


def test_a_mesh_has_the_groups_of_its_layout_and_gives_it_back() -> None:
    outcomes = run_processes(4, on_a_mesh)
    for o in outcomes:
        assert o.result == {"differ": [], "attention": True, "moe": True, "whole": [2, 4, 2], "sum": 0.0}, o.output


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
