"""What a leader publishes, N values for N ranks, without saying the same thing N times.

Every rank reads all of it, so that what it holds counts N times N. Equal values are written once, with the ranks that have them;
of objects with the same keys, such as the facts of ranks, the same goes for each entry. Nothing is lost: `unpack` gives back what
`pack` was given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from commplane.select import Gathered

__all__ = ["pack", "unpack"]


def pack(values: Sequence[Any], at: Sequence[int] | None = None) -> dict[str, Any]:
    """A JSON object that stands for JSON values. Pure.

    Args:
        values: what to write; with `at`, all different.
        at: for each position the index of its value. If unset, `values` are the positions' own.
    """
    if at is None:
        index: dict[str, int] = {}
        # By their text, because to Python 1, 1.0 and True are equal.
        at = [index.setdefault(json.dumps(value), len(index)) for value in values]
        first = dict(zip(reversed(at), range(len(at) - 1, -1, -1), strict=True))
        values = [values[first[i]] for i in range(len(index))]
    out: dict[str, Any] = {"n": len(at)}
    if len(values) == 1:
        return {**out, "same": values[0]}
    if len(values) < len(at):
        out["runs"] = [number for i, run in groupby(at) for number in (i, sum(1 for _ in run))]
    keys = list(values[0]) if isinstance(values[0], dict) else None
    if keys is not None and all(isinstance(value, dict) and list(value) == keys for value in values):
        out["entries"] = {key: pack([value[key] for value in values]) for key in keys}
    else:
        out["values"] = list(values)
    return out


def unpack(packed: Mapping[str, Any]) -> Gathered:
    """The values that `pack` was given. Pure."""
    size = packed["n"]
    if "same" in packed:
        return Gathered([(packed["same"], range(size))], size)
    if "entries" in packed:
        columns = [unpack(column) for column in packed["entries"].values()]
        values: list[Any] = [dict(zip(packed["entries"], row, strict=True)) for row in zip(*columns, strict=True)]
    else:
        values = packed["values"]
    if "runs" not in packed:
        return Gathered([(value, (i,)) for i, value in enumerate(values)], size)
    positions: list[list[int]] = [[] for _ in values]
    start = 0
    for i, length in zip(packed["runs"][::2], packed["runs"][1::2], strict=True):
        positions[i].extend(range(start, start + length))
        start += length
    return Gathered(list(zip(values, positions, strict=True)), size)
