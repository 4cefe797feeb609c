"""The sync rounds of all ranks' dumps side by side: who is at which step, and where their notes part. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from commplane.flight.merge import named
from commplane.flight.read import Dump, RoundDump

__all__ = ["Parting", "RoundLane", "round_lanes"]

# Of each rank, in the report as text and as JSON.
_SHOWN = 3
_LISTED = 16


@dataclass(frozen=True)
class Parting:
    """The first note that is not the same on all ranks.

    Attributes:
        number: of the note.
        step: of the note on the ranks where it came first.
        exact: whether the notes before it were compared; if not, ranks may have parted earlier.
        said: what was noted, in quotes, or ``nothing`` -> global ranks; what most ranks have is first, of equally many the
            lowest rank's.
    """

    number: int
    step: int
    exact: bool
    said: Mapping[str, tuple[int, ...]]

    def __str__(self) -> str:
        (usual, most), *others = self.said.items()
        when = f"step {self.step}{'' if self.exact else ' or before'}"
        told = "; ".join(f"{named(ranks)} decided otherwise in {when}: {what}" for what, ranks in others)
        return f"{told} where {named(most)}: {usual} (note {self.number})"


@dataclass(frozen=True)
class RoundLane:
    """One sync round over all its ranks.

    Attributes:
        places: global rank -> the round in its dump, or None if the rank left none or did not have it open.
    """

    name: str
    ranks: tuple[int, ...]
    instance: int
    places: Mapping[int, RoundDump | None]

    @property
    def title(self) -> str:
        """``sync round 'cache' over [0, 1]``; one that was made again has its number."""
        again = f" (made {self.instance} times)" if self.instance > 1 else ""
        return f"sync round {self.name!r} over {list(self.ranks)}{again}"

    @property
    def group(self) -> dict[str, Any]:
        """Which round, for JSON."""
        return {"name": self.name, "ranks": list(self.ranks), "instance": self.instance}

    @property
    def known(self) -> dict[int, RoundDump]:
        """The ranks whose notes are known."""
        return {rank: place for rank, place in self.places.items() if place is not None}

    def parting(self) -> Parting | None:
        """Where the notes of the ranks part; None where those that can be compared are equal.

        Notes are compared by number. A rank that is still in the step of a note may yet come to it; one that is beyond, or whose
        next round failed, did not make it. What a ring no longer holds is not compared.
        """
        known = self.known
        by_rank = {rank: {note.number: note for note in place.notes} for rank, place in known.items()}
        compared = 0
        for number in sorted({n for notes in by_rank.values() for n in notes}):
            here = {rank: notes[number] for rank, notes in by_rank.items() if number in notes}
            step = min(note.step for note in here.values())
            said: dict[str, list[int]] = {}
            for rank, place in known.items():
                if rank in here:
                    note = here[rank]
                    late = "" if note.step == step else f" in step {note.step}"
                    said.setdefault(f"{note.text!r}{late}", []).append(rank)
                elif number > place.made and (place.steps > step or (place.failed and place.steps == step)):
                    said.setdefault("nothing", []).append(rank)
            if len(said) > 1:
                order = sorted(said.items(), key=lambda one: (-len(one[1]), min(one[1])))
                exact = number == 1 or compared == number - 1
                return Parting(number, step, exact, {what: tuple(ranks) for what, ranks in order})
            if sum(map(len, said.values())) > 1:
                compared = number
        return None

    def lines(self) -> list[str]:
        """For the report."""
        done = min((place.steps for place in self.known.values()), default=0)
        whose = "all ranks" if len(self.known) == len(self.places) else named(list(self.known))
        return [
            f"{self.title}; rounds completed by {whose}: {done}",
            *(f"  rank {rank}: {_line(place)}" for rank, place in self.places.items()),
        ]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            **self.group,
            "places": [
                {
                    "rank": rank,
                    "steps": None if place is None else place.steps,
                    "failed": None if place is None else place.failed,
                    "notes": None if place is None else place.made,
                    "last": [] if place is None else [[n.number, n.step, n.text] for n in place.notes[-_LISTED:]],
                }
                for rank, place in self.places.items()
            ],
        }


def round_lanes(dumps: Sequence[Dump]) -> list[RoundLane]:
    """Every sync round that some dump knows, in the order in which they are met."""
    met: dict[tuple[str, tuple[int, ...], int], dict[int, RoundDump]] = {}
    for dump in dumps:
        for one in dump.rounds:
            met.setdefault((one.name, one.ranks, one.instance), {})[dump.rank] = one
    return [
        RoundLane(name, ranks, instance, {rank: have.get(rank) for rank in ranks})
        for (name, ranks, instance), have in met.items()
    ]


def _line(place: RoundDump | None) -> str:
    if place is None:
        return "no dump, or not open there"
    rounds = f"{place.steps} rounds{', the next one failed' if place.failed else ''}"
    if not place.notes:
        return f"{rounds}, no notes"
    last = "; ".join(f"{n.text} (step {n.step})" for n in place.notes[-_SHOWN:])
    return f"{rounds}; last of {place.made} notes: {last}"
