"""Rows as a table and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from commplane.bench.measure import Row
from commplane.bench.null import NAME as NULL
from commplane.bench.overhead import CALLS, OverheadRow, Spread
from commplane.errors import ConfigError

__all__ = ["human_bytes", "overhead_table", "plot", "require_plotting", "table"]

_GAP = 2


def human_bytes(n: int) -> str:
    """``65536`` as ``64 KiB``."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size and n % size == 0:
            return f"{n // size} {unit}"
    return f"{n} B"


def _label(row: Row) -> str:
    return row.backend if (row.backend, row.mode) == ("torch", "staged") or row.dtype is None else f"{row.backend} {row.mode}"


def _subject(row: Row) -> str:
    """What the rows of one table and one panel have in common."""
    parts = [" ".join(word for word in (row.collective, row.op) if word)]
    if row.collective == "all_reduce" and not row.in_place:
        parts[0] += " out of place"
    parts += [row.dtype] if row.dtype else []
    ranks = f"{row.ranks} ranks" if row.groups == 1 else f"{row.groups} groups of {row.ranks} ranks at once"
    return ", ".join([*parts, ranks, f"{row.device} graph" if row.graph else row.device])


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.1f}x"


def _cell(row: Row | None, fused: bool) -> str:
    """The median and one ratio, so that lines stay readable: to the pair where anything is fused, else to torch."""
    if row is None:
        return "-"
    if fused:
        ratio = "" if row.vs_pair is None else f"{row.vs_pair:.2f}x"
    else:
        ratio = "" if row.vs_torch is None or row.backend == "torch" else _times(row.vs_torch)
    return f"{row.median_us:.2f}" + (f" ({ratio})" if ratio else "")


def table(rows: Sequence[Row]) -> str:
    """Medians in microseconds a call, and in brackets how many times faster than torch; one table a collective and dtype.

    Where a collective is fused, the brackets hold how many times faster than the same backend's pair instead.
    Each backend and mode has a column, or two where it was measured both pinned and free.
    """
    return "\n\n".join(
        _one_table(subject, [r for r in rows if _subject(r) == subject]) for subject in dict.fromkeys(map(_subject, rows))
    )


def _one_table(subject: str, rows: Sequence[Row]) -> str:
    ways = [on for on in (True, False) if any(r.pinned is on for r in rows)]
    labels = list(dict.fromkeys(map(_label, rows)))
    found = {(_label(r), r.pinned, r.bytes): r for r in rows}
    sizes = list(dict.fromkeys(r.bytes for r in rows))
    fused = any(r.vs_pair is not None for r in rows)
    texts = {key: _cell(found.get(key), fused) for key in ((label, on, n) for label in labels for on in ways for n in sizes)}
    words = {True: "pinned", False: "free"}
    widths = {
        (label, on): _GAP + max(len(words[on]), *(len(texts[label, on, n]) for n in sizes)) for label in labels for on in ways
    }
    for label in labels:  # the label stands above all of its columns
        widths[label, ways[0]] += max(0, _GAP + len(label) - sum(widths[label, on] for on in ways))
    stub = [human_bytes(n) if rows[0].dtype else "-" for n in sizes]
    left = max(len("bytes"), *map(len, stub))
    how = "" if len(ways) > 1 else f", {words[ways[0]] if ways[0] else 'not pinned'}"
    reference = ("its own pair" if fused else "torch") + (" at its better" if len(ways) > 1 else "")
    against = f" (times {reference})" if fused or any(r.vs_torch for r in rows) else ""
    out = [f"{subject}{how}: median us a call{against}"]
    heads = "".join(f"{label:>{sum(widths[label, on] for on in ways)}}" for label in labels)
    if len(ways) > 1:
        out.append(" " * left + heads)
        heads = "".join(f"{words[on]:>{widths[label, on]}}" for label in labels for on in ways)
    out.append(f"{'bytes':>{left}}{heads}")
    for n, name in zip(sizes, stub, strict=True):
        out.append(f"{name:>{left}}" + "".join(f"{texts[label, on, n]:>{widths[label, on]}}" for label in labels for on in ways))
    return "\n".join([*out, *_algorithms(rows)])


def _algorithms(rows: Sequence[Row]) -> list[str]:
    """A line for each backend and mode that has names for what it ran: at which sizes."""
    sizes: dict[str, dict[str, list[str]]] = {}
    for r in rows:
        if r.algorithm is not None:
            at = sizes.setdefault(_label(r), {}).setdefault(r.algorithm, [])
            at += [] if human_bytes(r.bytes) in at else [human_bytes(r.bytes)]
    return [
        f"{label}: " + "; ".join(f"{algorithm} at {', '.join(at)}" for algorithm, at in found.items())
        for label, found in sizes.items()
    ]


def overhead_table(rows: Sequence[OverheadRow]) -> str:
    """Medians in nanoseconds a call, and in brackets what that is more than the native call; one table a dtype and size.

    ``noise`` is a difference that is lost in the waiting, see `Spread.noise`.
    """
    groups: dict[str, list[OverheadRow]] = {}
    for r in rows:
        subject = f"all_reduce {r.op}, {r.dtype}, {human_bytes(r.bytes)}, {r.device}, {'pinned' if r.pinned else 'not pinned'}"
        groups.setdefault(subject, []).append(r)
    return "\n\n".join(_overhead(subject, group) for subject, group in groups.items())


def _overhead(subject: str, rows: Sequence[OverheadRow]) -> str:
    found = {(r.backend, r.flight_records, r.call): r for r in rows}
    heads = {r.backend: "dispatch alone*" if r.backend == NULL else f"{r.backend}, {r.ranks} ranks" for r in rows}
    lines: list[list[str]] = [["", *heads.values()]]
    blocks: list[tuple[str, bool, Callable[[OverheadRow], str]]] = [
        (f"{'with' if on else 'without'} flight records", on, _layer) for on in (True, False)
    ]
    blocks.append(("what flight records add", True, lambda row: _more(row.over_unrecorded)))
    for title, recorded, show in blocks:
        shown = {name: [found.get((b, recorded, call)) for b in heads] for call, name in CALLS.items()}
        texts = {name: [show(row) if row is not None else "" for row in cells] for name, cells in shown.items()}
        if any(text for cells in texts.values() for text in cells):
            lines.append([title, *("" for _ in heads)])
            lines.extend([f"  {name}", *(text or "-" for text in cells)] for name, cells in texts.items() if any(cells))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    out = [f"{subject}: median ns a call (more than the native call alone)"]
    for line in lines:
        cells_ = "".join(f"{text:>{width + _GAP}}" for text, width in zip(line[1:], widths[1:], strict=True))
        out.append((f"{line[0]:<{widths[0]}}" + cells_).rstrip())
    if NULL in heads:
        out.append("* no transport: a group of one rank whose backend returns at once, out of place with a copy")
    return "\n".join(out)


def _layer(row: OverheadRow) -> str:
    more = _more(row.over_bare) if row.call != "bare" else ""
    return f"{row.time.median_ns:.0f}" + (f" ({more})" if more else "")


def _more(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return "noise" if spread.noise else f"{spread.median_ns:+.0f}"


def require_plotting() -> Any:
    """Matplotlib's pyplot, drawing into files. Raises `ConfigError` where it is not installed: call it before measuring."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ConfigError(f"--plot wants matplotlib, which does not import: {error}; pip install commplane[plot]") from error
    return plt


def plot(rows: Sequence[Row], path: Path) -> None:
    """Latency against size, both logarithmic: a row of panels a collective, a column a dtype; a barrier has no size.

    One colour a backend and mode; free is dashed where both were measured.
    """
    plt = require_plotting()
    drawn = [r for r in rows if r.dtype is not None]
    collectives = list(dict.fromkeys(r.collective for r in drawn))
    dtypes = list(dict.fromkeys(str(r.dtype) for r in drawn))
    size = (6.4 * len(dtypes), 4.8 * len(collectives))
    figure, axes = plt.subplots(len(collectives), len(dtypes), figsize=size, sharey="row", squeeze=False)
    for i, collective in enumerate(collectives):
        for axis, dtype in zip(axes[i], dtypes, strict=True):
            _draw(axis, [r for r in drawn if (r.collective, r.dtype) == (collective, dtype)])
        axes[i][0].set_ylabel("median latency, us")
        axes[i][-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.02, 1.0))  # beside the panels, over no line
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _draw(axis: Any, rows: Sequence[Row]) -> None:
    both = len({r.pinned for r in rows}) > 1
    for number, label in enumerate(dict.fromkeys(map(_label, rows))):
        for on in (True, False):
            line = sorted((r.bytes, r.median_us) for r in rows if _label(r) == label and r.pinned is on)
            if not line:
                continue
            x, median = zip(*line, strict=True)
            name = f"{label}, {'pinned' if on else 'free'}" if both else label
            style: dict[str, Any] = {"linestyle": "--", "markerfacecolor": "none"} if both and not on else {}
            axis.plot(x, median, color=f"C{number}", label=name, marker="o", markersize=4, **style)
    ticks = sorted({r.bytes for r in rows})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(ticks, [human_bytes(t) for t in ticks], rotation=45, ha="right")
    axis.set_xlabel("input tensor of a rank")
    axis.set_title(_subject(rows[0]))
    axis.grid(True, which="major", alpha=0.3)
