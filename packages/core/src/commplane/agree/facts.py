"""Observe this process, exchange, and hold the same facts on every rank."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from commplane.agree.bootstrap import StoreBootstrap
from commplane.agree.shared_memory import ProofSegment, maps
from commplane.api import Facts, RankFacts
from commplane.api.facts import pid_namespace, process_start
from commplane.api.shm import SHM_DIRECTORY, sweep

__all__ = ["exchange_facts", "observe"]


def _memory_limit() -> int | None:
    limits = []
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    with contextlib.suppress(OSError, ValueError):  # a system that does not tell: the cgroup limit, if any, is known
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


def _devices() -> tuple[str, ...]:
    torch = sys.modules.get("torch")
    if torch is None:
        return ()
    # Counting goes through the management library. Names would create a context, which a process that forks later must not
    # have: they are told where there is one already.
    count = torch.cuda.device_count()
    if torch.cuda.is_initialized():
        return tuple(torch.cuda.get_device_name(i) for i in range(count))
    return tuple(f"cuda:{i}" for i in range(count))


def _cores() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def observe(rank: int) -> RankFacts:
    """This process, without `shm_domain`, which takes an exchange. Local."""
    torch = sys.modules.get("torch")
    return RankFacts(
        rank=rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        pid_start=process_start(os.getpid()) or 0,
        pid_namespace=pid_namespace(),
        shm_domain=None,
        shm_free=shutil.disk_usage(SHM_DIRECTORY).free if SHM_DIRECTORY.is_dir() else None,
        memory_limit=_memory_limit(),
        cores=_cores(),
        devices=_devices(),
        machine=platform.machine(),
        python=platform.python_version(),
        torch=None if torch is None else str(torch.__version__),
    )


def exchange_facts(bootstrap: StoreBootstrap, host_alias: str) -> Facts:
    """Observe, prove who shares memory with whom, and gather. Collective over the plane, three rounds.

    Ranks with different `host_alias` are never held to share memory.
    """
    sweep()
    mine = observe(bootstrap.rank)
    hello = bootstrap.gather({"facts": mine.to_json(), "alias": host_alias}, what="facts")
    aliases: Sequence[str] = [h["alias"] for h in hello]
    proof = ProofSegment()
    try:
        segments = bootstrap.gather([proof.name, proof.digest], what="shared-memory proof")
        domain = next((r for r, s in enumerate(segments) if aliases[r] == host_alias and maps(*s)), None)
        domains = bootstrap.gather(domain, what="shared-memory proof, answers")
    except BaseException:
        sweep()  # a peer may have been killed before it could remove its name
        raise
    finally:
        proof.unlink()
    return Facts.said([{**h["facts"], "shm_domain": d} for h, d in zip(hello, domains, strict=True)])
