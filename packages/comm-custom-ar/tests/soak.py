"""Kill ranks at random moments, again and again, and look at what the others do: `python soak.py --kills 1000 --seed 7`.

Each iteration forks 2 to 4 ranks, which make a plane and a communicator and run random collectives, and kills some of them: one,
two, or all, at once or after a while in which they are stopped. Then every survivor has to end by itself, long before its
deadline, with an error that names only ranks that were killed (or without one, where nothing was left to do with them). A later
call on the communicator raises, close works, no result was wrong, no process remains, and nothing is left in shared memory, at
the latest after the next start.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a process that forks ranks has no other thread

import torch.distributed
from car_forks import Ranks
from soak_rank import MOST_BYTES, PHASES, Plan, live

import commplane_custom_ar.backend
from commplane.api import sweep
from commplane.api.shm import SHM_DIRECTORY, owner
from commplane.testing import Outcome

# Survivors are given this long after the last kill. Their deadline in a collective is several times as long, so who ends in time
# has not sat it out. That of start-up is shorter: before the facts are exchanged nobody knows whose process to look at.
PATIENCE_S = 90.0
RUN_TIMEOUT_S = 600
STARTUP_TIMEOUT_S = 20
MOMENTS = ["init", "communicator", "empty", "prepare", "call", "close"]
WEIGHTS = [2, 23, 10, 10, 47, 8]


def plan_of(seed: str) -> Plan:
    """What happens in an iteration: the same for the same seed but for who is how quick."""
    draw = random.Random(seed)
    world_size = draw.choice([2, 2, 3, 3, 4])
    how = draw.choices(["one", "two", "all", "stop"], [60, 15, 10, 15])[0]
    number = {"one": 1, "two": min(2, world_size - 1), "all": world_size, "stop": 1}[how]
    moment = draw.choices(MOMENTS, WEIGHTS)[0]
    order = list(range(world_size))
    draw.shuffle(order)
    return {
        "seed": seed,
        "world_size": world_size,
        "order": order,
        "how": how,
        "victims": draw.sample(range(world_size), number),
        "moment": moment,
        "delay": draw.choice([0.0, draw.uniform(0, 0.003), draw.uniform(0, 0.1), draw.uniform(0, 0.5)]),
        "between": draw.choice([0.0, draw.uniform(0, 0.3)]),
        "calls": draw.randrange(5) if moment == "close" else 1_000_000,
        "settings": {
            "startup_timeout": STARTUP_TIMEOUT_S,
            "run_timeout": RUN_TIMEOUT_S,
            "custom_ar": {
                "chunk_bytes": draw.choice([4096, 65536, 65536, 1 << 20]),
                "single_copy": draw.choice(["auto", "auto", "off", f"1:{MOST_BYTES}"]),
                "binding": draw.choice(["auto", "auto", "auto", "ctypes"]),
            },
        },
    }


@dataclass
class Tally:
    """What was seen so far."""

    killed: int = 0
    iterations: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    left_for_next_start: int = 0
    calls: int = 0
    slowest: dict[str, float] = field(default_factory=dict)  # seconds to the end of the last survivor, by moment
    failures: list[str] = field(default_factory=list)

    def line(self) -> str:
        """The summary."""

        def shown(counts: Counter[str]) -> str:
            return ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))

        slowest = ", ".join(f"{name} {seconds:.1f}" for name, seconds in sorted(self.slowest.items()))
        return (
            f"soak: {self.killed} ranks killed in {self.iterations} iterations ({shown(self.ways)}), in {shown(self.moments)}; "
            f"survivors: {shown(self.outcomes)}, after {self.calls} checked calls; seconds from the kill to the end of the last "
            f"survivor, at most: {slowest}; {self.left_for_next_start} names left for the next start; "
            f"{len(self.failures)} iterations failed"
        )


def kill(ranks: Ranks, plan: Plan, board: mmap.mmap) -> Counter[str]:
    """Wait for the moment, and kill: in which phase each victim was."""
    first, target = plan["victims"][0], PHASES.index(plan["moment"])
    deadline = time.monotonic() + PATIENCE_S
    while board[first] < target and first in ranks.running() and time.monotonic() < deadline:
        time.sleep(0.0001)
    time.sleep(plan["delay"])
    seen: Counter[str] = Counter()
    for i, victim in enumerate(plan["victims"]):
        if i:
            time.sleep(plan["between"] if plan["how"] == "two" else plan["between"] / 10)
        if plan["how"] == "stop":
            ranks.kill(victim, signal.SIGSTOP)
            time.sleep(plan["between"])
        seen[PHASES[board[victim]]] += 1
        ranks.kill(victim)
    return seen


def judge(plan: Plan, outcome: Outcome, moments: Counter[str]) -> str | None:
    """What is wrong with how a survivor ended."""
    said, killed = outcome.result, plan["victims"]
    if outcome.returncode is None:
        return f"had not ended {PATIENCE_S:g} s after the kill"
    if outcome.returncode != 0 or said is None:
        return f"exit status {outcome.returncode}, {outcome.error}: {outcome.message}"
    if said.get("wrong"):
        return f"a wrong result: {said['wrong']}"
    if not said["closed"]:
        return "close did not work"
    if said["error"] is None:
        # Nothing may have been left to do with the killed ranks; where they had calls to come, something was.
        early = [phase for phase in moments if PHASES.index(phase) < PHASES.index("close")]
        return f"finished without them, though they were killed in {', '.join(early)}" if early else None
    named = said["missing"]
    if said["error"] == "PeerError":
        if not named or not set(named) <= set(killed):
            return f"blames {named}: {said['text']}"
    elif said["error"] not in ("AgreementError", "PeerFailed"):
        return f"another error: {said['error']}: {said['text']}"
    elif not any(re.search(rf"ranks? [0-9, ]*\b{rank}\b", said["text"]) for rank in killed):
        return f"does not name the killed: {said['text']}"
    if said["phase"] == "call" and not re.search(r" custom_ar\] \w+(\(.*\))? number \d+: ", said["text"]):
        return f"does not name operation and number: {said['text']}"
    again = said["again"]
    if again is not None and (again.get("error") != said["error"] or "poisoned" not in again["text"]):
        return f"a later call: {again}, after {said['text']}"
    return None


def names_of(pids: list[int]) -> set[str]:
    """Names in shared memory that these processes made."""
    found = ((path.name, owner(path.name)) for path in SHM_DIRECTORY.iterdir())
    return {name for name, who in found if who is not None and who.pid in pids}


def iteration(seed: str, tally: Tally) -> list[str]:
    """One group of ranks from start to end; what went wrong."""
    plan = plan_of(seed)
    world_size, victims = plan["world_size"], plan["victims"]
    problems = []
    with tempfile.TemporaryDirectory() as folder, mmap.mmap(-1, mmap.PAGESIZE) as board:
        ranks = Ranks(world_size, live, (plan, board), Path(folder), {"COMMPLANE_FLIGHT_DIR": folder})
        moments = kill(ranks, plan, board)
        last_kill = time.monotonic()
        outcomes = ranks.end(PATIENCE_S)
        seconds = time.monotonic() - last_kill
    for o in outcomes:
        if o.rank in victims:
            if o.returncode not in (-signal.SIGKILL, 0):
                problems.append(f"rank {o.rank}, which was to be killed: exit status {o.returncode}: {o.output}")
            continue
        problem = judge(plan, o, moments)
        if problem is not None:
            problems.append(f"rank {o.rank} {problem}\n{o.output}".rstrip())
        else:
            tally.outcomes[o.result["error"] or "finished"] += 1
            tally.calls += o.result["calls"]
    if len(victims) == world_size:
        tally.outcomes["none"] += 1
    problems += processes_left() + names_left(ranks.pids, [ranks.pids[v] for v in victims], tally)
    tally.killed += sum(o.returncode == -signal.SIGKILL for o in outcomes if o.rank in victims)
    tally.iterations += 1
    tally.moments += moments
    tally.ways[plan["how"]] += 1
    moment = next(iter(moments))
    tally.slowest[moment] = max(tally.slowest.get(moment, 0.0), seconds)
    return problems


def processes_left() -> list[str]:
    """Whether this process has children: all of an iteration have been waited for."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:  # none, as it has to be
        return []
    return [f"process {pid} was never waited for: {status}" if pid else "a process remains"]


def names_left(pids: list[int], killed: list[int], tally: Tally) -> list[str]:
    """What outlived the iteration in shared memory, and the start after it."""
    problems = []
    left = names_of(pids)
    if left - names_of(killed):
        problems.append(f"left in shared memory by survivors: {sorted(left - names_of(killed))}")
    if left:
        tally.left_for_next_start += len(left)
        sweep()  # what a start begins with
        if names_of(pids):
            problems.append(f"left in shared memory after the next start: {sorted(names_of(pids))}")
    return problems


def main() -> int:
    """Run it; 1 if an iteration failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, metavar="N", help="stop when so many ranks were killed (default 1000)")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), metavar="S", help="of everything random (default: the time)"
    )
    parser.add_argument("--first", type=int, default=0, metavar="I", help="iteration to begin with, to repeat one (default 0)")
    parser.add_argument("--quiet", action="store_true", help="print failures and the summary alone")
    options = parser.parse_args()
    loaded = (torch.distributed, commplane_custom_ar.backend)  # before a rank is forked, so that none has to
    assert all(module.__name__ in sys.modules for module in loaded)
    tally = Tally()
    number = options.first
    print(f"soak: seed {options.seed}", flush=True)
    while tally.killed < options.kills:
        problems = iteration(f"{options.seed}/{number}", tally)
        if problems:
            tally.failures.append(str(number))
            repeat = f"python {sys.argv[0]} --seed {options.seed} --first {number} --kills 1"
            print(f"soak: iteration {number} failed: {plan_of(f'{options.seed}/{number}')}\nrepeat with: {repeat}")
            print(*problems, sep="\n", flush=True)
        number += 1
        if not options.quiet and tally.iterations % 50 == 0:
            print(tally.line(), flush=True)
    print(tally.line(), flush=True)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
