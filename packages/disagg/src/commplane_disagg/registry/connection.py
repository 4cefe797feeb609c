"""An HTTP connection that is over by a moment, however slowly the other end speaks.

A socket's timeout begins anew with each byte that comes, so a peer that sends one now and then would hold a call for ever.
"""

from __future__ import annotations

import http.client
import socket
import time
from typing import Any

from commplane_disagg.resolve import resolve

__all__ = ["RegistryConnection"]


class _Socket(socket.socket):
    """Each wait of `http.client` goes through one of these two methods; `silence` is in seconds, `end` of `time.monotonic`."""

    silence = 0.0
    end = 0.0

    def recv_into(self, *arguments: Any, **options: Any) -> int:
        self._wait_no_longer()
        return super().recv_into(*arguments, **options)

    def sendall(self, *arguments: Any, **options: Any) -> None:
        self._wait_no_longer()  # Python's own counts over the whole of what it sends
        return super().sendall(*arguments, **options)

    def _wait_no_longer(self) -> None:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the exchange took longer than the call may")
        self.settimeout(min(self.silence, left))


class RegistryConnection(http.client.HTTPConnection):
    """Call `limit` before each exchange."""

    sock: _Socket | None

    def limit(self, connecting: float, silence: float, end: float) -> None:
        """For what comes next.

        Args:
            connecting: seconds to find the host and to connect.
            silence: seconds without a byte.
            end: of all of it, of `time.monotonic`.
        """
        self._connecting, self._silence, self._end = connecting, silence, end
        if self.sock is not None:
            self.sock.silence, self.sock.end = silence, end

    def connect(self) -> None:
        """To the first address of the host that answers.

        Raises:
            OSError: none does, or not in time.
        """
        until = min(time.monotonic() + self._connecting, self._end)
        failed: OSError = OSError(f"{self.host!r} has no address")
        for family, kind, protocol, _, address in resolve(self.host, self.port, until):
            sock = _Socket(family, kind, protocol)
            try:
                sock.settimeout(max(0.001, until - time.monotonic()))
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                sock.close()
                failed = error
                continue
            sock.silence, sock.end = self._silence, self._end
            self.sock = sock
            return
        raise failed
