"""``commplane-cache demo``: a real model on TP x CP processes, the same conversations without and with the cache."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from commplane.errors import CommplaneError, ConfigError
from commplane_cache.demo.chart import can_draw, draw
from commplane_cache.demo.faults import KINDS, parse_fault
from commplane_cache.demo.job import CacheJob, Job, PassJob
from commplane_cache.demo.launch import Ended, Ranks
from commplane_cache.demo.report import Pass, differences, gather_passes, summary, table
from commplane_cache.demo.scratch import scratch
from commplane_cache.demo.stream import Shape
from commplane_cache.demo.text import read_sentences
from commplane_cache.options import WRITES
from commplane_cache.prefetch import POLICIES

__all__ = ["add_arguments", "run"]

_GRIDS = ("1x1", "2x1", "1x2", "2x2")
_LIMIT = 300.0
"""Seconds that the ranks may take from start to end. The deadlines of their own are far below."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--ranks", default="2x2", metavar="TPxCP", choices=_GRIDS, help=f"{', '.join(_GRIDS)} (default 2x2)")
    parser.add_argument(
        "--policy", default="wait_complete", choices=POLICIES, help="when a prefetch from storage ends (default wait_complete)"
    )
    parser.add_argument(
        "--write", default="write_through", choices=WRITES, help="when pages go to host and storage (default write_through)"
    )
    parser.add_argument("--store", default="slab", metavar="NAME", help="page store of the storage tier (default slab)")
    parser.add_argument(
        "--store-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the store; {rank} stands for the rank. slab and lmdb get a folder of their own a rank if none is given",
    )
    parser.add_argument("--pipelined", action="store_true", help="a step's round is read in the next step")
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KIND@RANK",
        help=f"spoil a rank's storage on purpose: {', '.join(KINDS)}; answers must stay the same",
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="what people talk about, one sentence a line (default built in)"
    )
    parser.add_argument("--conversations", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="of each conversation (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the stream (default 0)")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="for cache.json and cache.png (default out)")


def run(arguments: argparse.Namespace) -> int:
    """The whole demo: 0 only if all answers are the same, in every pass and on every rank, and the cache saved work."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("the demo wants torch, which is not installed: pip install 'commplane-cache[torch]'")
    tp, cp = map(int, arguments.ranks.split("x"))
    shape = Shape(conversations=arguments.conversations, turns=arguments.turns, seed=arguments.seed)
    faults = {rank: kind for kind, rank in (parse_fault(text, tp * cp) for text in arguments.fault)}
    out: Path = arguments.out
    with scratch(out) as folder:
        cache = CacheJob(
            policy=arguments.policy,
            write=arguments.write,
            store=arguments.store,
            options=_store_options(arguments.store, arguments.store_option, folder),
            pipelined=arguments.pipelined,
        )
        job = Job(tp, cp, shape, (), read_sentences(arguments.text), revision=f"demo {folder.name}")
        print(f"{shape.conversations} conversations of {shape.turns} turns, {tp * cp} processes: TP {tp} x CP {cp}")
        print(f"policy {cache.policy}, {cache.write}, store {cache.store}", *(f", {f}" for f in arguments.fault), sep="")
        print("\n== the processes start; the stream without the cache, then with it", flush=True)
        first = _start(job, (PassJob("without"), PassJob("with the cache", cache)), faults, folder / "first")
        print("\n== they have ended and start again: memory is empty, storage is not", flush=True)
        again = _start(job, (PassJob("after a restart", cache),), faults, folder / "again")
    runs = [[*a, *b] for a, b in zip(first, again, strict=True)]
    wrong = differences(runs)
    _show(runs[0], job, wrong)
    _leave(runs[0], arguments, out)
    return 1 if wrong else 0


def _store_options(store: str, given: Sequence[str], folder: Path) -> dict[str, str]:
    """What was given, and for stores in a folder one that goes away with the demo."""
    options = {}
    for text in given:
        name, sep, value = text.partition("=")
        if not sep:
            raise ConfigError(f"store option {text!r}: wanted NAME=VALUE")
        options[name] = value
    if store in ("slab", "lmdb"):
        options.setdefault("path", str(folder.absolute() / "storage-{rank}"))
    return options


def _start(job: Job, passes: Sequence[PassJob], faults: Mapping[int, str], folder: Path) -> list[list[Pass]]:
    """Start all ranks, wait for their end: by rank, the passes.

    Raises:
        CommplaneError: a rank failed; what others say beside it is on standard error.
    """
    jobs = [
        replace(job, passes=tuple(one.on_rank(fault=faults.get(rank, "")) for one in passes)) for rank in range(job.tp * job.cp)
    ]
    with Ranks(jobs, folder, progress=True) as ranks:
        ended = ranks.wait(_LIMIT)
    failed = [e for e in ended if e.returncode != 0]
    if failed:
        first = _first(failed)
        for e in failed:
            if e.said.get("message") != first.said.get("message"):
                print(e.line(), file=sys.stderr)
        raise CommplaneError(first.line())
    return gather_passes(ended)


def _first(ended: Sequence[Ended]) -> Ended:
    """Who tells most: a rank that died on its own, else one that says why."""
    return min(ended, key=lambda e: (e.returncode is None, "error" in e.said, e.rank))


def _show(passes: Sequence[Pass], job: Job, wrong: Sequence[str]) -> None:
    page = job.page_tokens
    print(f"\n== what came of it (a page of the group: {page} tokens)")
    print(table(passes, page))
    print()
    for line in summary(passes, page):
        print(f"  {line}")
    if wrong:
        print("demo: wrong:", *wrong, sep="\n  ", file=sys.stderr)
    else:
        print(f"  answers are the same in all passes and on all ranks: {sum(len(r.answer) for r in passes[0].requests)} tokens")


def _leave(passes: Sequence[Pass], arguments: argparse.Namespace, out: Path) -> None:
    file, picture = out / "cache.json", out / "cache.png"
    options = {name: str(value) for name, value in vars(arguments).items() if name not in ("command", "out")}
    file.write_text(json.dumps({"options": options, "cores": os.cpu_count(), "passes": [asdict(p) for p in passes]}, indent=1))
    if can_draw():
        draw(passes, f"commplane-cache demo, TPxCP {arguments.ranks}, {arguments.policy}, {arguments.write}", picture)
        print(f"\nwrote {file} and {picture}")
    else:
        print(f"\nwrote {file}; for the chart: pip install 'commplane-cache[plot]'")
