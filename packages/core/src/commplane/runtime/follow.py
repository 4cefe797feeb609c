"""Which timings a new group follows: those of the file that the setting names, or of one that is shipped; all ranks or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from commplane.agree import StoreBootstrap, own_options
from commplane.api import Facts
from commplane.notice import notice
from commplane.runtime.tuning import Tuning, shipped
from commplane.select import Plan

__all__ = ["device_name", "facts_of", "follow"]


def device_name(device: str, machine: str) -> str:
    """What the device of this rank is called; of a group on the CPU the instruction set. Local."""
    if not device.startswith("cuda"):
        return f"cpu {machine}"
    import torch

    # The group uses the device, so that asking makes no context that it would not have anyway.
    return torch.cuda.get_device_name(torch.device(device)) if torch.cuda.is_available() else device.partition(":")[0]


def facts_of(plan: Plan, facts: Facts, device: str, options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What timings of this group depend on, as JSON. Local; only the device may differ between ranks.

    Args:
        plan: of the group.
        facts: of all ranks.
        device: of this rank for this group.
        options: the resolved settings of backends.
    """
    specs = {s.name: s for s in plan.specs}
    return {
        "ranks": len(plan.key.ranks),
        "hosts": [len(host) for host in facts.hosts(plan.key.ranks)],
        "device": device_name(device, facts[plan.key.ranks[0]].machine),
        "torch": facts[plan.key.ranks[0]].torch,
        # What a probe found has the versions of libraries that the distribution only depends on.
        "backends": {
            c.name: {"dist": c.dist, "found": dict(c.facts), "options": own_options(specs[c.name], options)}
            for c in plan.candidates
            if c.ready
        },
    }


def follow(
    plan: Plan,
    tuning: Tuning | None,
    facts: Facts,
    device: str,
    options: Mapping[str, Mapping[str, Any]],
    bootstrap: StoreBootstrap,
    *,
    auto: bool,
) -> Plan:
    """`plan` with the timings that fit all ranks, or as it is. Collective where there is anything to follow.

    Args:
        plan: as it is without.
        tuning: the file that the setting names; one that does not fit is a warning on the group's first rank.
        facts: of all ranks.
        device: of this rank for this group.
        options: the resolved settings of backends.
        bootstrap: control plane of the group.
        auto: whether to follow what is shipped, which is for GPUs alone, where no file is named; equal on all ranks.
    """
    if tuning is not None:
        possible: tuple[Tuning, ...] = (tuning,)
    else:
        possible = shipped() if auto and plan.key.device == "cuda" else ()
    if not possible:
        return plan
    mine = {"facts": facts_of(plan, facts, device, options), "path": tuning and tuning.path}
    groups = bootstrap.gather(mine, what="commit, what timings depend on").groups
    for one in possible:
        misfits: dict[str, list[int]] = {}
        for said, at in groups:
            text = one.misfit(said["facts"])
            if text is not None:
                misfits.setdefault(text, []).extend(plan.key.ranks[i] for i in at)
        if not misfits:
            # One plan has one path: that of the group's first rank.
            return plan.tuned(one.timings.said_by(groups[0][0]["path"] or one.path))
        if one is tuning and bootstrap.rank == 0:
            many = len(misfits) > 1 or len(plan.key.ranks) > sum(map(len, misfits.values()))
            told = "; ".join(f"on rank {', '.join(map(str, sorted(at)))} {t}" if many else t for t, at in misfits.items())
            notice(f"tuning file {one.path!r} is not used by communicator {plan.key}: {told}; write one with commplane tune")
    return plan
