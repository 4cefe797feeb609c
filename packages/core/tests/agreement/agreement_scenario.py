"""What goes wrong in one case, as a value that can be printed and read back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from hypothesis import strategies as st

STARTUP_S = 4.0
"""The start-up deadline of every case; a wait of a running collective has half of it."""

FOREVER_S = 500.0
"""Longer than every deadline of a case together: who is so late is missing. What stalls comes back then."""

BACKENDS = ("a", "b", "c")

# Phase -> what may go wrong in it on one rank. `seconds` says how long for those that are late or stall.
FAULTS: dict[str, tuple[str, ...]] = {
    "plugins": ("version", "raise"),
    "config": ("differs", "wrong"),
    "init": ("late",),
    "probe": ("refuse", "raise", "late", "facts"),
    "spec": ("differs", "absent"),
    "select": ("differs", "raise", "late"),
    "request": ("differs", "unknown"),
    "construct": ("raise", "late"),
    "open": ("raise", "late"),
    "rendezvous": ("raise", "late"),
    "canary": ("wrong", "raise", "late"),
    "before": ("late",),
    "order": ("swapped",),
    "prepare": ("raise", "late", "differs"),
    "empty": ("raise", "late", "differs"),
    "capture": ("more", "fewer", "other", "raise", "late"),
    "registration": ("raise", "late"),
    "close": ("late",),
    "anywhere": ("die", "interrupt", "silence", "lost"),
}


@dataclass(frozen=True)
class Fault:
    """One rank does one thing wrong.

    Attributes:
        phase: where, a key of `FAULTS`.
        how: what, one of its values.
        rank: global rank.
        group: index of the communicator, for what happens in one.
        backend: index of the backend, for what happens in one.
        seconds: how late; for ``interrupt`` how long until the rank leaves, for ``silence`` until the store answers again.
        point: for ``anywhere``, the number of the call of that rank to the clock or the store at which it happens.
        everywhere: for ``silence``, for all ranks.
    """

    phase: str
    how: str
    rank: int
    group: int = 0
    backend: int = 0
    seconds: float = 0.0
    point: int = 0
    everywhere: bool = False


@dataclass(frozen=True)
class Scenario:
    """A whole case.

    Attributes:
        ranks: how many.
        groups: global ranks of each communicator, created in this order.
        backends: how many each rank has.
        wanted: backends asked for by name, in order; empty for the order of priority.
        strict: warnings are errors.
        faults: what goes wrong.
        seed: who runs when.
        restless: how often the ranks take turns, 0 to 1.
    """

    ranks: int
    groups: tuple[tuple[int, ...], ...]
    backends: int = 2
    wanted: tuple[str, ...] = ()
    strict: bool = True
    faults: tuple[Fault, ...] = ()
    seed: int = 0
    restless: float = 0.3

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Scenario:
        """What `to_json` gave."""
        data: dict[str, Any] = json.loads(text)
        data["groups"] = tuple(tuple(g) for g in data["groups"])
        data["wanted"] = tuple(data["wanted"])
        data["faults"] = tuple(Fault(**f) for f in data["faults"])
        return cls(**data)

    def __repr__(self) -> str:
        return self.to_json()


# Within the deadline of an attempt's rounds; beyond it, within that of a step; beyond that; beyond every vote.
_LATE = st.sampled_from([0.4, 3.5, 5.0, 20.0, FOREVER_S])


@st.composite
def faults(draw: st.DrawFn, ranks: int, groups: tuple[tuple[int, ...], ...], backends: int) -> Fault:
    """One fault that can happen in a case of that size."""
    phase = draw(st.sampled_from([*sorted(FAULTS), "anywhere", "anywhere", "anywhere"]))
    how = draw(st.sampled_from(FAULTS[phase]))
    group = draw(st.integers(0, len(groups) - 1))
    inside = phase not in ("plugins", "config", "init", "spec", "anywhere", "capture", "order")
    rank = draw(st.sampled_from(groups[group])) if inside else draw(st.integers(0, ranks - 1))
    seconds = draw(_LATE) if how in ("late", "interrupt", "silence") else 0.0
    point = draw(st.integers(1, 60) | st.integers(1, 200) | st.integers(1, 600)) if phase == "anywhere" else 0
    return Fault(
        phase,
        how,
        rank,
        group,
        draw(st.integers(0, backends - 1)) if backends else 0,
        seconds,
        point,
        how == "silence" and draw(st.booleans()),
    )


@st.composite
def scenarios(draw: st.DrawFn, most_ranks: int = 64) -> Scenario:
    """Mostly few ranks, sometimes many; mostly one fault, sometimes none or several."""
    ranks = draw(st.one_of(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(2, 8)))
    if most_ranks > 8 and draw(st.integers(0, 99)) == 99:
        ranks = draw(st.integers(9, 24) | st.integers(9, 24) | st.integers(9, most_ranks))
    everyone = tuple(range(ranks))
    groups = [everyone]
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        members = draw(st.lists(st.sampled_from(everyone), min_size=1, max_size=min(ranks, 6), unique=True))
        groups.append(tuple(members))
    if draw(st.integers(0, 7)) == 7:
        groups.reverse()
    backends = draw(st.sampled_from([0, 1, 2, 2, 3]))
    wanted = draw(st.sampled_from([(), (), (), ("a",), ("b", "a")])) if backends > 1 else ()
    several = draw(st.sampled_from([1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 0]))
    return Scenario(
        ranks=ranks,
        groups=tuple(groups),
        backends=backends,
        wanted=wanted,
        strict=draw(st.booleans()),
        faults=tuple(draw(faults(ranks, tuple(groups), backends)) for _ in range(several)),
        seed=draw(st.integers(0, 2**32 - 1)),
        restless=draw(st.sampled_from([0.05, 0.3, 1.0])),
    )
