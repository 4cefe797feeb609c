"""One rank finds, builds or computes something else: every rank ends on the same plan, without the backend, and knows why."""

from __future__ import annotations

import contextlib
import importlib
import time
import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch

from commplane import errors
from commplane.api import Capability, CommBackend, Unusable
from commplane_conformance.marks import at_least, clause, needs
from commplane_conformance.rank import Rank
from commplane_conformance.worlds import Worlds

_STARTUP_S = 6.0
_CONFIG = {"run_timeout": 6.0, "startup_timeout": _STARTUP_S}
_LIMIT_S = 90.0


def _load(path: str) -> tuple[Any, str]:
    module, _, attribute = path.partition(":")
    return importlib.import_module(module), attribute


@contextlib.contextmanager
def fault(rank: Rank, culprit: int, stage: str, how: str) -> Iterator[dict[str, int]]:
    """While open, one rank's probe, open or first collective does `how`. Counts what is opened and closed on this rank."""
    counts = {"made": 0, "closed": 0}
    probe_module, probe = _load(rank.spec.probe)
    factory_module, factory = _load(rank.spec.factory)
    cls: type[CommBackend] = getattr(factory_module, factory)
    opens, closes, reduces, real_probe = cls.open, cls.close, cls.all_reduce_, getattr(probe_module, probe)
    mine = rank.rank == culprit

    def strike(at: str) -> None:
        if mine and at == stage:
            if how == "raise":
                raise RuntimeError(f"injected into {at}")
            if how == "stall":  # long after the others have gone on
                time.sleep(2 * _STARTUP_S)
                raise RuntimeError(f"injected into {at}, late")

    def probe_(request: Any, facts: Any) -> Any:
        strike("probe")
        return Unusable("injected refusal") if mine and (stage, how) == ("probe", "refuse") else real_probe(request, facts)

    def open_(self: CommBackend, context: Any) -> None:
        counts["made"] += 1
        strike("before open")
        opens(self, context)
        strike("after open")

    def close_(self: CommBackend) -> None:
        counts["closed"] += not getattr(self, "_conformance_closed", False)
        self._conformance_closed = True  # type: ignore[attr-defined]
        closes(self)

    def all_reduce_(self: CommBackend, tensor: torch.Tensor, op: Any) -> torch.Tensor:
        strike("canary")
        out = reduces(self, tensor, op)
        return out.zero_() if mine and (stage, how) == ("canary", "wrong") else out

    with (
        patch.object(probe_module, probe, probe_),
        patch.object(cls, "open", open_),
        patch.object(cls, "close", close_),
        patch.object(cls, "all_reduce_", all_reduce_),
    ):
        yield counts


def forms(rank: Rank, culprit: int, stage: str, how: str) -> dict[str, Any]:
    """What this rank ends with."""
    out: dict[str, Any] = {}
    with fault(rank, culprit, stage, how) as counts, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            comm = rank.plane.communicator("conformance_fault", device=rank.job.device, backends=[rank.job.backend])
        except errors.SelectionError as error:  # nothing comes after torch
            out.update(plan="none", reason=str(error).partition("] ")[2])
        else:
            candidate = next(c for c in comm.plan.candidates if c.name == rank.job.backend)
            out.update(plan=comm.plan.digest, reason=f"{candidate.state}: {candidate.reason}", ready=candidate.ready)
            total = comm.all_reduce(torch.ones(3, device=rank.device))
            assert total.tolist() == [float(rank.world_size)] * 3
            comm.close()
        deadline = time.monotonic() + 4 * _STARTUP_S  # a call that stalls is left to itself, and released when it returns
        while counts["closed"] < counts["made"] and time.monotonic() < deadline:
            time.sleep(0.05)
        out["held"] = counts["made"] - counts["closed"]
    return out


def check(worlds: Worlds, size: int, stage: str, how: str, words: str) -> None:
    """All ranks end alike, with the reason of the culprit, and nothing is held."""
    culprit = size - 1
    with worlds.fresh(size, config=_CONFIG, form=False) as world:
        found = world.run(forms, culprit, stage, how, limit=_LIMIT_S)
    for r, said in enumerate(found):
        assert said == found[0], f"rank {r} ends with {said}, rank 0 with {found[0]}"
        assert not said.get("ready"), f"the backend is in the plan although rank {culprit} could not {stage}"
        assert words in said["reason"] and str(culprit) in said["reason"], f"rank {r} does not know why: {said['reason']}"
        assert said["held"] == 0, f"rank {r} holds {said['held']} backends that were opened and not closed"


@clause("S32")
def test_a_probe_that_refuses_on_one_rank(worlds: Worlds, size: int) -> None:
    check(worlds, size, "probe", "refuse", "injected refusal")


@clause("S32")
def test_a_probe_that_raises_on_one_rank(worlds: Worlds, size: int) -> None:
    check(worlds, size, "probe", "raise", "injected into probe")


@clause("S32", "S28")
def test_a_build_that_fails_on_one_rank_before_it_began(worlds: Worlds, size: int) -> None:
    check(worlds, size, "before open", "raise", "injected into before open")


@clause("S32", "S36")
def test_a_build_that_fails_on_one_rank_after_all(worlds: Worlds, size: int) -> None:
    check(worlds, size, "after open", "raise", "injected into after open")


@clause("S32", "S28")
@at_least(3)
def test_a_build_that_stalls_on_one_rank(worlds: Worlds, size: int) -> None:
    if size != min(n for n in worlds.subject.ranks if n >= 3) and not worlds.subject.full:
        pytest.skip("it waits for deadlines: one size is enough without --commplane-full")
    check(worlds, size, "before open", "stall", "did not finish")


@clause("S32")
@needs(Capability.ALL_REDUCE)
def test_a_wrong_sum_on_one_rank(worlds: Worlds, size: int) -> None:
    check(worlds, size, "canary", "wrong", "is wrong")
