"""What the bench by hand found: rows, what each is held against, the worst of each ratio, and a table. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from commplane.bench.report import human_bytes

__all__ = ["HAND", "THROUGH", "WANTED", "Row", "compared", "table", "worst"]

HAND = "by_hand"
THROUGH = "flashinfer"
WANTED = 1.03
"""What each ratio should be at most."""


@dataclass(frozen=True)
class Row:
    """One candidate at one size: median over the counted turns of the slowest rank.

    Attributes:
        collective: what is done.
        format: of a quantised norm, else None.
        candidate: ``by_hand`` with FlashInfer's own choice of its algorithm, ``by_hand:two_shot``, a backend's name for its fused
            call, ``pair:BACKEND``, or a policy.
        bytes: of a rank's tensor.
        median_us: microseconds a call.
        chosen: what the plan says that runs.
        ratio: `median_us` over that of what it is held against, or None.
        against: what that is: for ``flashinfer``, which is FlashInfer through commplane, the call by hand; for a policy the
            fastest of the fused calls and the pairs that it had to choose from.
    """

    collective: str
    format: str | None
    candidate: str
    bytes: int
    median_us: float
    chosen: str | None = None
    ratio: float | None = None
    against: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object with these names."""
        return asdict(self)


def compared(rows: Sequence[Row], policies: Mapping[str, Iterable[str]]) -> list[Row]:
    """The rows of one size with their ratios.

    Args:
        rows: of one call at one size.
        policies: the backends that each policy chooses from.
    """

    def others(row: Row) -> list[Row]:
        if row.candidate == THROUGH:
            return [r for r in rows if r.candidate == HAND]
        within = set(policies.get(row.candidate, ()))
        return [r for r in rows if r.candidate.removeprefix("pair:") in within]

    out = []
    for row in rows:
        best = min(others(row), key=lambda r: r.median_us, default=None)
        found = None if best is None else round(row.median_us / best.median_us, 3)
        out.append(row if best is None else replace(row, ratio=found, against=best.candidate))
    return out


def worst(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Of each candidate that has ratios, the largest and where, and at how many of its sizes it is more than `WANTED`."""
    out: dict[str, dict[str, Any]] = {}
    held = [(r, r.ratio) for r in rows if r.ratio is not None]
    for name in dict.fromkeys(r.candidate for r, _ in held):
        mine = [(r, ratio) for r, ratio in held if r.candidate == name]
        row, ratio = max(mine, key=lambda pair: pair[1])
        out[name] = {
            "ratio": ratio,
            "against": row.against,
            "format": row.format,
            "bytes": row.bytes,
            "wanted": WANTED,
            "above": sum(r > WANTED for _, r in mine),
            "of": len(mine),
        }
    return out


def table(rows: Sequence[Row]) -> str:
    """One line a candidate and size, and one for each ratio."""
    lines = [f"{'what':<12}{'bytes':>10}  {'candidate':<26}{'us':>10}{'ratio':>8}  against / the plan says"]
    for r in rows:
        ratio = "" if r.ratio is None else f"{r.ratio:.3f}"
        notes = " / ".join(word for word in (r.against, r.chosen) if word)
        lines.append(
            f"{r.format or 'norm':<12}{human_bytes(r.bytes):>10}  {r.candidate:<26}{r.median_us:>10.2f}{ratio:>8}  {notes}"
        )
    for name, w in worst(rows).items():
        where = f"{w['format'] or 'norm'} of {human_bytes(w['bytes'])} against {w['against']}"
        lines.append(f"{name}: worst ratio {w['ratio']:.3f} ({where}); above {w['wanted']} at {w['above']} of {w['of']}")
    return "\n".join(lines)
