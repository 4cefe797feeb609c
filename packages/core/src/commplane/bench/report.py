"""Rows as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commplane.bench.measure import Row
from commplane.errors import ConfigError

__all__ = ["human_bytes", "plot", "require_plotting", "table"]


def human_bytes(n: int) -> str:
    """``65536`` as ``64 KiB``."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size and n % size == 0:
            return f"{n // size} {unit}"
    return f"{n} B"


def _label(row: Row) -> str:
    return row.backend if row.backend == "torch" else f"{row.backend} {row.mode}"


def table(rows: Sequence[Row]) -> str:
    """Medians in microseconds a call, and in brackets how many times faster than torch, one table a dtype."""
    out = []
    for dtype in dict.fromkeys(r.dtype for r in rows):
        mine = [r for r in rows if r.dtype == dtype]
        labels = list(dict.fromkeys(map(_label, mine)))
        out.append(f"all_reduce sum, {dtype}, {mine[0].ranks} ranks, {mine[0].device}: median us a call (times torch)")
        out.append(f"{'bytes':>10}" + "".join(f"{label:>26}" for label in labels))
        for nbytes in dict.fromkeys(r.bytes for r in mine):
            cells = {_label(r): r for r in mine if r.bytes == nbytes}
            line = f"{human_bytes(nbytes):>10}"
            for label in labels:
                row = cells.get(label)
                factor = "" if row is None or row.vs_torch is None or row.backend == "torch" else f" ({row.vs_torch:.1f}x)"
                line += f"{'-' if row is None else f'{row.median_us:.2f}{factor}':>26}"
            out.append(line)
        out.append("")
    return "\n".join(out).rstrip()


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
    """Latency against size, both logarithmic, one panel a dtype, one line a backend and mode."""
    plt = require_plotting()
    dtypes = list(dict.fromkeys(r.dtype for r in rows))
    figure, axes = plt.subplots(1, len(dtypes), figsize=(6.4 * len(dtypes), 4.8), sharey=True, squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for label in dict.fromkeys(map(_label, rows)):
            line = sorted((r.bytes, r.median_us, r.p99_us) for r in rows if r.dtype == dtype and _label(r) == label)
            if line:
                x, median, p99 = zip(*line, strict=True)
                (drawn,) = axis.plot(x, median, marker="o", label=label)
                axis.fill_between(x, median, p99, color=drawn.get_color(), alpha=0.12)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        ticks = sorted({r.bytes for r in rows if r.dtype == dtype})
        axis.set_xticks(ticks, [human_bytes(t) for t in ticks], rotation=45, ha="right")
        axis.set_xlabel("message a rank")
        axis.set_title(f"all_reduce sum, {dtype}, {rows[0].ranks} ranks, {rows[0].device}")
        axis.grid(True, which="major", alpha=0.3)
    axes[0][0].set_ylabel("latency, us (median; shaded up to the 99th percentile)")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
