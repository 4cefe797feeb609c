"""What the figures of `commplane bench` on GPUs say of custom_ar. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["LIMIT", "NCCL", "OURS", "verdict"]

OURS, NCCL = "custom_ar", "torch"
LIMIT = 8 << 20
"""Bytes up to which we mean to be the fastest of all; above, not slower than NCCL."""

Rows = Sequence[Mapping[str, Any]]


def verdict(rows: Rows) -> list[str]:
    """At which sizes custom_ar is the fastest up to `LIMIT`, and not slower than NCCL above: a line for each kind of call. Pure.

    Once with ordinary tensors on all sides, and once where each side may have its tensor in symmetric memory.
    """
    lines = []
    calls = dict.fromkeys((r["collective"], r["graph"], r.get("groups", 1), r["ranks"]) for r in rows)
    for collective, graph, groups, ranks in calls:
        of_call = [r for r in rows if (r["collective"], r["graph"], r.get("groups", 1)) == (collective, graph, groups)]
        who = f"{ranks} ranks" if groups == 1 else f"{groups} groups of {ranks} ranks"
        subject = f"{collective}, {who}, {'in graphs' if graph else 'eager'}"
        for words, fits in (("ordinary tensors", _ordinary), ("any memory", lambda _row: True)):
            found = _against([r for r in of_call if fits(r)])
            lines += [f"{subject}, {words}: {line}" for line in found]
        lines += [f"{subject}: {line}" for line in _crossing(of_call)]
    return lines


def _ordinary(row: Mapping[str, Any]) -> bool:
    return "symmetric" not in row["mode"]


def _against(rows: Rows) -> list[str]:
    """Up to `LIMIT` against all others, above against NCCL. Pure."""
    goals: list[tuple[str, Callable[[int], bool], Callable[[str], bool]]] = [
        ("the fastest up to 8 MiB", lambda n: n <= LIMIT, lambda backend: backend.partition(":")[0] != OURS),
        ("not slower than NCCL above", lambda n: n > LIMIT, lambda backend: backend == NCCL),
    ]
    lines = []
    for goal, at, other in goals:
        sizes = sorted({r["bytes"] for r in rows if at(r["bytes"])})
        compared, missed, unserved = 0, [], []
        for n in sizes:
            ours = [r for r in rows if r["bytes"] == n and r["backend"] == OURS]
            others = [r for r in rows if r["bytes"] == n and other(r["backend"])]
            if not others:
                continue
            if not ours:
                unserved.append(f"{n} bytes")
                continue
            compared += 1
            mine, best = min(ours, key=_us), min(others, key=_us)
            if _us(mine) > _us(best):
                names = f"{_us(mine):.2f} us, {best['backend']} {best['mode']} {_us(best):.2f}"
                missed.append(f"{n} bytes ({names}, {_us(mine) / _us(best):.2f})")
        if compared or unserved:
            line = f"{goal} at {compared - len(missed)} of {compared} sizes"
            line += f"; not at {', '.join(missed)}" if missed else ""
            lines.append(line + (f"; {OURS} does not serve {', '.join(unserved)}" if unserved else ""))
    return lines


def _crossing(rows: Rows) -> list[str]:
    """From which size on our two-shot is faster than our one-shot, at every larger one too. Pure."""
    one, two = ({r["bytes"]: _us(r) for r in rows if _forced(r, name)} for name in ("one_shot_push", "two_shot_push"))
    sizes = sorted(one.keys() & two.keys())
    if not sizes:
        return []
    slower = [n for n in sizes if two[n] >= one[n]]
    later = [n for n in sizes if not slower or n > slower[-1]]
    return [
        f"two_shot_push is faster than one_shot_push {f'from {later[0]} bytes up' if later else 'at no size that was measured'}"
    ]


def _forced(row: Mapping[str, Any], algorithm: str) -> bool:
    """The all-reduce alone: what a norm is made of has an entry of its own in the table."""
    return bool(row["backend"] == f"{OURS}:{algorithm}" and row["mode"] == "staged")


def _us(row: Mapping[str, Any]) -> float:
    return float(row["median_us"])
