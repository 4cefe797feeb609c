"""Which groups of this machine's GPUs get custom_ar, and what is said of it: links, UUIDs, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from gpu_ranks import GPUS, Rank, World, Worlds, needs_gpu, only, sizes

import commplane
from commplane import errors
from commplane.testing import run_processes

pytestmark = needs_gpu()


def asks(store: Any, rank: int, world_size: int, ordinal: int | None, backends: list[str]) -> dict[str, Any]:
    """A communicator with the canary, as a user makes it, on that device or the rank's own; the plan in words, and warnings."""
    ordinal = rank if ordinal is None else ordinal
    torch.cuda.set_device(ordinal)
    config = {"timeout": 10, "startup_timeout": 60}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with commplane.init(store=store, rank=rank, world_size=world_size, config=config, plugins=only("custom_ar")) as plane:
            try:
                tp = plane.communicator("tp", device=f"cuda:{ordinal}", backends=backends or None)
            except errors.SelectionError as error:  # NCCL refuses two ranks on one GPU, too
                said: dict[str, Any] = {"backends": [], "reason": str(error)}
            else:
                ours = next(c for c in tp.plan.candidates if c.name == "custom_ar")
                said = {"backends": list(tp.plan.backends), "reason": ours.reason}
                said["explain"] = str(tp.plan.explain("all_reduce", nbytes=8192, dtype=torch.bfloat16))
                if "custom_ar" in tp.plan.backends:
                    said["total"] = tp.all_reduce(torch.ones(5, device=f"cuda:{ordinal}")).tolist()
    said["warnings"] = [str(w.message) for w in caught if issubclass(w.category, errors.CommplaneWarning)]
    return said


def ask(env: Any, ordinal: int | None, backends: list[str]) -> list[dict[str, Any]]:
    outcomes = run_processes(2, asks, ordinal, backends, env=env, timeout=160)
    for o in outcomes:
        assert o.error is None and o.returncode == 0, o.output
    return [o.result for o in outcomes]


@pytest.mark.skipif(GPUS < 2, reason=f"wants 2 GPUs, torch sees {GPUS}")
def test_gpus_given_by_uuid_are_told_apart_and_pass_the_canary(worlds: Worlds) -> None:
    # As a string, and not by CUDA: this process makes no context.
    from commplane_custom_ar.gpu.devices import device

    uuids = [device(ordinal).uuid for ordinal in range(2)]
    said = ask(lambda rank: {**worlds.env(2), "CUDA_VISIBLE_DEVICES": uuids[rank]}, 0, ["custom_ar"])
    for one in said:
        assert one["backends"][0] == "custom_ar" and one["total"] == [2.0] * 5 and one["warnings"] == [], one
        assert "custom_ar" in one["explain"] and "one_shot_push" in one["explain"], one


@pytest.mark.parametrize("named", [True, False], ids=["asked for", "by default"])
def test_two_ranks_on_one_gpu_without_mps_are_refused_with_the_way_out(tmp_path: Any, named: bool) -> None:
    env = {"XDG_CACHE_HOME": str(tmp_path), "CUDA_MPS_PIPE_DIRECTORY": str(tmp_path / "no-daemon-here")}
    said = ask(lambda _rank: env, 0, ["custom_ar"] if named else [])
    for one in said:
        assert "custom_ar" not in one["backends"], one
        assert "start nvidia-cuda-mps-control -d before the ranks" in one["reason"], one
    if said[0]["backends"]:  # where no backend is left, it is an error that says the same, and no warning
        told = [one["warnings"] for one in said]
        assert [len(t) for t in told] == [1 if named else 0, 0], told
        if named:
            assert "'tp' over [0, 1]" in told[0][0] and "custom_ar" in told[0][0], told


@pytest.mark.skipif(GPUS < 2, reason=f"wants 2 GPUs, torch sees {GPUS}")
@pytest.mark.parametrize("named", [True, False], ids=["asked for", "by default"])
def test_a_refusal_is_one_warning_in_the_group_if_it_was_asked_for_and_nccl_goes_on(worlds: Worlds, named: bool) -> None:
    def env(rank: int) -> dict[str, str]:
        return {**worlds.env(2), "COMMPLANE_HOST_ALIAS": f"host{rank}"}

    said = ask(env, None, ["custom_ar"] if named else [])
    for one in said:
        assert one["backends"] == ["torch"], one
        assert "spans hosts" in one["reason"], one
    told = [one["warnings"] for one in said]
    assert [len(t) for t in told] == [1 if named else 0, 0], told
    if named:
        assert "'tp' over [0, 1]" in told[0][0] and "spans hosts" in told[0][0], told


@pytest.mark.skipif(GPUS < 2, reason=f"wants 2 GPUs, torch sees {GPUS}")
@pytest.mark.parametrize(
    "command", [["explain", "all_reduce", "--bytes", "8192", "--dtype", "bf16"], ["doctor"]], ids=lambda c: c[0]
)
def test_the_commands_say_what_runs_on_the_gpus(worlds: Worlds, command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "commplane", *command, "--ranks", "2"],
        env={**os.environ, **worlds.env(2)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "custom_ar" in done.stdout and "cuda" in done.stdout, done.stdout
    if command[0] == "explain":
        assert "one_shot_push" in done.stdout, done.stdout


def canaried(rank: Rank) -> list[str]:
    """A communicator with the canary, which tries every collective and dtype."""
    with rank.plane.communicator("canaried", device=str(rank.device), backends=["custom_ar"]) as tp:
        assert tp.plan.backends[0] == "custom_ar", [(c.name, c.state, c.reason) for c in tp.plan.candidates]
        assert tp.all_reduce(torch.ones(5, device=rank.device)).tolist() == [float(rank.world_size)] * 5
        return [str(tp.plan), str(tp.plan.explain("all_reduce", nbytes=8192, dtype=torch.bfloat16))]


@pytest.mark.parametrize("size", sizes())
def test_the_canary_passes_and_all_ranks_have_one_plan(world: World) -> None:
    first, *others = world.run(canaried)
    assert all(other == first for other in others)
    assert "custom_ar" in first[1] and "one_shot_push" in first[1], first
