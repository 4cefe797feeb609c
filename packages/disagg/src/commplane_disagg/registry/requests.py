"""Requests to a registry: signed, retried until a deadline, and what went wrong as one sentence. For any thread."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import threading
import time
from typing import TypeVar

import msgspec

from commplane.api import Deadline
from commplane.errors import AgreementError, CommplaneError, ConfigError, PeerError
from commplane_disagg.registry.addresses import url_host
from commplane_disagg.registry.auth import Signer
from commplane_disagg.registry.connection import RegistryConnection
from commplane_disagg.wire import MSGPACK, Problem, decode, encode

__all__ = ["RefusedError", "RegistryHttp"]

_T = TypeVar("_T")
_FIRST, _LONGEST = 0.05, 2.0
"""Seconds before the first retry, doubled each time, and at most; each is cut by up to half at random, so that the ranks of a job
do not all come back at once."""

_UNSIGNED = {401: "unauthorized", 413: "too_large"}
"""Said before the server knows who asks, so by anybody: they end a call, and mean that and no more, whatever the body says."""

_ANSWER_LIMIT = 256 << 20


class RefusedError(Exception):
    """The registry understood and said no."""

    def __init__(self, status: int, problem: Problem) -> None:
        super().__init__(problem.message)
        self.status, self.problem = status, problem

    def typed(self, text: str) -> CommplaneError:
        """As an error of ours: of the ranks' agreement for 409, else of what this rank was given."""
        return AgreementError(text) if self.status == 409 else ConfigError(text)


class RegistryHttp:
    """One registry's address. Keeps idle connections; threads that ask at the same time have one each.

    Args:
        host: of the registry; a wildcard to bind is none to ask.
        port: of the registry.
        token: the shared one, None where the server takes requests from anybody.
        attempt: seconds of one try to connect, and of silence in an exchange.
    """

    def __init__(self, host: str, port: int, *, token: bytes | None, attempt: float = 5.0) -> None:
        self.address = f"{url_host(host)}:{port}"
        self.attempt = attempt
        self._host, self._port = host, port
        self._signer = Signer(token) if token is not None else None
        self._lock = threading.Lock()
        self._idle: list[RegistryConnection] = []
        self._busy: set[RegistryConnection] = set()
        self._closed = False

    def another(self) -> RegistryHttp:
        """The same address and token, with connections and a close of its own."""
        copy = RegistryHttp(self._host, self._port, token=None, attempt=self.attempt)
        copy._signer = self._signer
        return copy

    def close(self) -> None:
        """Close connections; a request that another thread has out fails at once. Idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for connection in self._busy:
                if connection.sock is not None:
                    with contextlib.suppress(OSError):  # the peer has closed it already
                        connection.sock.shutdown(socket.SHUT_RDWR)
        for connection in idle:
            connection.close()

    def ask(
        self,
        kind: type[_T],
        method: str,
        path: str,
        body: msgspec.Struct | None = None,
        *,
        who: str,
        timeout: float,
        wait: float = 0.0,
        retry: bool = True,
    ) -> _T:
        """One request until it is answered.

        Args:
            kind: of the answer.
            method: of HTTP.
            path: with its query.
            body: to send.
            who: asks, and what for; the beginning of an error's text.
            timeout: seconds for all tries.
            wait: seconds that the server was asked to wait, on top of those of a try.
            retry: False tries once.

        Raises:
            RefusedError: the registry said no, and trying again will not change that before the deadline.
            PeerError: no answer within the timeout; the text has the last cause.
        """
        payload = encode(body) if body is not None else b""
        deadline, tries, delay = Deadline(timeout), 0, _FIRST
        while True:
            tries += 1
            pause: float | None = None
            try:
                end = time.monotonic() + max(deadline.remaining(), 0.01)
                status, found = self._try(method, path, payload, self.attempt + wait, end)
                if status < 300:
                    return decode(kind, found)
                refused = RefusedError(status, _problem(status, found))
                pause = refused.problem.retry_after
                if status < 500 and (pause is None or pause >= deadline.remaining()):
                    raise refused
                cause = f"{status}: {refused}"
            except (OSError, UnicodeError, http.client.HTTPException, msgspec.DecodeError) as error:
                cause = _cause(error)
            pause = min(delay, pause) if pause is not None else delay
            if not retry or self._closed or deadline.remaining() <= pause:
                times = "1 try" if tries == 1 else f"{tries} tries"
                raise PeerError(
                    f"{who}: the registry at {self.address} gave no answer within {timeout:g} s ({times}), the last cause was "
                    f"{cause}; is it running, and is this its address"
                )
            time.sleep(pause * random.uniform(0.5, 1.0))
            delay = min(2 * delay, _LONGEST)

    def _try(self, method: str, path: str, body: bytes, silence: float, end: float) -> tuple[int, bytes]:
        """One exchange, over by `end` of `time.monotonic`. A kept connection that the server has closed is replaced once."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is not None:
            try:
                return self._exchange(connection, method, path, body, silence, end)
            except (http.client.RemoteDisconnected, ConnectionError, http.client.CannotSendRequest):
                pass  # it was idle: whether the server is there, a new connection tells
        return self._exchange(RegistryConnection(self._host, self._port), method, path, body, silence, end)

    def _exchange(
        self, connection: RegistryConnection, method: str, path: str, body: bytes, silence: float, end: float
    ) -> tuple[int, bytes]:
        done = False
        with self._lock:
            if self._closed:
                raise http.client.HTTPException("this client is closed")
            self._busy.add(connection)
        try:
            connection.limit(self.attempt, silence, end)
            kind = MSGPACK if body else ""
            headers = {"Accept": MSGPACK, "Host": self.address}
            if kind:
                headers["Content-Type"] = kind
            signed = self._signer.header(method, path, kind, body) if self._signer is not None else None
            if signed is not None:
                headers["Authorization"] = signed
            connection.request(method, path, body or None, headers)
            response = connection.getresponse()
            data = response.read(_ANSWER_LIMIT + 1)
            if len(data) > _ANSWER_LIMIT:
                raise http.client.HTTPException(f"an answer of more than {_ANSWER_LIMIT} bytes")
            if self._signer is not None and signed is not None and response.status not in _UNSIGNED:
                info, found = response.headers.get("Authentication-Info"), response.headers.get("Content-Type", "")
                if not self._signer.authentic(signed, info, response.status, found, data):
                    raise http.client.HTTPException("an answer that was not made with the shared token")
            done = not response.will_close
            return response.status, data
        finally:
            with self._lock:
                self._busy.discard(connection)
                done = done and not self._closed
                if done:
                    self._idle.append(connection)
            if not done:
                connection.close()


def _problem(status: int, body: bytes) -> Problem:
    try:
        found = decode(Problem, body)
    except msgspec.DecodeError:  # somebody else answers at this address, or an HTTP error below the application
        text = body[:200].decode("utf-8", "replace").strip()
        found = Problem(code="malformed", message=f"HTTP {status} {text!r}")
    return Problem(code=_UNSIGNED[status], message=found.message) if status in _UNSIGNED else found


def _cause(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
