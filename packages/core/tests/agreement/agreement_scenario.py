"""What goes wrong in one case, as a value that can be printed and read back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")

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
_LATE = (0.4, 3.5, 5.0, 20.0, FOREVER_S)


def _one(draw: st.DrawFn, items: Sequence[T]) -> T:
    """Any of `items`, each as likely: hypothesis would mostly take the first, and fault rank 0. Shrinks to the first."""
    return items[draw(st.integers(0, 2**32 - 1)) % len(items)]


@st.composite
def faults(draw: st.DrawFn, ranks: int, groups: tuple[tuple[int, ...], ...], backends: int) -> Fault:
    """One fault that can happen in a case of that size."""
    phase = _one(draw, [*sorted(FAULTS), "anywhere", "anywhere", "anywhere"])
    how = _one(draw, FAULTS[phase])
    group = _one(draw, range(len(groups)))
    everywhere = phase in ("plugins", "config", "init", "spec", "anywhere", "capture", "order")
    return Fault(
        phase,
        how,
        rank=_one(draw, range(ranks) if everywhere else groups[group]),
        group=group,
        backend=_one(draw, range(max(backends, 1))),
        seconds=_one(draw, _LATE) if how in ("late", "interrupt", "silence") else 0.0,
        point=1 + _one(draw, range(_one(draw, (60, 200, 600)))) if phase == "anywhere" else 0,
        everywhere=how == "silence" and draw(st.booleans()),
    )


@st.composite
def scenarios(draw: st.DrawFn, most_ranks: int = 64) -> Scenario:
    """Mostly few ranks, sometimes many; mostly one fault, sometimes none or several."""
    ranks = _one(draw, [1, *[2, 3, 4] * 4, 5, 6, 7, 8])
    if most_ranks > 8 and _one(draw, range(100)) == 99:
        ranks = 9 + _one(draw, range(_one(draw, [16, 16, most_ranks - 8])))
    everyone = tuple(range(ranks))
    groups = [everyone]
    for _ in range(_one(draw, [0, 0, 0, 1, 2])):
        others = list(everyone)
        size = 1 + _one(draw, range(min(ranks, 6)))
        groups.append(tuple(others.pop(_one(draw, range(len(others)))) for _ in range(size)))
    if _one(draw, range(8)) == 7:
        groups.reverse()
    backends = _one(draw, [2, 1, 3, 2, 2, 2, 3, 0])
    wanted: tuple[str, ...] = _one(draw, [(), (), (), ("a",), ("b", "a")]) if backends > 1 else ()
    return Scenario(
        ranks=ranks,
        groups=tuple(groups),
        backends=backends,
        wanted=wanted,
        strict=draw(st.booleans()),
        faults=tuple(draw(faults(ranks, tuple(groups), backends)) for _ in range(_one(draw, [*[1] * 8, 2, 2, 3, 0]))),
        seed=draw(st.integers(0, 2**32 - 1)),
        restless=_one(draw, (0.3, 0.05, 1.0)),
    )
