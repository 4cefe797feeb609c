"""From what every rank published to one ordered list of backends. Pure: the same input gives the same answer on each rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from commplane.api import BackendSpec, GroupKey
from commplane.errors import AgreementError
from commplane.select.plan import Candidate

__all__ = ["LAST_RESORT", "Draft", "choose", "difference", "static_refusal"]

LAST_RESORT = "torch"


@dataclass(frozen=True)
class Draft:
    """Backends to build, in order, and those left out before any was built."""

    order: tuple[str, ...]
    refused: tuple[Candidate, ...]
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def static_refusal(spec: BackendSpec, key: GroupKey) -> str | None:
    """The declared limit of `spec` that rules it out for a group, or None. Pure."""
    n = len(key.ranks)
    if spec.device not in (key.device, "any"):
        return f"serves {spec.device}, the group is on {key.device}"
    if spec.name != LAST_RESORT and n < spec.min_world_size:
        return f"serves groups of {spec.min_world_size} ranks or more, this one has {n}"
    if spec.max_world_size is not None and n > spec.max_world_size:
        return f"serves groups of up to {spec.max_world_size} ranks, this one has {n}"
    return None


def difference(what: str, values: Mapping[int, Any]) -> str | None:
    """One sentence that shows how `values` (by global rank) differ, or None if they are equal. Pure.

    Of two mappings, only the entries that differ are shown.
    """
    groups: list[tuple[Any, list[int]]] = []
    for rank, value in values.items():
        for known, ranks in groups:
            if known == value:
                ranks.append(rank)
                break
        else:
            groups.append((value, [rank]))
    if len(groups) < 2:
        return None
    if all(isinstance(v, dict) for v, _ in groups):
        keys = sorted({k for v, _ in groups for k in v})
        first = groups[0][0]
        keys = [k for k in keys if any((k in v, v.get(k)) != (k in first, first.get(k)) for v, _ in groups)]
        shown = [(", ".join(f"{k}={v.get(k, 'nothing')!r}" for k in keys), ranks) for v, ranks in groups]
    else:
        shown = [(repr(v), ranks) for v, ranks in groups]
    parts = [f"{_ranks(ranks)} {'has' if len(ranks) == 1 else 'have'} {text}" for text, ranks in shown]
    return f"ranks disagree on {what}: {'; '.join(parts)}"


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def choose(key: GroupKey, submissions: Sequence[Mapping[str, Any]]) -> Draft:
    """Decide for one group.

    Args:
        key: the group.
        submissions: in group order, what each rank published: ``request`` (compared), ``wanted`` (names in the order of
            preference, compared) and ``backends``: by name ``{"spec", "dist", "usable", "reason"}``.

    Raises:
        AgreementError: the ranks asked for different things.
    """
    by_rank = dict(zip(key.ranks, submissions, strict=True))
    text = difference("the communicator", {r: s["request"] for r, s in by_rank.items()})
    if text is not None:
        raise AgreementError(f"[{key.purpose}] {text}; every rank must make the same call")
    names = sorted({name for s in submissions for name in s["backends"]})
    usable: dict[str, Mapping[str, Any]] = {}
    refused: list[Candidate] = []
    for name in names:
        entries = {r: s["backends"].get(name) for r, s in by_rank.items()}
        some = next(e for e in entries.values() if e is not None)
        reason = _refusal(name, entries)
        if reason is None:
            usable[name] = some
        else:
            refused.append(Candidate(name, some["dist"], "probe", reason))
    wanted = [n for n in dict.fromkeys(submissions[0]["request"]["backends"]) if n != LAST_RESORT]
    if wanted or submissions[0]["request"]["backends"]:
        order = [n for n in wanted if n in usable]
        refused.extend(
            Candidate(n, usable[n]["dist"], "policy", f"is not among the backends asked for: {', '.join(wanted) or LAST_RESORT}")
            for n in usable
            if n not in wanted and n != LAST_RESORT
        )
    else:
        order = sorted((n for n in usable if n != LAST_RESORT), key=lambda n: (-usable[n]["spec"]["priority"], n))
    if LAST_RESORT in usable:
        order.append(LAST_RESORT)
    facts = {n: _merge_facts({r: s["backends"][n].get("facts", {}) for r, s in by_rank.items()}) for n in order}
    return Draft(tuple(order), tuple(refused), facts)


def _merge_facts(by_rank: Mapping[int, Mapping[str, str]]) -> dict[str, str]:
    """One text for each fact; where the ranks differ, what each found."""
    out = {}
    for name in sorted({name for facts in by_rank.values() for name in facts}):
        values = {rank: facts.get(name, "unknown") for rank, facts in by_rank.items()}
        if len(set(values.values())) == 1:
            out[name] = next(iter(values.values()))
        else:
            out[name] = "; ".join(f"rank {rank}: {value}" for rank, value in values.items())
    return out


def _refusal(name: str, entries: Mapping[int, Mapping[str, Any] | None]) -> str | None:
    absent = [r for r, e in entries.items() if e is None]
    if absent:
        return f"is not available on {_ranks(absent)}"
    present: dict[int, Mapping[str, Any]] = {r: e for r, e in entries.items() if e is not None}
    reasons: dict[str, list[int]] = {}
    for rank, e in present.items():
        if not e["usable"]:
            reasons.setdefault(e["reason"], []).append(rank)
    if len(reasons) == 1 and len(next(iter(reasons.values()))) == len(entries):
        return next(iter(reasons))
    if reasons:
        return "; ".join(f"{_ranks(ranks)}: {reason}" for reason, ranks in reasons.items())
    return difference(f"the spec of backend {name!r}", {r: e["spec"] for r, e in present.items()})
