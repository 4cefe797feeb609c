"""Verifies and times the ways to run one call, and says which may not run.

Absolute times on a shared machine move; ratios within one run hold. So all ways of one size have a turn in each round, the first
round is not counted, and what counts is the median of a rank's turns, of the slowest rank. Every decision is made from values
that all ranks have gathered, so the curves are the same on each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

from commplane.runtime.dispatch import DispatchTable
from commplane.runtime.tune.data import Data
from commplane.runtime.tune.steps import Steps, Trouble
from commplane.runtime.tune.subject import Subject
from commplane.runtime.tune.timer import Timer, by_clock, in_graphs, warmed_up
from commplane.select import Curve, Route

__all__ = ["Tuner"]

_ROUNDS = 5
_TURN_S = 0.01
_MAX_CALLS = 200

MakeTable = Callable[[Sequence[Route]], DispatchTable]
"""A dispatch table with these routes alone."""


@dataclass
class _Way:
    label: str
    routes: Sequence[Route]
    points: list[tuple[int, float]] = field(default_factory=list)
    failed: str = ""
    failed_from: int = 0

    def fail(self, trouble: Trouble, nbytes: int) -> None:
        """Out at every size after a wrong result, else from this size on."""
        self.failed, self.failed_from = trouble.text, 0 if trouble.wrong else nbytes
        self.points = [(n, us) for n, us in self.points if n < self.failed_from]


class Tuner:
    """Measures one `Subject`. Every method that communicates is collective over the group.

    Attributes:
        stopped: why sizes were not measured that no way is to blame for, such as memory; empty where all were begun that the
            budget allows. Equal on all ranks.

    Args:
        subject: what.
        ways: the ways to run it, by label, with the sizes that each covers.
        device: where the group's tensors are.
        rank: group rank.
        world_size: ranks of the group.
        steps: by which the ranks keep together.
        make_table: makes the table of one way.
        capturing: around the capture of a graph, where the plan needs that.
        now: seconds, by any clock.
    """

    def __init__(
        self,
        subject: Subject,
        ways: dict[str, list[Route]],
        device: str,
        rank: int,
        world_size: int,
        steps: Steps,
        make_table: MakeTable,
        capturing: Callable[[], AbstractContextManager[Any]],
        now: Callable[[], float],
    ) -> None:
        self._subject = subject
        self._ways = [_Way(label, routes) for label, routes in ways.items()]
        self._device = device
        self._rank = rank
        self._world_size = world_size
        self._steps = steps
        self._make_table = make_table
        self._capturing = capturing
        self._now = now
        self.stopped = ""

    def run(self, budget_s: float) -> list[Curve]:
        """The curves; of ways that gave a wrong result or failed, why. Collective.

        Sizes are measured in turn until `budget_s` seconds have passed on the slowest rank: the first one always is.
        """
        begin = self._now()
        for nbytes in self._subject.sizes:
            elapsed = max(self._steps.gather(self._now() - begin, "time spent"))
            if (elapsed > budget_s and nbytes != self._subject.sizes[0]) or self.stopped:
                break
            self._measure(nbytes)
        s = self._subject
        variant = s.variant and str(s.variant)
        return [
            Curve(str(s.collective), variant, s.dtype, s.graph, w.label, tuple(w.points), w.failed, w.failed_from, s.hidden)
            for w in self._ways
            if w.points or w.failed
        ]

    def _measure(self, nbytes: int) -> None:
        data, trouble = self._steps.alone(
            f"data of {nbytes} bytes", lambda: Data(self._subject, nbytes, self._device, self._rank, self._world_size)
        )
        if trouble is not None:
            self.stopped = f"{nbytes} bytes: {trouble.text}"
            return
        ways = [w for w in self._ways if not w.failed and any(r.serves(data.nbytes) for r in w.routes)]
        timers: dict[str, Timer] = {}
        times: dict[str, list[float]] = {}
        failures: dict[str, Trouble] = {}
        for way in ways:
            timer, trouble = self._verified(way, data)
            if timer is not None:
                timers[way.label] = timer
            elif trouble is not None:
                failures[way.label] = trouble
            if self.stopped:
                timers.clear()  # nothing is timed at this size; what was wrong at it is out all the same
                break
        for number in range(-1, _ROUNDS + 1):  # the first turn tells how many calls fill one, the second is not counted
            for label in list(timers):
                seconds = times[label][0] / 1e6 if number >= 0 else _TURN_S
                calls = max(1, min(_MAX_CALLS, int(_TURN_S / max(seconds, 1e-9))))
                took, trouble = self._steps.together(f"a turn of {label}", partial(timers[label], calls))
                if trouble is not None:
                    failures[label] = trouble
                    del timers[label]
                elif number < 0:
                    times[label] = [max(self._steps.gather(took, "calibration"))]
                elif number > 0:
                    times[label].append(took)
        everyone = self._steps.gather({label: round(median(times[label][1:]), 3) for label in timers}, "results")
        measured = {label: max(0.001, *(rank[label] for rank in everyone)) for label in timers}
        self._settle(data.nbytes, ways, measured, failures)

    def _settle(self, nbytes: int, ways: Sequence[_Way], measured: dict[str, float], failures: dict[str, Trouble]) -> None:
        """Keep what was measured; where nothing could be run, the size is the reason and not the ways."""
        for way in ways:
            if way.label in measured:
                way.points.append((nbytes, measured[way.label]))
            elif (trouble := failures.get(way.label)) is not None and (trouble.wrong or measured):
                way.fail(trouble, nbytes)
        if not measured and ways and not self.stopped:
            self.stopped = f"{nbytes} bytes: " + "; ".join(f"{label}: {t.text}" for label, t in failures.items())

    def _verified(self, way: _Way, data: Data) -> tuple[Timer | None, Trouble | None]:
        """What times a way that has given what it must, or why not. Collective; the result is looked at apart from the call."""
        table = self._make_table(way.routes)
        got, trouble = self._steps.together(f"a call of {way.label}", lambda: data.call(table)())
        if trouble is None:
            _, trouble = self._steps.alone(f"the result of {way.label}", lambda: data.check(got))
            if trouble is not None and not trouble.wrong:
                self.stopped = f"{data.nbytes} bytes: {trouble.text}"
        if trouble is not None:
            return None, trouble
        call = data.call(table, timed=True)
        if not self._subject.graph:
            return by_clock(call, self._device), None
        # A rank that fails in its first calls is not to leave the others in the vote that ends a capture.
        stream, trouble = self._steps.together(f"a warm-up of {way.label}", lambda: warmed_up(call))
        if trouble is not None:
            return None, trouble
        return self._steps.together(f"a graph of {way.label}", lambda: in_graphs(call, stream, self._capturing))
