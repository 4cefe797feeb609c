# SPDX-License-Identifier: Apache-2.0
"""custom_ar against the other ways to all-reduce between the processes of one host, in one run on one machine.

python packages/comm-custom-ar/benchmarks/field.py --ranks 2 --json field.json

Every library that is installed is called from Python on torch tensors, in place, sum. All of them have their ranks started at
the beginning and take turns, round by round; those that wait are blocked on a socket. The first pass does not count. Each sum
is checked before anything is timed. What is not installed is left out, and the report says so; see the package's README for how
to install it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from field_candidates import CANDIDATES, Missing, Setup, candidates
from field_group import Group, GroupFailed, close_all
from field_report import REFERENCE, Row, behind, ratios, times

from commplane.cli.parse import DTYPE_ALIASES, parse_size

__all__ = ["main"]

_SIZES = "64,1K,8K,64K,256K,1M,4M,16M,64M"
# A turn, and bounds on its calls; where so few take longer than the last figure, one has to do.
_TURN_S = 0.03
_MIN_CALLS, _MAX_CALLS, _LONG_S = 3, 5000, 0.3


class Field:
    """The groups that take turns, and what they have shown so far.

    Attributes:
        groups: those still in the run.
        entries: a group and a row that it fills, in the order of the report.
        left_out: reasons, by what is not in the rows.
    """

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.entries: list[tuple[Group, Row]] = []
        self.left_out: dict[str, str] = {}

    def start(self, names: Sequence[str], setup: Setup, max_bytes: int) -> None:
        """Start the ranks of every library that is there."""
        for name in names:
            try:
                for candidate in candidates(name, setup):
                    _say(f"starting {candidate.label}")
                    try:
                        self.groups.append(Group(candidate, setup, max_bytes))
                    except GroupFailed as error:
                        self.left_out[candidate.label] = str(error)
            except Missing as error:
                self.left_out[name] = str(error)

    def prepare(self, steps: Sequence[tuple[str, int]], ways: dict[str, list[bool]]) -> None:
        """Check every sum, make the rows, and find how many calls fill a turn. The turns of this first pass do not count."""
        for group in list(self.groups):
            label = group.candidate.label
            _say(f"checking {label}")
            with self._or_drop(group):
                for dtype, nbytes in steps:
                    refusal = group.ask(do="prepare", dtype=dtype, bytes=nbytes)[0]["refusal"]
                    if refusal is not None:
                        self.left_out[f"{label}, {dtype}"] = refusal
                        continue
                    for pinned in ways[group.candidate.name]:
                        row = Row(group.candidate.name, label, pinned, dtype, nbytes, _MIN_CALLS)
                        for _ in range(2):  # a few calls, then about as many as a turn will have
                            row.calls = _calls_for(max(a["mean_us"] for a in _turn(group, row)) / 1e6)
                        self.entries.append((group, row))

    def rounds(self, number: int) -> None:
        """Let every candidate have its turn at every step, `number` times, a different one first each time."""
        for done in range(number):
            _say(f"round {done + 1} of {number}")
            for step in dict.fromkeys((row.dtype, row.bytes) for _, row in self.entries):
                present = [(g, row) for g, row in self.entries if (row.dtype, row.bytes) == step]
                first = done % len(present)
                for group, row in present[first:] + present[:first]:
                    if group in self.groups:
                        with self._or_drop(group):
                            row.add(_turn(group, row))

    @property
    def rows(self) -> list[Row]:
        """Of the groups that came through."""
        return [row for group, row in self.entries if group in self.groups]

    def _or_drop(self, group: Group) -> _Drop:
        return _Drop(self, group)


class _Drop:
    """A context in which a `GroupFailed` takes the group out of the run, with its reason."""

    def __init__(self, run: Field, group: Group) -> None:
        self.run, self.group = run, group

    def __enter__(self) -> None:
        return

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if not isinstance(error, GroupFailed):
            return False
        self.run.groups.remove(self.group)
        self.run.left_out[self.group.candidate.label] = str(error)
        self.group.close(force=True)
        return True


def _calls_for(seconds: float) -> int:
    """Calls in a turn when one takes `seconds`. Pure."""
    if seconds * _MIN_CALLS > _LONG_S:
        return 1
    return int(min(_MAX_CALLS, max(_MIN_CALLS, _TURN_S / seconds)))


def _turn(group: Group, row: Row) -> list[dict[str, Any]]:
    return group.ask(do="turn", dtype=row.dtype, bytes=row.bytes, calls=row.calls, pinned=row.pinned)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _placements(pin: str | None, setup: Setup) -> dict[str, list[bool]]:
    """Pinned or not or both, by library; both where it is not known which is better: for gloo, and with more ranks than cores."""
    if pin is not None:
        return dict.fromkeys(CANDIDATES, {"on": [True], "off": [False], "both": [True, False]}[pin])
    return {name: [True, False] if setup.oversubscribed or name == "gloo" else [True] for name in CANDIDATES}


def _report(run: Field, setup: Setup, rounds: int) -> tuple[str, dict[str, Any]]:
    """For people, and as JSON."""
    rows, reference = run.rows, next(g for g in run.groups if g.candidate.name == REFERENCE)
    machine = {**reference.about["machine"], "command": shlex.join(["field.py", *sys.argv[1:]])}
    parts = [
        f"{setup.ranks} ranks on {setup.cores} cores, all-reduce sum in place, median of {rounds} rounds, slowest rank; load of "
        f"the minute before {machine['load_before']}"
    ]
    for dtype in dict.fromkeys(row.dtype for row in rows):
        parts += filter(None, [times(rows, dtype), ratios(rows, dtype)])
    slower, others = behind(rows), {row.candidate for row in rows} - {REFERENCE}
    verdict = f"none of {', '.join(sorted(others))} is faster than {REFERENCE}" if others else "nothing else was measured"
    parts.append("\n".join([f"faster than {REFERENCE}:", *slower]) if slower else verdict)
    versions = [f"{g.candidate.label}: {g.about['version']}{g.candidate.note and f' ({g.candidate.note})'}" for g in run.groups]
    parts += ["\n".join(versions), *(f"left out: {name}: {reason}" for name, reason in run.left_out.items())]
    parts.append(f"on a {reference.about['words']}")
    libraries = [
        {
            "label": g.candidate.label,
            "settings": dict(g.candidate.settings),
            "note": g.candidate.note,
            **{key: value for key, value in g.about.items() if key not in ("machine", "words")},
        }
        for g in run.groups
    ]
    answer = {
        "machine": {**machine, "words": reference.about["words"]},
        "ranks": setup.ranks,
        "cores": setup.cores,
        "rounds": rounds,
        "libraries": libraries,
        "left_out": run.left_out,
        f"faster_than_{REFERENCE}": slower,
        "rows": [row.to_json() for row in rows],
    }
    return "\n\n".join(parts), answer


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="custom_ar against the other ways to all-reduce on one host")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of each candidate, 2 to 16 (default 2)")
    parser.add_argument("--sizes", default=_SIZES, help=f"bytes of a rank's tensor (default {_SIZES})")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="default float32,bfloat16")
    parser.add_argument("--candidates", default=",".join(CANDIDATES), help=f"default {','.join(CANDIDATES)}")
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds (default 9)")
    parser.add_argument(
        "--pin",
        choices=["on", "off", "both"],
        help="each rank on one core (default on, gloo both; both for all where ranks outnumber cores)",
    )
    parser.add_argument(
        "--field",
        type=Path,
        default=Path(sys.prefix) / "field",
        help="folder with the MPI libraries and vLLM's source (default: field in Python's own prefix)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and all rounds as JSON")
    options = parser.parse_args()
    options.candidates = [word.strip() for word in options.candidates.split(",") if word.strip()]
    unknown = sorted(set(options.candidates) - CANDIDATES.keys())
    if unknown:
        parser.error(f"--candidates: wanted some of {', '.join(CANDIDATES)}, found {', '.join(unknown)}")
    if not 2 <= options.ranks <= 16:  # the most that the kernels compared here take
        parser.error(f"--ranks: wanted 2 to 16, found {options.ranks}")
    if options.rounds < 1:
        parser.error(f"--rounds: wanted 1 or more, found {options.rounds}")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        parser.error(f"--json: the folder of {str(options.json)!r} does not exist")
    try:
        options.sizes = [parse_size(word) for word in options.sizes.split(",")]
    except argparse.ArgumentTypeError as error:
        parser.error(f"--sizes: {error}")
    options.dtypes = [DTYPE_ALIASES.get(word.strip(), word.strip()) for word in options.dtypes.split(",")]
    return options


def main() -> int:
    """Run and print."""
    options = _options()
    setup = Setup(options.ranks, len(os.sched_getaffinity(0)), options.field.resolve())
    steps = [(dtype, nbytes) for dtype in options.dtypes for nbytes in options.sizes]
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))  # so that no rank is left behind
    run = Field()
    try:
        run.start([REFERENCE, *(n for n in options.candidates if n != REFERENCE)], setup, max(options.sizes))
        run.prepare(steps, _placements(options.pin, setup))
        if any(g.candidate.name == REFERENCE for g in run.groups):
            run.rounds(options.rounds)
        if not any(g.candidate.name == REFERENCE for g in run.groups):
            _say(f"{REFERENCE} did not come through: {run.left_out[REFERENCE]}")
            return 1
        text, answer = _report(run, setup, options.rounds)
    finally:
        with suppress(KeyboardInterrupt):
            close_all(run.groups)
    sys.stdout.write(f"{text}\n")
    if options.json is not None:
        options.json.write_text(json.dumps(answer, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
