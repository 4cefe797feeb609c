"""One end of transfers in a process of its own: what a test has it do, and how the process begins and ends."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import hashlib
import mmap
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from commplane.api import Moved, TransferContext, TransferEngine
from commplane.errors import CommplaneError, PeerError
from commplane_conformance.provider import load

__all__ = ["End", "main"]

_PR_SET_PDEATHSIG = 1


class End:
    """An engine with its pool. Methods are called by name from the test's process; arguments and results are pickled."""

    def __init__(self, factory: str) -> None:
        self.name = ""
        self._factory = factory
        self._made: TransferEngine | None = None
        self.pool = memoryview(b"")

    @property
    def engine(self) -> TransferEngine:
        """The one that `open` made."""
        assert self._made is not None, f"{self.name} was not opened"
        return self._made

    def open(self, name: str, options: Mapping[str, Any], timeout: float, host: str) -> None:
        """A new engine, open."""
        self.name = name
        self._made = load(self._factory)()
        self.engine.open(TransferContext(self.name, host=host, timeout=timeout, options=options))

    def take_pool(self, nbytes: int, own: bool = False) -> bytes:
        """Register zeroed memory, of the engine's or of this end's own: the metadata."""
        self.pool = memoryview(mmap.mmap(-1, nbytes)) if own else self.engine.allocate(nbytes)
        self.engine.register(self.pool)
        return self.engine.metadata()

    def try_pool(self, nbytes: int) -> str | None:
        """Register more memory: the refusal, or None."""
        try:
            self.engine.register(memoryview(mmap.mmap(-1, nbytes)))
        except CommplaneError as error:
            return str(error)
        return None

    def allocated(self, nbytes: int) -> tuple[bool, int]:
        """Whether what the engine allocates is zeroed, and how far from a page's start it begins."""
        memory = self.engine.allocate(nbytes)
        return not any(memory), ctypes.addressof(ctypes.c_char.from_buffer(memory)) % mmap.PAGESIZE

    def metadata(self) -> bytes:
        """Of the engine."""
        return self.engine.metadata()

    def connect(self, peer: str, metadata: bytes) -> None:
        """Of the engine."""
        self.engine.connect(peer, metadata)

    def disconnect(self, peer: str) -> None:
        """Of the engine."""
        self.engine.disconnect(peer)

    def submit(self, peer: str, local: Sequence[int], remote: Sequence[int], nbytes: int | Sequence[int]) -> int:
        """Of the engine."""
        return self.engine.submit(peer, local, remote, nbytes)

    def submit_many(self, peer: str, count: int, nbytes: int) -> list[int]:
        """`count` transfers of the first `nbytes` of the pool: their tickets."""
        return [self.engine.submit(peer, [0], [0], nbytes) for _ in range(count)]

    def submit_while_it_lives(self, peer: str, count: int, nbytes: int) -> list[int]:
        """Up to `count` such transfers, one after the other until the peer is refused: their tickets."""
        tickets: list[int] = []
        try:
            while len(tickets) < count:
                tickets.append(self.engine.submit(peer, [0], [0], nbytes))
        except CommplaneError:
            return tickets
        return tickets

    def cancel(self, ticket: int) -> None:
        """Of the engine."""
        self.engine.cancel(ticket)

    def poll(self, timeout: float) -> list[Moved]:
        """Of the engine."""
        return self.engine.poll(timeout)

    def ends(self, tickets: Sequence[int], seconds: float) -> dict[int, str | None]:
        """The error of each ticket's end.

        Raises:
            AssertionError: one did not end within `seconds`, or ended twice, or one ended that nobody asked for.
        """
        found: dict[int, str | None] = {}
        deadline = time.monotonic() + seconds
        while len(found) < len(tickets):
            rest = deadline - time.monotonic()
            assert rest > 0, f"{len(tickets) - len(found)} of {len(tickets)} tickets did not end within {seconds:g} s"
            for moved in self.engine.poll(min(rest, 0.5)):
                assert moved.ticket in tickets, f"ticket {moved.ticket} ended, which is none of {tickets}"
                assert moved.ticket not in found, f"ticket {moved.ticket} ended twice"
                found[moved.ticket] = moved.error
        return found

    def move(
        self, peer: str, local: Sequence[int], remote: Sequence[int], nbytes: int | Sequence[int], seconds: float = 30.0
    ) -> str | None:
        """One transfer to its end: its error."""
        return self.ends([self.engine.submit(peer, local, remote, nbytes)], seconds).popitem()[1]

    def fill(self, seed: int) -> None:
        """Random bytes, the same for one seed."""
        self.pool[:] = random.Random(seed).randbytes(self.pool.nbytes)

    def write(self, offset: int, data: bytes) -> None:
        """Into the pool."""
        self.pool[offset : offset + len(data)] = data

    def read(self, offset: int, nbytes: int) -> bytes:
        """Out of the pool."""
        return bytes(self.pool[offset : offset + nbytes])

    def digest(self) -> str:
        """Of the whole pool."""
        return hashlib.blake2b(self.pool, digest_size=16).hexdigest()

    def digests(self, seconds: float) -> tuple[str, str]:
        """Of the whole pool now, and `seconds` later."""
        before = self.digest()
        time.sleep(seconds)
        return before, self.digest()

    def where(self) -> int:
        """The pool's address in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.pool))

    def close(self) -> None:
        """Of the engine."""
        self.engine.close()

    def held(self) -> dict[str, list[str]]:
        """Descriptors that are open and threads that run, by what they are, without those of this process's own."""
        gc.collect()
        links = []
        for path in Path("/proc/self/fd").iterdir():
            try:
                links.append(re.sub(r"\[\d+\]", "", str(path.readlink())))
            except OSError:  # the one that lists the folder
                continue
        return {"descriptors": sorted(links), "threads": sorted(t.name for t in threading.enumerate())}

    def forget(self) -> None:
        """Close the engine, and drop it and the pool."""
        if self._made is not None:
            self._made.close()
        self._made, self.pool = None, memoryview(b"")
        gc.collect()

    def names(self) -> list[str]:
        """Names that others could find: files in shared memory that are open or mapped, and sockets in the file system."""
        inodes, found = set(), set[str]()
        for path in Path("/proc/self/fd").iterdir():
            try:
                link = str(path.readlink())
            except OSError:
                continue
            if match := re.fullmatch(r"socket:\[(\d+)\]", link):
                inodes.add(match[1])
            elif link.startswith("/dev/shm/") and not link.endswith(" (deleted)"):
                found.add(link)
        for line in Path("/proc/self/maps").read_text().splitlines():
            path_of = line.partition("/dev/shm/")[2]
            if path_of and not path_of.endswith(" (deleted)"):
                found.add(f"/dev/shm/{path_of}")
        for line in Path("/proc/self/net/unix").read_text().splitlines()[1:]:
            words = line.split(maxsplit=7)
            # Not those that the kernel made up for a socket that has to have one.
            if len(words) == 8 and words[6] in inodes and not re.fullmatch(r"@[0-9a-f]{5}", words[7]):
                found.add(words[7])
        return sorted(found)


def main(pipe: Connection, factory: str, log: str) -> None:
    """Do what comes through the pipe, one call at a time, until it is closed."""
    # A stopped end must not outlive a test run that was killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    faulthandler.enable(open(2, "w", closefd=False))  # noqa: SIM115 - stays open
    end = End(factory)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            sys.exit(0)
        try:
            answer = (True, getattr(end, method)(*arguments))
        except (CommplaneError, AssertionError) as error:
            # As one of the classes that both processes know.
            kind = next(k for k in (PeerError, CommplaneError, AssertionError) if isinstance(error, k))
            answer = (False, kind(str(error)))
        except BaseException as error:  # whatever the engine raises is the test's to judge
            answer = (False, RuntimeError(f"{type(error).__name__}: {error}"))
        pipe.send(answer)
