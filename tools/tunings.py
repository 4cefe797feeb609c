"""Make a file of timings that core ships, in packages/core/src/commplane/tunings: python tools/tunings.py FILE ... --out JSON.

A FILE is what ``commplane bench --graph --json`` wrote, or what ``commplane tune --out`` did. All are of one device and of as
many ranks on one host. What a later one has of a call replaces what an earlier one has of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from commplane.select import Curve, Timings

__all__ = ["main", "made"]

# What the modes of the bench are called where a plan has them: whole calls by the backend's name, pairs by what they are made of.
# The rest of them are of tensors in symmetric memory, which no plan can count on.
_CANDIDATES = {"staged": "{}", "fused": "{}", "pair": "composed:{}"}


def made(paths: Sequence[Path]) -> str:
    """The text of the file.

    Raises:
        ValueError: the files do not belong together, or are of another kind.
    """
    facts: dict[str, Any] = {}
    timings = Timings()
    for path in paths:
        data = json.loads(path.read_text(encoding="utf-8"))
        if "rows" in data:
            found, curves = _where(data["machine"]), _of_bench(data["rows"])
        else:
            found = {key: data["facts"].get(key) for key in ("device", "ranks", "hosts", "gpus")}
            curves = list(Timings.from_json(data["timings"]).curves)
        missing = [key for key, value in found.items() if value is None]
        if missing:
            raise ValueError(f"{path}: wanted facts with {', '.join(missing)}, found {data['facts']}: measure anew")
        if found["gpus"] != found["ranks"]:
            raise ValueError(f"{path}: wanted a GPU for each rank, found {found}: ranks that share one are slower")
        if len(found["hosts"]) != 1 or found["device"].startswith("cpu"):
            raise ValueError(f"{path}: wanted GPUs of one host, found {found}: times of anything else hold for one machine alone")
        if facts and facts != found:
            raise ValueError(f"{path}: wanted times of {facts} as in the files before, found {found}")
        facts = found
        timings = timings.merged(c for c in curves if c.points and not c.failed)
    content = {"version": 2, "made_of": [p.name for p in paths], "facts": facts, "timings": timings.to_json()}
    return json.dumps(content, indent=1) + "\n"


def _where(machine: Mapping[str, Any]) -> dict[str, Any]:
    names = set(machine["gpus"])
    if len(names) != 1:
        raise ValueError(f"wanted GPUs of one kind, found {sorted(names)}")
    ranks = machine["ranks"]
    gpus = 1 if machine.get("mps_share_percent") else min(ranks, len(machine["gpus"]))
    return {"device": names.pop(), "ranks": ranks, "hosts": [ranks] * machine["hosts"], "gpus": gpus}


def _hidden(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The last dimension that most norms had: the plan has one curve a candidate, and small tensors are of shorter rows."""
    found = [row["hidden"] for row in rows if row["hidden"] is not None]
    return max(dict.fromkeys(found), key=found.count, default=None)


def _of_bench(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    if any(row.get("groups", 1) != 1 for row in rows):
        raise ValueError("wanted rows of one group that has the machine to itself, found groups side by side")
    points: dict[tuple[Any, ...], dict[int, float]] = {}
    hidden = _hidden(rows)
    for row in rows:
        # An algorithm that was asked for by name is no candidate of a plan, which leaves the choice to the backend.
        if row["mode"] not in _CANDIDATES or row["in_place"] or ":" in row["backend"] or row["device"] != "cuda":
            continue
        if row["hidden"] is not None and row["hidden"] != hidden:
            continue
        candidate = _CANDIDATES[row["mode"]].format(row["backend"])
        key = (row["collective"], row["op"], row["dtype"], row["graph"], candidate, row["hidden"] or 0)
        if row["bytes"] in points.setdefault(key, {}):
            raise ValueError(f"wanted one row of each size, found two of {row['bytes']} bytes of {key}")
        points[key][row["bytes"]] = row["median_us"]
    return [
        Curve(collective, op, dtype, graph, candidate, tuple(sorted(of_it.items())), hidden=hidden)
        for (collective, op, dtype, graph, candidate, hidden), of_it in points.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        options.out.write_text(made(options.files), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
