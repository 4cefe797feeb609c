# SPDX-License-Identifier: Apache-2.0
"""The rows of field.py, its tables, and where custom_ar is not the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

__all__ = ["REFERENCE", "Row", "behind", "ratios", "size", "times"]

REFERENCE = "custom_ar"

Figure = Callable[["Row"], float]


@dataclass
class Row:
    """One candidate at one dtype and size, with its settings and placement. Times are microseconds a call.

    Attributes:
        candidate: name of the library.
        label: with its settings.
        pinned: whether each rank's threads were on one core.
        dtype: torch's name.
        bytes: of a rank's tensor.
        calls: in a turn.
        medians: for each round, the median call of the rank whose median is the largest.
        means: for each round, the mean call of the rank whose mean is the largest.
    """

    candidate: str
    label: str
    pinned: bool
    dtype: str
    bytes: int
    calls: int = 0
    medians: list[float] = field(default_factory=list)
    means: list[float] = field(default_factory=list)

    def add(self, ranks: Iterable[dict[str, Any]]) -> None:
        """Take the answers of all ranks to one turn."""
        answers = list(ranks)
        self.medians.append(round(max(a["median_us"] for a in answers), 3))
        self.means.append(round(max(a["mean_us"] for a in answers), 3))

    @property
    def median_us(self) -> float:
        """What the tables show: the median of the rounds' medians."""
        return median(self.medians)

    @property
    def mean_us(self) -> float:
        """The median of the rounds' means: it shows calls that are slow now and then, which the other does not."""
        return median(self.means)

    @property
    def name(self) -> str:
        """For a line of the table."""
        return f"{self.label}{' pinned' if self.pinned else ' free'}"

    def to_json(self) -> dict[str, Any]:
        """A JSON object with these names, the two figures, and every round's."""
        return {**asdict(self), "median_us": round(self.median_us, 3), "mean_us": round(self.mean_us, 3)}


def best(rows: Iterable[Row], figure: Figure) -> dict[tuple[str, int], dict[str, float]]:
    """By (dtype, bytes) and library, the figure at its best placement and settings."""
    out: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        step = out.setdefault((row.dtype, row.bytes), {})
        step[row.candidate] = min(figure(row), step.get(row.candidate, float("inf")))
    return out


def times(rows: Sequence[Row], dtype: str) -> str:
    """Microseconds a call of every candidate, placement and setting. Pure."""
    mine = [r for r in rows if r.dtype == dtype]
    cells = {(r.name, r.bytes): _short(r.median_us) for r in mine}
    return _table(f"{dtype}, us a call", cells)


def ratios(rows: Sequence[Row], dtype: str) -> str:
    """How many times as long as custom_ar every library takes, each at its best placement and settings. Pure."""
    cells = {
        (name, nbytes): _short(value / step[REFERENCE])
        for (kind, nbytes), step in best(rows, lambda r: r.median_us).items()
        if kind == dtype and REFERENCE in step
        for name, value in step.items()
        if name != REFERENCE
    }
    return _table(f"{dtype}, times {REFERENCE}", cells)


def behind(rows: Sequence[Row]) -> list[str]:
    """Where a library is faster than custom_ar, by the median or by the mean, each at its best. Pure."""
    figures: dict[str, Figure] = {"median": lambda r: r.median_us, "mean": lambda r: r.mean_us}
    return [
        f"{name} at {size(nbytes)} {dtype} by the {figure}: {value:.2f} us against {step[REFERENCE]:.2f} us"
        for figure, of in figures.items()
        for (dtype, nbytes), step in best(rows, of).items()
        if REFERENCE in step
        for name, value in step.items()
        if value < step[REFERENCE]
    ]


def size(nbytes: int) -> str:
    """Bytes for people."""
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale and nbytes % scale == 0:
            return f"{nbytes // scale} {unit}"
    return f"{nbytes} B"


def _short(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _table(title: str, cells: dict[tuple[str, int], str]) -> str:
    """Markdown, one line a name, one column a size; empty where nothing was measured."""
    if not cells:
        return ""
    names, sizes = list(dict.fromkeys(name for name, _ in cells)), sorted({nbytes for _, nbytes in cells})
    head = [f"| {title} | {' | '.join(map(size, sizes))} |", f"|{'---|' * (len(sizes) + 1)}"]
    return "\n".join(head + [f"| {n} | {' | '.join(cells.get((n, s), '-') for s in sizes)} |" for n in names])
