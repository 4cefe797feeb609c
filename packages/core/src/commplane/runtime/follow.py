"""Which timings a new group follows: those of the file that the setting names, or of one that is shipped; all ranks or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from commplane.agree import StoreBootstrap, own_options
from commplane.api import Facts
from commplane.notice import notice
from commplane.runtime.tuning import Tuning, shipped
from commplane.select import Plan

__all__ = ["device_id", "device_name", "facts_of", "follow"]


def device_name(device: str, machine: str) -> str:
    """What the device of this rank is called; of a group on the CPU the instruction set. Local."""
    if not device.startswith("cuda"):
        return f"cpu {machine}"
    import torch

    # The group uses the device, so that asking makes no context that it would not have anyway.
    return torch.cuda.get_device_name(torch.device(device)) if torch.cuda.is_available() else device.partition(":")[0]


def device_id(device: str) -> str:
    """Which GPU this rank uses, as CUDA tells them apart; empty on the CPU, and where torch does not say. Local."""
    if not device.startswith("cuda"):
        return ""
    import torch

    return str(getattr(torch.cuda.get_device_properties(torch.device(device)), "uuid", "")) if torch.cuda.is_available() else ""


def facts_of(
    plan: Plan,
    facts: Facts,
    device: str,
    options: Mapping[str, Mapping[str, Any]],
    gather: Callable[[Any], list[Any]],
) -> list[dict[str, Any]]:
    """What timings of this group depend on, as JSON, of each rank in group order. Collective.

    Args:
        plan: of the group.
        facts: of all ranks.
        device: of this rank for this group.
        options: the resolved settings of backends.
        gather: gives every rank's value.
    """
    specs = {s.name: s for s in plan.specs}
    mine = {
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
    said = gather([mine, device_id(device)])
    # Ranks that share a GPU are slower than ranks that have one each.
    gpus = len({found for _, found in said if found})
    return [{**theirs, "gpus": gpus} for theirs, _ in said]


def _other_options(tuning: Tuning, plan: Plan, found: Mapping[str, Any]) -> str | None:
    """How the options of backends that were measured differ from the defaults, which hold where a file says nothing of them."""
    if "backends" in tuning.facts:
        return None
    measured = {c.candidate.rpartition(":")[2] for c in tuning.timings.curves}
    return (
        "; ".join(
            f"backends.{s.name}.options.{name} was {default!r}, here it is {there!r}"
            for s in plan.specs
            if s.name in measured
            for name, default in s.options.items()
            if (there := found["backends"][s.name]["options"][name]) != default
        )
        or None
    )


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
        possible = tuple(t for t in possible if t.facts["ranks"] == len(plan.key.ranks))  # mostly none, which needs no round
    if not possible:
        return plan
    what = "commit, what timings depend on"
    found = facts_of(plan, facts, device, options, lambda mine: bootstrap.all_gather(mine, what=what))
    for one in possible:
        misfits: dict[str, list[int]] = {}
        for rank, there in zip(plan.key.ranks, found, strict=True):
            text = one.misfit(there) or _other_options(one, plan, there)
            if text is not None:
                misfits.setdefault(text, []).append(rank)
        if not misfits:
            # One plan has one path: that of the group's first rank.
            source = one.path if tuning is None else bootstrap.broadcast(one.path, what="commit, where the timings lie")
            followed = plan.tuned(one.timings.said_by(source))
            lost = followed.lacks(plan)
            if lost is None:
                return followed
            misfits[f"it leaves {lost}, with no way to run"] = list(plan.key.ranks)
        if one is tuning and bootstrap.rank == 0:
            many = len(misfits) > 1 or len(plan.key.ranks) > sum(map(len, misfits.values()))
            told = "; ".join(f"on rank {', '.join(map(str, sorted(at)))} {t}" if many else t for t, at in misfits.items())
            notice(f"tuning file {one.path!r} is not used by communicator {plan.key}: {told}; write one with commplane tune")
    return plan
