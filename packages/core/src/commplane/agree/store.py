"""A c10d store whose calls end.

`torch.distributed.TCPStore` waits without limit for a host that is stopped or cut off. Here every call is made by one thread of
this process and waited for with a deadline; after one that was missed, all later calls fail at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from commplane.agree.clock import REAL, Clock
from commplane.errors import PeerError

__all__ = ["BoundedStore"]


class BoundedStore:
    """The calls that the control plane makes. They raise `PeerError` where the store's host is gone or does not answer.

    Args:
        store: a c10d store.
        timeout: seconds that one call may take.
        clock: of this store and of all control planes over it.
    """

    def __init__(self, store: Any, timeout: float, clock: Clock = REAL) -> None:
        self.raw = store
        self.clock = clock
        self._timeout = timeout
        self._worker = clock.worker("commplane store")
        self._lost: str | None = None
        self._posted: deque[Callable[[], object]] = deque()
        self.pace: dict[int, float] = {}
        """By number of ranks, the seconds that one waited in its last round: when it is worth to look in the next."""

    def set(self, key: str, value: str) -> None:
        """Store `value`."""
        self._call(lambda: self.raw.set(key, value))

    def append(self, key: str, text: str, *, wait: bool = False) -> None:
        """Add to the end of what is at `key`. Without `wait`, if it fails or hangs, the call after it does."""
        (self._call if wait else self._post)(
            lambda: self.raw.append(key, text) if self.raw.has_extended_api() else self._join(key, text)
        )

    def post(self, key: str, value: str) -> None:
        """`set` that goes out with the next call, and before it."""
        self._posted.append(lambda: self.raw.set(key, value))

    def get(self, key: str) -> bytes:
        """The value of a key that exists."""
        return self._call(lambda: self.raw.get(key))  # type: ignore[no-any-return]

    def peek(self, key: str) -> bytes:
        """The value of a key, empty if there is none. One message; `get` is two, and `check` before it a third."""
        # A decision that changes nothing: it leaves an empty value behind, which counts as none wherever it is read.
        return self._call(lambda: self.raw.compare_set(key, "", ""))  # type: ignore[no-any-return]

    def get_all(self, keys: Sequence[str]) -> list[bytes]:
        """The values of keys that exist; one message where the store can."""
        if self.raw.has_extended_api():
            return list(self._call(lambda: self.raw.multi_get(list(keys))))
        return [self.get(key) for key in keys]

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all `keys` exist."""
        return bool(self._call(lambda: self.raw.check(list(keys))))

    def decide(self, key: str, value: str) -> bytes:
        """Set `key` unless it has a value; the value that it has then."""
        return self.swap(key, "", value)

    def swap(self, key: str, expected: str, value: str) -> bytes:
        """Set `key` if its value is `expected`; the value that it has then."""
        return self._call(lambda: self.raw.compare_set(key, expected, value))  # type: ignore[no-any-return]

    def add(self, key: str, amount: int) -> int:
        """Add to a counter; its new value."""
        return int(self._call(lambda: self.raw.add(key, amount)))

    def delete(self, keys: Sequence[str]) -> None:
        """Remove keys. Not waited for, like `append`."""
        for key in keys:  # one by one, so that a call of another thread waits for one of them at most
            self._post(lambda key=key: self.raw.delete_key(key))  # type: ignore[misc]

    def _join(self, key: str, text: str) -> None:
        """`append` for a store that has none."""
        before = self.raw.compare_set(key, "", "").decode()
        while (found := self.raw.compare_set(key, before, before + text).decode()) != before + text:
            before = found

    def _flush(self) -> None:
        while self._posted:
            self._posted.popleft()()

    def _post(self, function: Callable[[], object]) -> None:
        def call() -> None:
            try:
                self._flush()
                function()
            except Exception as error:  # the calls that are waited for raise it
                self._lost = self._lost or f"the store does not answer, its host, rank 0 or the launcher, is likely gone: {error}"

        if self._lost is not None:
            raise PeerError(self._lost)
        self._worker.submit(call)

    def _call(self, function: Callable[[], Any]) -> Any:
        if self._lost is not None:
            raise PeerError(self._lost)
        done = self.clock.signal()
        result: list[Any] = []
        failure: list[Exception] = []

        def call() -> None:
            try:
                self._flush()
                result.append(function())
            except Exception as error:  # raised again where the call was made
                failure.append(error)
            done.set()

        self._worker.submit(call)
        if not done.wait(self._timeout):
            self._lost = (
                f"the store has not answered for {self._timeout:g} s: its host, rank 0 or the launcher, is stopped or cut off"
            )
            raise PeerError(self._lost)
        if failure and isinstance(failure[0], RuntimeError):  # c10d raises DistStoreError and DistNetworkError
            self._lost = f"the store does not answer, its host, rank 0 or the launcher, is likely gone: {failure[0]}"
            raise PeerError(self._lost) from failure[0]
        if failure:
            raise failure[0]
        return result[0]
