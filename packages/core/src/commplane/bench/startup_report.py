"""What starting up costs as a table, in words and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from commplane.bench.report import require_plotting
from commplane.bench.startup import STEPS, StartupRow, growth

__all__ = ["plot_startup", "startup_table"]

_HEADS = (
    "ranks",
    "step",
    "seconds",
    "fastest",
    "slowest",
    "CPU s",
    "store alone",
    "rounds",
    "messages",
    "a rank and round",
    "bytes a rank",
)
_WORDS = {
    "round": "one round, all ranks say the same",
    "gather": "one round, every rank says something else",
    "agree": "agreement of one communicator",
    "init": "commplane.init",
    "communicator": "Plane.communicator",
}


def startup_table(rows: Sequence[StartupRow]) -> str:
    """One line a step and number of ranks, and below how each step grows."""
    lines = [_HEADS, *map(_cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADS))]
    out = ["start-up of virtual ranks over a TCPStore: median seconds from the first rank that begins to the last that is done"]
    for line in lines:
        cells = (
            f"{text:<{width}}" if i == 1 else f"{text:>{width}}" for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        out.append("  ".join(cells).rstrip())
    return "\n".join([*out, *(text for step in STEPS if (text := _growth(rows, step)))])


def _cells(r: StartupRow) -> tuple[str, ...]:
    times = (r.seconds, r.low, r.high, r.cpu_seconds, r.store_alone)
    each = f"{r.per_rank_and_round:.2f}"
    return (
        str(r.ranks),
        r.step,
        *(f"{t:.3f}" for t in times),
        str(r.rounds),
        str(r.messages),
        each,
        str(round((r.sent + r.received) / r.ranks)),
    )


def _growth(rows: Sequence[StartupRow], step: str) -> str:
    """How one step grows, in words: over all sizes, and with the last doubling or what comes nearest."""
    power = growth(rows, step)
    if power is None:
        return ""
    mine = sorted((r for r in rows if r.step == step), key=lambda r: r.ranks)
    before, last = mine[-2:]
    messages = {r.ranks: r.per_rank_and_round for r in mine}
    return (
        f"{_WORDS[step]}: seconds grow as ranks^{power:.2f} from {mine[0].ranks} to {last.ranks} ranks, "
        f"{last.seconds / before.seconds:.2f} times from {before.ranks} to {last.ranks}; messages a rank and round from "
        f"{min(messages.values()):.2f} to {max(messages.values()):.2f}"
    )


def plot_startup(rows: Sequence[StartupRow], path: Path) -> None:
    """Seconds against ranks, both logarithmic: a line a step, dashed what the store alone takes for the same messages."""
    plt = require_plotting()
    figure, axis = plt.subplots(figsize=(7.2, 4.8))
    for number, step in enumerate(STEPS):
        mine = sorted((r for r in rows if r.step == step), key=lambda r: r.ranks)
        ranks = [r.ranks for r in mine]
        axis.plot(ranks, [r.seconds for r in mine], color=f"C{number}", marker="o", markersize=4, label=_WORDS[step])
        axis.plot(
            ranks,
            [r.store_alone for r in mine],
            color=f"C{number}",
            linestyle="--",
            marker="o",
            markersize=4,
            markerfacecolor="none",
        )
    ticks = sorted({r.ranks for r in rows})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.set_xlabel("virtual ranks on this machine")
    axis.set_ylabel("median seconds, dashed: the store alone")
    axis.grid(True, which="major", alpha=0.3)
    axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
