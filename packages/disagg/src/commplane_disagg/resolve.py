"""A host's addresses by a deadline. The system's resolver has none, and may take a minute where no name server answers."""

from __future__ import annotations

import concurrent.futures
import os
import socket
import threading
import time

__all__ = ["Found", "resolve"]

Found = list[tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[str, int] | tuple[str, int, int, int]]]
"""As of `socket.getaddrinfo`, for TCP."""


class _Asked:
    """Names that the resolver looks for now. Who asks for the same one waits for the same answer: tries do not pile up."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.open: dict[tuple[str, int], concurrent.futures.Future[Found]] = {}

    def ask(self, host: str, port: int) -> concurrent.futures.Future[Found]:
        """What is under way for that name, or begins now."""
        with self.lock:
            found = self.open.get((host, port))
            if found is None:
                found = self.open[host, port] = concurrent.futures.Future()
                threading.Thread(target=self._look, args=(host, port, found), name="commplane-resolve", daemon=True).start()
            return found

    def _look(self, host: str, port: int, answer: concurrent.futures.Future[Found]) -> None:
        try:
            answer.set_result(_addresses(host, port))
        except BaseException as error:
            answer.set_exception(error)
        finally:
            with self.lock:
                self.open.pop((host, port), None)


_asked = _Asked()


def _forget() -> None:
    """After a fork: the threads that were to answer are the parent's."""
    global _asked
    _asked = _Asked()


os.register_at_fork(after_in_child=_forget)


def resolve(host: str, port: int, until: float) -> Found:
    """Addresses to connect to, best first. An address is its own answer; a name is looked for in a thread.

    Args:
        host: address or name.
        port: to connect to.
        until: of `time.monotonic`.

    Raises:
        TimeoutError: no answer by `until`; the look-up goes on, and the next who asks may have it.
        OSError: there is no such name, or it is none.
    """
    try:
        return _addresses(host, port, socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass  # it is a name, or nothing at all
    try:
        return _asked.ask(host, port).result(max(0.0, until - time.monotonic()))
    except concurrent.futures.TimeoutError as error:
        raise TimeoutError(f"the resolver did not say in time where {host!r} is") from error


def _addresses(host: str, port: int, flags: int = 0) -> Found:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)  # type: ignore[return-value]
    except ValueError as error:  # UnicodeError for "a..b" and for a label of more than 63 characters, ValueError for a zero byte
        raise OSError(f"{host!r} is no host name: {error}") from error
