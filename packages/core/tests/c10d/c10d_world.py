"""Processes that are the ranks of a default process group, and stay for many tests: what is sent runs on all of them at once.

They are forked by a server that has torch loaded, so a world costs little more than its process group.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

import commplane.c10d  # noqa: F401  with torch 2.4 nobody else registers it

__all__ = ["Failed", "World", "oracle"]

SECONDS = 40.0
"""That a function may take on all ranks, before the world is ended."""


class Failed(AssertionError):
    """What ranks raised, by rank."""

    def __init__(self, errors: Mapping[int, str]) -> None:
        super().__init__("\n".join(f"rank {r}:\n{text}" for r, text in sorted(errors.items())))
        self.errors = dict(errors)


@dataclass
class World:
    """A default group of `ranks` processes over `backend`.

    Attributes:
        backend: as for ``init_process_group``; None to have the function call it.
        seconds: timeout of the default group.
        env: variables of the ranks.
    """

    ranks: int = 2
    backend: str | None = "commplane"
    seconds: float = 20.0
    env: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["torch", "torch.distributed", "commplane.runtime"])
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.broken = False
        self.processes, self.ends = [], []
        for rank in range(self.ranks):
            mine, theirs = server.Pipe()
            job = (rank, self.ranks, self.backend, self.store.port, self.seconds, dict(self.env))
            process = server.Process(target=_serve, args=(theirs, *job), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.ends.append(mine)

    def run(self, function: Callable[..., Any], *args: Any, but: tuple[int, ...] = ()) -> list[Any]:
        """Call ``function(rank, *args)`` on all ranks: its results, None for the ranks of `but`, which may end in it."""
        for end in self.ends:
            end.send((function, args))
        results: list[Any] = [None] * self.ranks
        errors: dict[int, str] = {}
        open_ = {end: rank for rank, end in enumerate(self.ends) if rank not in but}
        deadline = time.monotonic() + SECONDS
        while open_:
            ready = wait(list(open_), max(0.0, deadline - time.monotonic()))
            if not ready:
                errors.update(dict.fromkeys(open_.values(), f"no answer within {SECONDS:g} s"))
                break
            for end in ready:
                assert isinstance(end, Connection)
                rank = open_.pop(end)
                try:
                    ok, value = end.recv()
                except EOFError:
                    ok, value = False, "the process ended"
                if ok:
                    results[rank] = value
                else:
                    errors[rank] = value
        if errors:
            self.broken = True
            raise Failed(errors)
        return results

    def close(self) -> None:
        """End the processes."""
        for end in self.ends:
            end.close()  # which ends their loop
        for process in self.processes:
            process.join(0.5 if self.broken else 10)
            if process.is_alive():
                process.kill()
                process.join()

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(end: Connection, rank: int, ranks: int, backend: str | None, port: int, seconds: float, env: dict[str, str]) -> None:
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), **env})
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        if backend is not None:
            dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds))
        problem = ""
    except Exception:
        problem = traceback.format_exc()
    while True:
        try:
            function, args = end.recv()
        except EOFError:
            break
        try:
            if problem:
                raise AssertionError(problem)
            end.send((True, function(rank, *args)))
        except BaseException:
            end.send((False, traceback.format_exc()))
    if dist.is_initialized():
        dist.destroy_process_group()


_gloo: list[Any] = []


def oracle() -> Any:
    """A group of Gloo over all ranks, to compare with. Collective when first called."""
    if not _gloo:
        _gloo.append(dist.new_group(backend="gloo"))
    return _gloo[0]
