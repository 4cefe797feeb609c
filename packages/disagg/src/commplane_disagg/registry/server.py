"""The registry as a server: on a socket that is bound already, in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import resource
import threading
import time
from types import TracebackType
from typing import Any

from aiohttp import web

from commplane.api import Deadline
from commplane.errors import CommplaneError, ConfigError
from commplane_disagg.port import BoundSocket
from commplane_disagg.registry.auth import Verifier
from commplane_disagg.registry.routes import Routes
from commplane_disagg.registry.service import Service

__all__ = ["RegistryServer", "allow_many_files"]

_log = logging.getLogger("commplane_disagg")

_BODY_LIMIT = 1 << 20
_CLOSE_SECONDS = 2.0
_LINGER_SECONDS = 1.0
"""How long the rest of a refused body is read, so that its sender sees the answer and not a reset."""


class RegistryServer:
    """Serves the registry from `start` to `close`. The owner of the socket: `close` closes it.

    The thread is a daemon: a process that ends without `close` ends all the same.

    Args:
        bound: from `commplane_disagg.port.bind_listener`.
        token: the shared one (`read_token`); None takes requests from anybody who can reach the port.
        lease: seconds that a row lives without renewal.
        body_limit: bytes of one request.
        idle: seconds after which a connection that says nothing is closed; never less than a lease, so that ranks keep theirs.
    """

    def __init__(
        self,
        bound: BoundSocket,
        *,
        token: bytes | None,
        lease: float = 10.0,
        body_limit: int = _BODY_LIMIT,
        idle: float = 60.0,
    ) -> None:
        if not lease > 0:
            raise ConfigError(f"a lease wants seconds above 0, found {lease}")
        self.bound = bound
        self.service = Service(lease)
        self._idle = max(idle, lease)
        self._routes = Routes(self.service, Verifier(token) if token is not None else None, body_limit)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._serving = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="commplane-disagg registry", daemon=True)

    @property
    def port(self) -> int:
        """That it listens on."""
        return self.bound.port

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def start(self, timeout: float = 10.0) -> RegistryServer:
        """Return when requests are answered.

        Raises:
            CommplaneError: it cannot serve; the socket is closed.
        """
        self._thread.start()
        if not self._serving.wait(timeout):
            self.close()
            raise CommplaneError(f"the registry at {self.bound} did not begin to serve within {timeout:g} s")
        if self._failure is not None:
            raise CommplaneError(f"the registry at {self.bound} cannot serve: {self._failure}") from self._failure
        return self

    def drain(self, timeout: float) -> bool:
        """Wait until no group has a row any more: whether that came within `timeout` seconds."""
        deadline = Deadline(timeout)
        while not self.service.empty and self.alive:
            if deadline.expired:
                return False
            time.sleep(0.02)
        return True

    def close(self, timeout: float = 10.0) -> None:
        """Answer who waits, stop serving, close the socket. Idempotent."""
        if self._thread.is_alive() and self._loop is not None and self._stop is not None:
            try:
                self._loop.call_soon_threadsafe(self._stop.set)
            except RuntimeError:
                _log.debug("the registry's loop has ended already")
            self._thread.join(timeout)
        self.bound.close()

    def __enter__(self) -> RegistryServer:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # told to `start`, or logged if it is over
            self._failure = error
            _log.exception("the registry at %s ended", self.bound)
        finally:
            self._serving.set()
            self.bound.close()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        runner = web.AppRunner(
            self._routes.application,
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=_CLOSE_SECONDS,
            lingering_time=_LINGER_SECONDS,
            keepalive_timeout=self._idle,
        )
        await runner.setup()
        tasks: list[asyncio.Task[Any]] = []
        try:
            await web.SockSite(runner, self.bound.socket, backlog=4096).start()
            forever = (self.service.sweep(), self._close_silent(runner), self._stop.wait())
            tasks += [asyncio.create_task(each) for each in forever]
            self._serving.set()
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # one that failed ends the server: without it leases would not
        finally:
            for task in tasks:
                task.cancel()
            self.service.close()
            await runner.cleanup()

    async def _close_silent(self, runner: web.AppRunner) -> None:
        """Close connections whose first request does not come; aiohttp looks after those that wait for another one."""
        since: dict[web.RequestHandler, float] = {}
        while runner.server is not None:
            await asyncio.sleep(min(5.0, self._idle / 4))
            now = time.monotonic()
            since = {connection: since.get(connection, now) for connection in runner.server.connections}
            self._routes.spoken.intersection_update(since)
            for connection, begun in since.items():
                if connection not in self._routes.spoken and now - begun >= self._idle:
                    connection.force_close()


def allow_many_files() -> None:
    """Raise this process's limit of open files to what it may have: each rank keeps a connection."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
