"""A transfer engine of a page: memory of one host that the peer maps, and a thread that copies. Passes all of the kit."""

from __future__ import annotations

import json
import mmap
import os
import threading
import zlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commplane.api import Moved, TransferContext, TransferEngine
from commplane.errors import CommplaneError, PeerError


def began(pid: int) -> str:
    """When a process began, by which a later one of the same number is told apart; nothing if it is gone."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if words[0] == "Z" else words[19]


class HonestEngine(TransferEngine):
    def __init__(self) -> None:
        self.context: TransferContext | None = None
        self.pool: memoryview | None = None
        self.fds: list[int] = []
        self.peers: dict[str, dict[str, Any]] = {}
        self.jobs: deque[tuple[int, str, list[tuple[int, int, int]]]] = deque()
        self.ended: list[Moved] = []
        self.tickets, self.copying, self.dropped = 0, "", set[int]()
        self.changed = threading.Condition()

    def open(self, context: TransferContext) -> None:
        if context.options:
            raise CommplaneError(f"there is no option {', '.join(context.options)}")
        self.context, self.closing = context, False
        self.thread = threading.Thread(target=self.copy_all, daemon=True)
        self.thread.start()

    def file(self, nbytes: int) -> int:
        fd = os.memfd_create("honest")
        os.ftruncate(fd, nbytes)
        return fd

    def allocate(self, nbytes: int) -> memoryview:
        self.fds.append(self.file(nbytes))
        return memoryview(mmap.mmap(self.fds[-1], nbytes))

    def register(self, pool: memoryview) -> None:
        if self.pool is not None:
            raise CommplaneError("there is a pool already")
        self.pool = pool

    def metadata(self) -> bytes:
        assert self.pool is not None
        words = [os.getpid(), began(os.getpid()), self.fds[-1] if self.fds else -1, self.pool.nbytes, id(self)]
        text = json.dumps(words).encode()
        return text + b" %08x" % zlib.crc32(text)

    def read_metadata(self, metadata: bytes) -> list[Any]:
        text, _, checksum = metadata.rpartition(b" ")
        if checksum != b"%08x" % zlib.crc32(text):
            raise CommplaneError("that is no metadata of this engine")
        return json.loads(text)  # type: ignore[no-any-return]

    def connect(self, peer: str, metadata: bytes) -> None:
        if self.context is None:
            raise CommplaneError("not open")
        pid, start, fd, nbytes, _ = self.read_metadata(metadata)
        self.disconnect(peer)
        if began(pid) != start:
            raise PeerError(f"{peer} is gone")
        with open(f"/proc/{pid}/fd/{fd}", "r+b") as file:
            memory = memoryview(mmap.mmap(file.fileno(), nbytes))
        self.peers[peer] = {"memory": memory, "pid": pid, "start": start, "fd": fd}

    def is_there(self, peer: dict[str, Any]) -> bool:
        return began(peer["pid"]) == peer["start"] and os.path.lexists(f"/proc/{peer['pid']}/fd/{peer['fd']}")

    def check(self, peer: str, pieces: list[tuple[int, int, int]]) -> None:
        for start, to, n in pieces:
            if n <= 0 or start < 0 or to < 0 or start + n > self.pool.nbytes or to + n > self.peers[peer]["memory"].nbytes:
                raise CommplaneError(f"{n} bytes from {start} to {to} are outside of a pool")

    def submit(self, peer: str, local: Sequence[int], remote: Sequence[int], nbytes: int | Sequence[int]) -> int:
        if self.context is None or peer not in self.peers:
            raise CommplaneError(f"{peer} is not connected")
        sizes = [nbytes] * len(local) if isinstance(nbytes, int) else list(nbytes)
        if not len(local) == len(remote) == len(sizes):
            raise CommplaneError("there are not as many of each")
        pieces = list(zip(local, remote, sizes, strict=True))
        self.check(peer, pieces)
        with self.changed:
            self.tickets += 1
            self.jobs.append((self.tickets, peer, pieces))
            self.changed.notify_all()
            return self.tickets

    def copy_all(self) -> None:
        while True:
            with self.changed:
                self.copying = ""
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.jobs or self.closing)
                if self.closing:
                    return
                ticket, peer, pieces = self.jobs.popleft()
                self.copying, target = peer, self.peers[peer]
            self.copy(ticket, target, pieces)
            self.end(ticket, None if self.is_there(target) else f"{peer} is gone")
            target = None

    def copy(self, ticket: int, target: dict[str, Any], pieces: list[tuple[int, int, int]]) -> None:
        for start, to, n in pieces:
            target["memory"][to : to + n] = self.pool[start : start + n]

    def end(self, ticket: int, error: str | None) -> None:
        with self.changed:
            self.ended.append(Moved(ticket, error))
            self.changed.notify_all()

    def poll(self, timeout: float = 0.0) -> list[Moved]:
        with self.changed:
            self.changed.wait_for(lambda: self.ended, timeout)
            out, self.ended = self.ended, []
            return out

    def drop(self, wanted: Any, error: str) -> None:
        with self.changed:
            gone = [job for job in self.jobs if wanted(job)]
            self.jobs = deque(job for job in self.jobs if not wanted(job))
        for job in gone:
            self.end(job[0], error)

    def cancel(self, ticket: int) -> None:
        self.drop(lambda job: job[0] == ticket, "cancelled")

    def disconnect(self, peer: str) -> None:
        self.drop(lambda job: job[1] == peer, "disconnected")
        with self.changed:
            self.changed.wait_for(lambda: self.copying != peer)
        self.peers.pop(peer, None)

    def close(self) -> None:
        if self.context is None:
            return
        for peer in list(self.peers):
            self.disconnect(peer)
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        self.thread.join()
        for fd in self.fds:
            os.close(fd)
        self.context, self.pool, self.fds = None, None, []


class WritesBeside(HonestEngine):
    def copy(self, ticket: int, target: dict[str, Any], pieces: list[tuple[int, int, int]]) -> None:
        for start, to, n in pieces:
            more = min(-n % 8, self.pool.nbytes - start - n, target["memory"].nbytes - to - n)
            target["memory"][to : to + n + more] = self.pool[start : start + n + more]


class JoinsWhatAdjoinsHere(HonestEngine):
    def copy(self, ticket: int, target: dict[str, Any], pieces: list[tuple[int, int, int]]) -> None:
        at = None
        for index, (start, to, n) in enumerate(pieces):
            follows = index and start == pieces[index - 1][0] + pieces[index - 1][2]
            at = at if follows and at is not None else to
            target["memory"][at : at + n] = self.pool[start : start + n]
            at += n


class TellsTooEarly(HonestEngine):
    def copy(self, ticket: int, target: dict[str, Any], pieces: list[tuple[int, int, int]]) -> None:
        threading.Timer(0.05, super().copy, (ticket, target, pieces)).start()


class TellsTwice(HonestEngine):
    def end(self, ticket: int, error: str | None) -> None:
        super().end(ticket, error)
        if ticket % 50 == 0:
            super().end(ticket, error)


class ForgetsTheCancelled(HonestEngine):
    def cancel(self, ticket: int) -> None:
        with self.changed:
            self.jobs = deque(job for job in self.jobs if job[0] != ticket)


class ForgetsTheDisconnected(HonestEngine):
    def drop(self, wanted: Any, error: str) -> None:
        if error == "cancelled":
            super().drop(wanted, error)
            return
        with self.changed:
            self.jobs = deque(job for job in self.jobs if not wanted(job))


class WritesWhatIsInside(HonestEngine):
    def check(self, peer: str, pieces: list[tuple[int, int, int]]) -> None:
        for index, piece in enumerate(pieces):
            try:
                super().check(peer, [piece])
            except CommplaneError:
                self.copy(0, self.peers[peer], pieces[:index])
                raise


class BelievesAnything(HonestEngine):
    def read_metadata(self, metadata: bytes) -> list[Any]:
        try:
            return json.loads(metadata.rpartition(b" ")[0])  # type: ignore[no-any-return]
        except ValueError as error:
            raise CommplaneError("that is no metadata of this engine") from error


class DeadCountsAsMoved(HonestEngine):
    def is_there(self, peer: dict[str, Any]) -> bool:
        return True


class KeepsADescriptor(HonestEngine):
    def close(self) -> None:
        if self.context is not None and self.fds:
            os.dup(self.fds[0])
        super().close()


class LeavesAName(HonestEngine):
    def file(self, nbytes: int) -> int:
        fd = os.open(f"/dev/shm/subject-{os.getpid()}-{id(self)}", os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, nbytes)
        return fd


class LandsLater(HonestEngine):
    def drop(self, wanted: Any, error: str) -> None:
        with self.changed:
            late = [job for job in self.jobs if wanted(job)]
        super().drop(wanted, error)
        for ticket, peer, pieces in late:
            threading.Timer(0.7, self.copy, (ticket, self.peers[peer], pieces)).start()


class OneLossLosesAll(HonestEngine):
    lost = False

    def is_there(self, peer: dict[str, Any]) -> bool:
        self.lost = self.lost or not super().is_there(peer)
        return not self.lost


CAUGHT_BY = {
    "WritesBeside": "bytes::test_odd_sizes_at_odd_offsets_and_nothing_beside_them",
    "JoinsWhatAdjoinsHere": "bytes::test_pieces_that_adjoin_at_one_end_only",
    "TellsTooEarly": "bytes::test_an_end_says_that_the_reader_can_read_it",
    "TellsTwice": "bytes::test_each_of_many_tickets_ends_once",
    "ForgetsTheCancelled": "life::test_a_cancelled_ticket_ends_once",
    "ForgetsTheDisconnected": "life::test_a_disconnect_ends_open_transfers_with_an_error",
    "WritesWhatIsInside": "refusals::test_a_piece_outside_of_a_pool_and_nothing_of_its_transfer_is_written[only-the-last-one]",
    "BelievesAnything": "refusals::test_metadata_that_is_not_whole_or_not_of_this_engine",
    "DeadCountsAsMoved": "faults::test_a_killed_peer",
    "KeepsADescriptor": "life::test_close_leaves_no_descriptor_and_no_thread",
    "LeavesAName": "life::test_no_name_outlives_an_end[kill]",
    "LandsLater": "faults::test_nothing_lands_after_the_end_of_a_ticket",
    "OneLossLosesAll": "faults::test_a_lost_peer_bears_on_no_other[kill]",
}
"""Wrong engine -> the test that is meant for it."""
