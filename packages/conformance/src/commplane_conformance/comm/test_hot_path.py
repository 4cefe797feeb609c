"""What lies between the call of a user and the backend's own code."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType
from typing import Any

import torch

from commplane.api import Capability
from commplane_conformance.marks import clause, needs, needs_dtype
from commplane_conformance.rank import Rank
from commplane_conformance.worlds import World

pytestmark = [needs(Capability.ALL_REDUCE), needs_dtype("float32")]

_FORBIDDEN = ("pluggy", "logging", "importlib", "json", "commplane.plugins", "commplane.agree", "commplane.select")


def frames(rank: Rank) -> dict[str, int]:
    """How often code of each module was entered in 100 calls."""
    x = torch.ones(64, device=rank.device)
    for _ in range(3):
        rank.comm.all_reduce_(x)
    seen: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call":
            seen[str(frame.f_globals.get("__name__"))] += 1

    sys.setprofile(note)
    try:
        for _ in range(100):
            rank.comm.all_reduce_(x)
    finally:
        sys.setprofile(None)
    return dict(seen)


@clause("S57")
def test_no_hook_and_no_control_plane_on_the_hot_path(world: World) -> None:
    for r, seen in enumerate(world.run(frames)):
        found = {m: n for m, n in seen.items() if any(m == f or m.startswith(f"{f}.") for f in _FORBIDDEN)}
        assert not found, (
            f"100 all_reduce_ on rank {r} entered {found}: hooks, logs and the control plane belong around the calls"
        )


def allocations(rank: Rank, in_place: bool) -> int:
    """Blocks of tensor memory that were allocated in 20 calls on a contiguous tensor."""
    x = torch.ones(1000, device=rank.device)
    call = rank.comm.all_reduce_ if in_place else rank.comm.all_reduce
    for _ in range(5):
        call(x)
    if rank.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        for _ in range(20):
            call(x)
        return int(torch.cuda.memory_stats()["allocation.all.allocated"] - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for _ in range(20):
            call(x)
    events = profile.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)


@clause("S57")
def test_in_place_calls_allocate_nothing(world: World) -> None:
    for r, count in enumerate(world.run(allocations, True)):
        assert count == 0, f"20 all_reduce_ of a contiguous tensor allocated {count} tensors on rank {r}, wanted none"


@clause("S57")
def test_out_of_place_calls_allocate_their_result(world: World) -> None:
    for r, count in enumerate(world.run(allocations, False)):
        assert count <= 20, f"20 all_reduce of a contiguous tensor allocated {count} tensors on rank {r}, wanted their 20 results"
