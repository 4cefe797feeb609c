"""From what every rank published to one ordered list of backends. Pure: the same input gives the same answer on each rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from commplane.api import BackendSpec, GroupKey
from commplane.errors import AgreementError
from commplane.select.alike import alike
from commplane.select.plan import Candidate

__all__ = ["LAST_RESORT", "Draft", "choose", "difference", "static_refusal"]

LAST_RESORT = "torch"


@dataclass(frozen=True)
class Draft:
    """Backends to build, in order, and those left out before any was built.

    Attributes:
        order: names.
        refused: those left out.
        facts: what the probes found, by name of the backend.
        given: whether somebody has given the order, the caller, a setting or a plugin; else it is that of priority.
    """

    order: tuple[str, ...]
    refused: tuple[Candidate, ...]
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    given: bool = False


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
    ranks = list(values)
    return disagreement(what, [(value, [ranks[i] for i in at]) for value, at in alike(list(values.values()))])


def disagreement(what: str, groups: Sequence[tuple[Any, Sequence[int]]]) -> str | None:
    """`difference` of values that are grouped already, each with the global ranks that have it. Pure."""
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
    if len(submissions) != len(key.ranks):
        raise ValueError(f"submissions are shorter or longer than the group: wanted {len(key.ranks)}, found {len(submissions)}")
    said = [(s, [key.ranks[i] for i in at]) for s, at in alike(submissions)]
    text = disagreement("the communicator", _merge([(s["request"], ranks) for s, ranks in said]))
    if text is not None:
        raise AgreementError(f"[{key.purpose}] {text}; every rank must make the same call")
    names = sorted({name for s, _ in said for name in s["backends"]})
    usable: dict[str, Mapping[str, Any]] = {}
    refused: list[Candidate] = []
    for name in names:
        entries = [(s["backends"].get(name), ranks) for s, ranks in said]
        some = next(e for e, _ in entries if e is not None)
        reason = _refusal(name, entries, key.ranks)
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
        by_name = [n for n in usable if n != LAST_RESORT and usable[n]["spec"]["priority"] < 0]
        refused.extend(Candidate(n, usable[n]["dist"], "policy", "is used only where it is asked for by name") for n in by_name)
        chosen = (n for n in usable if n != LAST_RESORT and n not in by_name)
        order = sorted(chosen, key=lambda n: (-usable[n]["spec"]["priority"], n))
    if LAST_RESORT in usable:
        order.append(LAST_RESORT)
    facts = {n: _merge_facts([(s["backends"][n].get("facts", {}), ranks) for s, ranks in said], key.ranks) for n in order}
    return Draft(tuple(order), tuple(refused), facts, bool(submissions[0]["request"]["backends"]))


# What holds for several ranks: a value, and the global ranks that have it.
_Groups = Sequence[tuple[Any, Sequence[int]]]


def _merge(groups: _Groups) -> list[tuple[Any, list[int]]]:
    """The same with equal values together."""
    return [(value, [r for i in at for r in groups[i][1]]) for value, at in alike([value for value, _ in groups])]


def _in_order(ranks: Sequence[int], order: Sequence[int]) -> list[int]:
    """`ranks` in the order of the group."""
    chosen = set(ranks)
    return [r for r in order if r in chosen]


def _merge_facts(groups: _Groups, order: Sequence[int]) -> dict[str, str]:
    """One text for each fact; where the ranks differ, what each found."""
    out = {}
    for name in sorted({name for facts, _ in groups for name in facts}):
        values = _merge([(facts.get(name, "unknown"), ranks) for facts, ranks in groups])
        if len(values) == 1:
            out[name] = values[0][0]
        else:
            by_rank = {rank: value for value, ranks in values for rank in ranks}
            out[name] = "; ".join(f"rank {rank}: {by_rank[rank]}" for rank in order)
    return out


def _refusal(name: str, entries: _Groups, order: Sequence[int]) -> str | None:
    absent = [r for e, ranks in entries if e is None for r in ranks]
    if absent:
        return f"is not available on {_ranks(_in_order(absent, order))}"
    reasons = _merge([(e["reason"], ranks) for e, ranks in entries if not e["usable"]])
    if len(reasons) == 1 and len(reasons[0][1]) == len(order):
        return str(reasons[0][0])
    if reasons:
        return "; ".join(f"{_ranks(_in_order(ranks, order))}: {reason}" for reason, ranks in reasons)
    return disagreement(f"the spec of backend {name!r}", _merge([(e["spec"], ranks) for e, ranks in entries]))
