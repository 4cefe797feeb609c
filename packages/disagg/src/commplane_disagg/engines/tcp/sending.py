"""The end that writes: streams to one peer, a thread for each, and batches that any of them takes next."""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from commplane.errors import CommplaneError, PeerError
from commplane_disagg.engines.base import Ends
from commplane_disagg.engines.pieces import Pieces
from commplane_disagg.engines.tcp import wire
from commplane_disagg.engines.tcp.receiving import left, tune
from commplane_disagg.resolve import resolve

__all__ = ["Outgoing", "connect_stream"]

_LEAST_BATCH = 1 << 20
_MOST_BATCH = 4 << 20
_ASK_SECONDS = 0.1
"""Without an answer, after which the kernel is asked; most batches are answered sooner."""
_BYTES_ACKED = struct.Struct("@Q"), 120
"""Type and offset of `tcpi_bytes_acked` in Linux's `struct tcp_info` (linux/tcp.h, from Linux 4.1 on)."""


@dataclass(eq=False)
class _Transfer:
    """One ticket. `sent` counts what a stream has taken, whether it is out already or not."""

    ticket: int
    total: int
    batches: Iterator[list[tuple[int, int, int]]]
    sent: int = 0
    done: int = 0
    is_cancelled: bool = False


def _batches(pieces: Pieces, most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Runs of at most `most` bytes together."""
    batch: list[tuple[int, int, int]] = []
    total = 0
    for piece in pieces.joined(most):
        if batch and (total + piece[2] > most or len(batch) == wire.MOST_PIECES):
            yield batch
            batch, total = [], 0
        batch.append(piece)
        total += piece[2]
    if batch:
        yield batch


def connect_stream(
    address: tuple[str, int], token: bytes, hello: wire.Hello, peer: str, buffer_bytes: int, until: float
) -> socket.socket:
    """One stream to the listener at `address`, both ends proved.

    Raises:
        PeerError: nobody is there, or it does not answer by `until`, of `time.monotonic`.
        CommplaneError: it is not who made the metadata.
    """
    where = f"peer {peer!r} at {address[0]} port {address[1]}"

    def rest() -> float:
        return max(0.001, until - time.monotonic())

    stream: socket.socket | None = None
    try:
        family = resolve(*address, until)[0]
        stream = socket.socket(family[0], socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        tune(stream, buffer_bytes)
        stream.settimeout(rest())
        stream.connect(family[4])
        challenge = wire.receive_exactly(stream, len(wire.CHALLENGE_MAGIC) + wire.NONCE_BYTES, until)
        magic, nonce = challenge[: len(wire.CHALLENGE_MAGIC)], challenge[len(wire.CHALLENGE_MAGIC) :]
        if magic != wire.CHALLENGE_MAGIC:
            raise wire.WireError(f"{where}: wanted an engine 'tcp', found something that says {magic!r}")
        stream.settimeout(rest())
        stream.sendall(hello.pack(wire.proof_of_writer(token, nonce, hello)))
        answer = receive_proof(stream, where, until)
        if not hmac.compare_digest(answer, wire.proof_of_listener(token, nonce, hello)):
            raise wire.WireError(f"{where} has not got the token of its metadata: something else listens there now")
        stream.settimeout(None)
    except (wire.Ended, OSError) as error:
        if stream is not None:
            stream.close()
        why = "it closed the connection" if isinstance(error, wire.Ended) else str(error) or type(error).__name__
        raise PeerError(f"{where} cannot be reached: {why}; is it running, and is its metadata of this start?") from error
    except CommplaneError:
        if stream is not None:
            stream.close()
        raise
    return stream


def receive_proof(stream: socket.socket, where: str, until: float) -> bytes:
    """The listener's, or its refusal raised as a WireError."""
    head = wire.receive_exactly(stream, wire.ANSWER_BYTES, until)
    if head.startswith(wire.CHALLENGE_MAGIC):
        rest = len(wire.CHALLENGE_MAGIC) + wire.MAC_BYTES - len(head)
        return head[len(wire.CHALLENGE_MAGIC) :] + wire.receive_exactly(stream, rest, until)
    try:
        while not wire.read_answer(head)[2]:
            head += wire.receive_exactly(stream, 1, until)
    except wire.WireError as error:
        raise wire.WireError(f"{where}: {error}") from error
    raise wire.WireError(f"{where}: wanted a proof of the token, found {head!r}")


class Outgoing:
    """The streams to one peer. `take`, `answered` and `lose` are called by threads of the engine, the rest by its caller.

    Attributes:
        pool_bytes: of the peer.
        why_lost: None while it is connected.
    """

    def __init__(self, peer: str, streams: list[socket.socket], pool: memoryview, pool_bytes: int, ends: Ends) -> None:
        self.peer = peer
        self.streams = streams
        self.pool_bytes = pool_bytes
        self.why_lost: str | None = None
        self._pool = pool
        self._ends = ends
        self._changed = threading.Condition()
        self._queue: deque[_Transfer] = deque()
        self._open: dict[int, _Transfer] = {}
        self._progress = time.monotonic()
        self._acked = 0
        self._answers = dict.fromkeys(streams, b"")
        self._threads = [
            threading.Thread(target=self._send, args=(stream,), name=f"commplane-tcp-out {peer}", daemon=True)
            for stream in streams
        ]
        for thread in self._threads:
            thread.start()

    def start(self, ticket: int, pieces: Pieces) -> None:
        """Queue a transfer."""
        # Several batches a stream, so that all of them end at about the same time, but none so small that its head counts.
        most = min(max(pieces.total // (2 * len(self.streams)), _LEAST_BATCH), _MOST_BATCH)
        with self._changed:
            if self.why_lost is None:
                if not self._open:
                    self._progress = time.monotonic()
                transfer = self._open[ticket] = _Transfer(ticket, pieces.total, _batches(pieces, most))
                self._queue.append(transfer)
                self._changed.notify(min(len(self.streams), 1 + pieces.total // most))
                return
        self._ends.end(ticket, self.why_lost)

    def cancel(self, ticket: int) -> None:
        """Send nothing more of it; it ends when what is under way has been answered."""
        with self._changed:
            transfer = self._open.get(ticket)
            if transfer is None:
                return
            transfer.is_cancelled = True
            if transfer in self._queue:
                self._queue.remove(transfer)
            self._end_if_done(transfer)

    def lose(self, why: str) -> None:
        """Give up on the peer: the streams end, and its open tickets with them. Idempotent."""
        with self._changed:
            if self.why_lost is not None:
                return
            self.why_lost = why
            self._queue.clear()
            tickets = list(self._open)
            self._open.clear()
            self._changed.notify_all()
            for stream in self.streams:
                with contextlib.suppress(OSError):  # the peer has closed it first
                    stream.shutdown(socket.SHUT_RDWR)
        for ticket in tickets:
            self._ends.end(ticket, why)

    def close(self) -> None:
        """Wait for the threads, then give the sockets back. After `lose`."""
        for thread in self._threads:
            thread.join()
        for stream in self.streams:
            stream.close()

    def silent_for(self) -> float:
        """Seconds since the peer last answered or its kernel last took bytes, 0 while nothing is open.

        An answer is to a whole batch, which a slow link carries for longer than a peer may be silent. What the kernel takes for a
        peer that is stopped ends with its buffers, so such a peer is found all the same. The engine's watch calls it, often.
        """
        with self._changed:
            silence = time.monotonic() - self._progress if self._open else 0.0
            if silence >= _ASK_SECONDS and (acked := sum(map(_acked_bytes, self.streams))) != self._acked:
                self._acked, self._progress, silence = acked, time.monotonic(), 0.0
            return silence

    def hear(self, stream: socket.socket) -> None:
        """Read answers that have come over `stream`. Does not wait."""
        try:
            data = stream.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            self.lose(f"peer {self.peer!r} is lost: {error}")
            return
        if not data:
            self.lose(f"peer {self.peer!r} is lost: it closed a stream, its process ended or it disconnected")
            return
        buffer = self._answers[stream] + data
        try:
            while True:
                ticket, nbytes, used = wire.read_answer(buffer)
                if not used:
                    break
                buffer = buffer[used:]
                self._answered(ticket, nbytes)
        except wire.WireError as error:
            self.lose(f"peer {self.peer!r} is lost: {error}")
        self._answers[stream] = buffer

    def _answered(self, ticket: int, nbytes: int) -> None:
        with self._changed:
            self._progress = time.monotonic()
            transfer = self._open.get(ticket)
            if transfer is None or nbytes > transfer.sent - transfer.done:
                raise wire.WireError(f"it answered {nbytes} bytes of ticket {ticket} that were not sent")
            transfer.done += nbytes
            self._end_if_done(transfer)

    def _end_if_done(self, transfer: _Transfer) -> None:
        if transfer.done == transfer.total:
            del self._open[transfer.ticket]
            self._ends.end(transfer.ticket)
        elif transfer.is_cancelled and transfer.done == transfer.sent:
            del self._open[transfer.ticket]
            self._ends.end(transfer.ticket, f"cancelled: {transfer.done} of {transfer.total} bytes were written and stay")

    def _take(self) -> tuple[int, list[tuple[int, int, int]]] | None:
        """The next batch for whichever stream asks; waits for one. None when the peer is lost."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._queue or self.why_lost is not None)
                if self.why_lost is not None:
                    return None
                transfer = self._queue[0]
                batch = next(transfer.batches, None)
                if batch is not None:
                    transfer.sent += sum(nbytes for _, _, nbytes in batch)
                    return transfer.ticket, batch
                self._queue.popleft()

    def _send(self, stream: socket.socket) -> None:
        try:
            while (taken := self._take()) is not None:
                ticket, batch = taken
                head = wire.pack_batch(ticket, [(to, nbytes) for _, to, nbytes in batch])
                views = [memoryview(head), *(self._pool[start : start + nbytes] for start, _, nbytes in batch)]
                while views:
                    views = left(views, stream.sendmsg(views))
        except OSError as error:
            self.lose(f"peer {self.peer!r} is lost: {error}")


def _acked_bytes(stream: socket.socket) -> int:
    """Bytes that the other end's kernel has acknowledged since the stream began; 0 where this kernel does not say."""
    kind, offset = _BYTES_ACKED
    try:
        info = stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, offset + kind.size)
    except OSError:  # closed meanwhile
        return 0
    return int(kind.unpack_from(info, offset)[0]) if len(info) >= offset + kind.size else 0


def new_session() -> bytes:
    """For the streams of one `connect`."""
    return secrets.token_bytes(wire.SESSION_BYTES)
