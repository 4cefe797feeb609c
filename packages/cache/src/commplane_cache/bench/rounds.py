"""What a sync round costs: against a synchronous gloo all-reduce of the same vector, and in a scheduler's steps.

Ranks are processes of this host. All candidates take turns in short passes of one run, so that what else the machine does falls
on all alike; times are in us. A step of a scheduler is a fixed amount of work, not a fixed time: what a round
takes from it, also by a thread that runs beside it, makes it longer.

In the steps each rank has a core of its own, as engines are started, and shares it with the thread of its round. Calls alone are
measured without that: gloo has threads, which are slower on one core.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from commplane.api import SyncField, SyncSpec, Vote
from commplane.errors import CommplaneError

__all__ = ["add_arguments", "measure", "run", "table"]

# At most this part of the all-reduce, by ranks; from the issue that asked for the package.
_TARGETS = {2: 1 / 20, 4: 1 / 50, 8: 1 / 50}
_TARGET_US = {2: 60.0}
_TARGET_LOSS = 0.01
_RESULT_WITHIN_S = 300.0
_KINDS = ("median", "quietest", "cpu")


@dataclass(frozen=True)
class _Job:
    """What one process measures: calls alone, or steps of `works`."""

    rank: int
    world_size: int
    port: int
    fields: int
    passes: int
    calls: int
    works: tuple[str, ...]
    work_ms: float
    steps: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``commplane-cache bench rounds``."""
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="sizes of groups (default 1 2 4 8)"
    )
    parser.add_argument("--fields", type=int, default=20, help="numbers that travel, in all rules (default 20)")
    parser.add_argument("--passes", type=int, default=12, help="turns of each candidate (default 12)")
    parser.add_argument("--calls", type=int, default=50, help="calls of a turn (default 50)")
    parser.add_argument("--work-ms", type=float, default=5.0, help="work of a scheduler's step in ms (default 5)")
    parser.add_argument("--steps", type=int, default=15, help="steps of a turn, 0 to leave them out (default 15)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure as the options say."""
    return measure(
        ranks=arguments.ranks,
        fields=arguments.fields,
        passes=arguments.passes,
        calls=arguments.calls,
        work_ms=arguments.work_ms,
        steps=arguments.steps,
    )


def measure(
    *,
    ranks: Sequence[int] = (1, 2, 4, 8),
    fields: int = 20,
    passes: int = 12,
    calls: int = 50,
    work_ms: float = 5.0,
    steps: int = 15,
) -> dict[str, Any]:
    """All figures, as JSON holds them. Starts and ends its own processes.

    Returns:
        ``rounds``: for each group what a call costs, in us; ``steps``: for the group of two, for each kind of work what a step
        costs, in us. Each figure is ``median``, of all calls, and ``quietest``, the lowest median of a turn: what is left where
        the machine had something else to do for most of the run; and ``cpu``, what all threads of a rank used, the median of the
        turns. ``targets`` says which were met.

    Raises:
        CommplaneError: a rank failed; its own words are in the text.
    """
    out: dict[str, Any] = {
        "fields": fields,
        "cores": len(os.sched_getaffinity(0)),
        "rounds": {},
        "steps": {},
        "targets": [],
    }
    for n in ranks:
        said = _spawn([_Job(r, n, 0, fields, passes, calls, (), work_ms, steps) for r in range(n)])
        out["rounds"][str(n)] = _slowest(said, "rounds")
        out["plan"] = said[0]["plan"]
    if steps and 2 in ranks:
        works = ("torch", "python")
        said = _spawn([_Job(r, 2, 0, fields, passes, calls, works, work_ms, steps) for r in range(2)])
        out["steps"] = {work: _slowest(said, work) for work in works}
    out["targets"] = _targets(out)
    return out


def _slowest(said: Sequence[Mapping[str, Any]], part: str) -> dict[str, dict[str, float]]:
    """Of each figure that of the slowest rank."""
    return {name: {kind: max(s[part][name][kind] for s in said) for kind in _KINDS} for name in said[0][part]}


def _targets(out: Mapping[str, Any]) -> list[dict[str, Any]]:
    wanted: list[tuple[str, float, dict[str, float]]] = []
    for n, limit in _TARGETS.items():
        found = out["rounds"].get(str(n))
        if found:
            part = {kind: found["round"][kind] / found["gloo all-reduce"][kind] for kind in _KINDS}
            wanted.append((f"round of {n} ranks, part of gloo's all-reduce", limit, part))
        if found and n in _TARGET_US:
            wanted.append((f"round of {n} ranks, us", _TARGET_US[n], found["round"]))
    for work, figures in out["steps"].items():
        loss = {kind: figures["pipelined"][kind] / figures["no round"][kind] - 1 for kind in _KINDS}
        wanted.append((f"lost of a step of {work} work, pipelined", _TARGET_LOSS, loss))
    return [{"what": what, "limit": limit, **found, "met": found["median"] <= limit} for what, limit, found in wanted]


def table(out: Mapping[str, Any]) -> str:
    """The figures for a person."""
    plan = "+".join(out["plan"]) or "nothing"
    lines = [
        f"a sync round of {out['fields']} numbers over {plan}, {out['cores']} cores",
        "us, median of all calls (median of the quietest turn)",
        "",
    ]
    names = list(dict.fromkeys(name for figures in out["rounds"].values() for name in figures))
    lines.append("ranks" + "".join(f"{name:>22}" for name in names) + f"{'gloo / round':>16}")
    for n, figures in out["rounds"].items():
        cells = [f"{_both(figures[name]):>22}" if name in figures else f"{'-':>22}" for name in names]
        ratio = "-"
        if "gloo all-reduce" in figures:
            ratio = _both({kind: figures["gloo all-reduce"][kind] / figures["round"][kind] for kind in _KINDS}, 0)
        lines.append(f"{n:>5}{''.join(cells)}{ratio:>16}")
    for work, figures in out["steps"].items():
        bare = figures["no round"]
        lines += ["", f"a step of {work} work on 2 ranks takes {_both(bare, 0)} us; with a round it takes longer by"]
        for name, found in figures.items():
            if name != "no round":
                parts = {kind: 100 * (found[kind] / bare[kind] - 1) for kind in _KINDS}
                more = {kind: found[kind] - bare[kind] for kind in _KINDS}
                lines.append(f"  {_both(more, 0):>16} us, {_both(parts, 2):>18} %, cpu {more['cpu']:>5.0f} us  {name}")
    lines.append("")
    for target in out["targets"]:
        word = "met" if target["met"] else "NOT met"
        lines.append(f"{word:>8}: {target['what']}: {_both(target, 3)}, wanted at most {target['limit']:g}")
    return "\n".join(lines)


def _both(figures: Mapping[str, float], digits: int = 1) -> str:
    return f"{figures['median']:.{digits}f} ({figures['quietest']:.{digits}f})"


def _spawn(jobs: Sequence[_Job]) -> list[dict[str, Any]]:
    """Run each job in a process of its own: what each measured, by rank."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], []
    for job in jobs:
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_main, args=(_Job(**{**job.__dict__, "port": store.port}), theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(mine)
    said: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + _RESULT_WITHIN_S
    try:
        while len(said) < len(jobs):
            ready = wait([p for r, p in enumerate(pipes) if r not in said], max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = [r for r in range(len(jobs)) if r not in said]
                raise CommplaneError(f"bench: ranks {missing} had not answered after {_RESULT_WITHIN_S:g} s")
            for pipe in ready:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    said[rank] = pipes[rank].recv()
                except EOFError:
                    said[rank] = {"error": "its process ended without a word"}
                if "error" in said[rank]:
                    raise CommplaneError(f"bench: rank {rank} of {len(jobs)}: {said[rank]['error']}")
    finally:
        for process in processes:
            process.join(10.0 if len(said) == len(jobs) else 0.0)
            if process.is_alive():
                process.kill()
                process.join()
    return [said[r] for r in range(len(jobs))]


def _main(job: _Job, pipe: Connection) -> None:
    """One rank."""
    try:
        pipe.send(_measure(job))
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"})


def _measure(job: _Job) -> dict[str, Any]:
    import torch
    from torch.distributed import TCPStore

    import commplane

    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if job.works and job.world_size <= len(cores):
        os.sched_setaffinity(0, {cores[job.rank]})
    store = TCPStore("127.0.0.1", job.port, is_master=False, timeout=timedelta(seconds=60))
    rules = list(Vote)
    spec = SyncSpec(name="bench", api=(1, 0), fields=tuple(SyncField(f"f{i}", rules[i % len(rules)]) for i in range(job.fields)))
    values = {f"bench.f{i}": i % 2 for i in range(job.fields)}
    settings = {"timeout": 60}
    with commplane.init(store=store, rank=job.rank, world_size=job.world_size, config=settings) as plane:
        shared = plane.sync_round("bench", specs=[spec])
        over_torch = plane.sync_round("bench_torch", specs=[spec], backends=["torch"])
        meeting = plane.communicator("bench_meeting", device="cpu")

        def ahead() -> None:
            shared.issue(values)
            shared.result()

        candidates: dict[str, Callable[[], Any]] = {"round": lambda: shared.step(values)}
        if job.world_size > 1:
            candidates = {"gloo all-reduce": _gloo(store, job, 3 + job.fields), **candidates}
            candidates["round, issued"] = ahead
            candidates["round over torch"] = lambda: over_torch.step(values)
        out: dict[str, Any] = {"plan": list(shared.communicators[0].plan.backends) if shared.communicators else []}
        if not job.works:
            out["rounds"] = _turns(candidates, job.passes, job.calls, meeting.barrier)
        for work in job.works:
            out[work] = _steps(work, job, shared, over_torch, values, meeting.barrier, plane)
        shared.close()
        over_torch.close()
    return out


def _gloo(store: Any, job: _Job, numbers: int) -> Callable[[], Any]:
    """A synchronous all-reduce over a bare process group of gloo."""
    import torch
    import torch.distributed as dist

    group: Any = dist.ProcessGroupGloo(dist.PrefixStore("bench", store), job.rank, job.world_size, timeout=timedelta(seconds=60))
    vector = torch.zeros(numbers, dtype=torch.int64)
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.MIN  # type: ignore[assignment]
    return lambda: group.allreduce([vector], options).wait()


def _turns(
    candidates: Mapping[str, Callable[[], Any]], passes: int, calls: int, meet: Callable[[], None]
) -> dict[str, dict[str, float]]:
    """What a call of each candidate takes in us, all taking turns; the first turn of each is not counted. Collective."""
    turns: dict[str, list[list[float]]] = {name: [] for name in candidates}
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(passes + 1):
        for name, call in candidates.items():
            meet()
            samples = []
            cpu_begun = time.process_time()
            for _ in range(calls):
                begun = time.perf_counter()
                call()
                samples.append(time.perf_counter() - begun)
            if turn:
                turns[name].append(samples)
                cpu[name].append((time.process_time() - cpu_begun) / calls)
    return {
        name: {
            "median": statistics.median(s for samples in of_all for s in samples) * 1e6,
            "quietest": min(map(statistics.median, of_all)) * 1e6,
            "cpu": statistics.median(cpu[name]) * 1e6,
        }
        for name, of_all in turns.items()
    }


def _steps(
    work: str,
    job: _Job,
    shared: Any,
    over_torch: Any,
    values: Mapping[str, int],
    meet: Callable[[], None],
    plane: Any,
) -> dict[str, dict[str, float]]:
    """What a step takes with its work in us, without a round and with one of each kind. Collective."""
    unit = _unit(work)
    amounts = plane.gather(_units_of(unit, job.work_ms / 1000), what="work of a step")
    amount = max(1, round(statistics.mean(amounts)))

    def none() -> None:
        for _ in range(amount):
            unit()

    def blocking() -> None:
        none()
        shared.step(values)

    def pipelined(sync: Any) -> Callable[[], None]:
        def step() -> None:
            sync.issue(values)
            none()
            sync.result()

        return step

    candidates = {
        "no round": none,
        "pipelined": pipelined(shared),
        "blocking": blocking,
        "pipelined over torch": pipelined(over_torch),
    }
    return _turns(candidates, job.passes, job.steps, meet)


def _unit(work: str) -> Callable[[], Any]:
    """Some 50 us of work: in torch, which leaves the interpreter to others meanwhile, or in Python, which does not."""
    import torch

    if work == "torch":
        factor = torch.randn(96, 96)
        return lambda: factor @ factor
    return lambda: sum(range(2000))


def _units_of(unit: Callable[[], Any], seconds: float) -> float:
    """How many make up `seconds` of a core."""
    best = float("inf")
    for _ in range(10):
        begun = time.thread_time()
        for _ in range(50):
            unit()
        best = min(best, (time.thread_time() - begun) / 50)
    return seconds / best
