"""`Communicator.tune` on GPUs: eager and in graphs, and a rank that does not come to a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_numbers import expect, inputs, reduced
from gpu_ranks import Rank, World, Worlds, needs_gpu, sizes

from commplane import errors
from commplane.api import add_rms_norm
from commplane.runtime.tune.data import Data

pytestmark = needs_gpu()

HIDDEN = 1024
SIZES = [8 << 10, 64 << 10]


def tuned(rank: Rank) -> tuple[str, list[Any]]:
    """What was measured of custom_ar, and the plan's digest; calls after it are right, in the last place for a norm."""
    with rank.form("tune", canary=True) as comm:
        for graph in (True, False):
            for collective in ("all_reduce", "all_reduce_rms_norm"):
                comm.tune(collective, dtype=torch.bfloat16, sizes=SIZES, hidden=HIDDEN, graph=graph)
        parts = [p.view(4, HIDDEN) for p in inputs(rank.world_size, 4 * HIDDEN, torch.bfloat16, 1, rank.device)]
        total, weight = reduced(parts), torch.ones(HIDDEN, dtype=torch.bfloat16, device=rank.device)
        expect("all_reduce after tune", comm.all_reduce(parts[rank.rank]), total)
        norm, new = comm.all_reduce_rms_norm(parts[rank.rank], parts[0], weight, 1e-6)
        wanted, wanted_new = add_rms_norm(total, parts[0], weight, 1e-6, 0.0)
        expect("the residual after tune", new, wanted_new)
        torch.testing.assert_close(norm, wanted, rtol=2**-7, atol=1e-6)
        torch.cuda.synchronize()
        timings = comm.plan.timings
        assert timings is not None
        mine = [c for c in timings.curves if c.candidate.endswith("custom_ar")]
        return comm.plan.digest, [(c.collective, c.graph, c.candidate, [n for n, _ in c.points], c.failed) for c in mine]


@pytest.mark.parametrize("size", sizes(most=4))
def test_every_way_of_custom_ar_is_measured_in_graphs_and_outside_and_all_ranks_have_one_plan(world: World) -> None:
    first, *others = world.run(tuned)
    assert all(answer == first for answer in others)
    labels = {"all_reduce": ["custom_ar"], "all_reduce_rms_norm": ["composed:custom_ar", "custom_ar"]}
    wanted = [(what, graph, label, SIZES, "") for what in labels for graph in (False, True) for label in labels[what]]
    assert [tuple(row) for row in first[1]] == wanted


def struck(rank: Rank) -> str:
    """Rank 1 raises before its launch, while the others wait on the device."""
    call = Data.call

    def strike(self: Data, table: Any, *, timed: bool = False) -> Any:
        if rank.rank == 1:
            raise RuntimeError("injected")
        return call(self, table, timed=timed)

    Data.call = strike  # type: ignore[method-assign]
    comm = rank.form("struck", canary=True)
    try:
        comm.tune("all_reduce", dtype=torch.bfloat16, sizes=SIZES)
    except errors.CommunicatorError as error:
        return str(error)
    finally:
        Data.call = call  # type: ignore[method-assign]
        comm.close()
    return "no error"


@pytest.mark.parametrize("size", sizes(most=2))
def test_a_rank_that_raises_before_its_launch_makes_all_ranks_raise_an_error_that_names_it(worlds: Worlds, size: int) -> None:
    with worlds.fresh(size) as world:
        for text in world.run(struck):
            assert "failed on some ranks only" in text and "rank 1: RuntimeError: injected" in text, text
