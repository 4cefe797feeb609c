"""Facts about ranks and groups. Facts, not flags: each one was observed, and every rank holds the same copy."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

__all__ = ["Facts", "RankFacts", "has_ended", "pid_namespace", "process_start"]


def _start(pid: int) -> int | None:
    try:
        # The command's name is in parentheses and may hold anything, spaces and parentheses included.
        text = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if text[0] in "ZX" else int(text[19])


def process_start(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, or None if there is no such process or it is a zombie."""
    try:
        return _start(pid)
    except OSError:
        return None


def has_ended(pid: int, start: int) -> bool:
    """Whether the process with this id and start time is known to have ended.

    False where that cannot be told, such as in a process that has no file descriptor left.
    """
    try:
        return _start(pid) != start
    except OSError:
        return False


def pid_namespace() -> str:
    """Identity of this process's pid namespace: two processes with an equal one mean the same by a pid."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


@dataclass(frozen=True)
class RankFacts:
    """What one rank knows of its place.

    Attributes:
        rank: global rank.
        host: host name, for people; never used to decide anything.
        pid: process id in its own namespace.
        pid_start: start time of the process in clock ticks since boot, which makes `pid` unique.
        pid_namespace: identity of the pid namespace, so that a pid is only looked up where it means something.
        shm_domain: the lowest rank whose shared-memory segment this rank could map and read; ranks with an equal
            domain share memory. None if this rank has no shared memory.
        shm_free: bytes free in the shared-memory file system at the start, or None.
        memory_limit: bytes this process may use (the smaller of the cgroup limit and the machine), or None.
        cores: cores this process may run on (its affinity mask).
        devices: accelerators that torch sees: their names if it has used them already, else ``cuda:0`` and so on.
        machine: instruction set of the machine, such as ``x86_64``.
        python: Python's version.
        torch: torch's version, or None when torch was not imported yet.
    """

    rank: int
    host: str
    pid: int
    pid_start: int
    pid_namespace: str
    shm_domain: int | None
    shm_free: int | None
    memory_limit: int | None
    cores: tuple[int, ...]
    devices: tuple[str, ...]
    machine: str
    python: str
    torch: str | None

    def to_json(self) -> dict[str, object]:
        """A JSON object; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> RankFacts:
        """The facts of another rank, as published."""
        values = {f.name: data[f.name] for f in fields(cls)}
        values["cores"] = tuple(values["cores"])  # type: ignore[arg-type]
        values["devices"] = tuple(values["devices"])  # type: ignore[arg-type]
        return cls(**values)  # type: ignore[arg-type]


class Facts(Mapping[int, RankFacts]):
    """The facts of all ranks of a plane by global rank; equal on every rank."""

    def __init__(self, facts: Iterable[RankFacts]) -> None:
        self._by_rank = {f.rank: f for f in facts}
        self._ranks: Sequence[int] = tuple(self._by_rank)
        self._said: Sequence[Mapping[str, object]] = ()

    @classmethod
    def said(cls, facts: Sequence[Mapping[str, object]]) -> Facts:
        """From what ranks 0, 1, ... published. Those of a rank are made when they are asked for: mostly few are."""
        out = cls(())
        out._ranks, out._said = range(len(facts)), facts
        return out

    def __getitem__(self, rank: int) -> RankFacts:
        found = self._by_rank.get(rank)
        if found is None:
            if rank not in self._ranks:
                raise KeyError(rank)
            found = self._by_rank[rank] = RankFacts.from_json(self._said[rank])
        return found

    def __iter__(self) -> Iterator[int]:
        return iter(self._ranks)

    def __len__(self) -> int:
        return len(self._ranks)

    def same_host(self, ranks: Sequence[int]) -> bool:
        """Whether all `ranks` can map the same shared memory. Two containers without a shared one are two hosts."""
        domains = {self[r].shm_domain for r in ranks}
        return len(domains) == 1 and None not in domains

    def hosts(self, ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """`ranks` split into those that share memory, in order of first appearance."""
        groups: dict[object, list[int]] = {}
        for r in ranks:
            domain = self[r].shm_domain
            groups.setdefault(("alone", r) if domain is None else domain, []).append(r)
        return tuple(tuple(g) for g in groups.values())

    def describe_hosts(self, ranks: Sequence[int]) -> str:
        """The split as text: ``ranks 0, 1 on a; rank 2 on b``."""
        parts = []
        for group in self.hosts(ranks):
            word = "rank" if len(group) == 1 else "ranks"
            parts.append(f"{word} {', '.join(map(str, group))} on {self[group[0]].host}")
        return "; ".join(parts)

    def dead(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """Those of `ranks` whose process is known to have ended. Local.

        Only processes of this process's own pid namespace can be looked up; others are held to be alive.
        """
        mine = (os.getpid(), process_start(os.getpid()))
        alike = {f.pid_namespace for f in self.values() if (f.pid, f.pid_start) == mine}
        # Ranks of several containers, started together, may have equal pids and start times.
        own = pid_namespace() if len(alike) > 1 else next(iter(alike), None)
        return tuple(r for r in ranks if self[r].pid_namespace == own and has_ended(self[r].pid, self[r].pid_start))

    def oversubscribed(self, ranks: Sequence[int]) -> bool:
        """Whether, on some host, `ranks` have fewer cores in their affinity masks together than there are ranks.

        Such ranks must give up the core in every wait: a spin would hold it from the rank that is waited for.
        """
        for group in self.hosts(ranks):
            cores: set[int] = set()
            for r in group:
                cores.update(self[r].cores)
            if len(cores) < len(group):
                return True
        return False
