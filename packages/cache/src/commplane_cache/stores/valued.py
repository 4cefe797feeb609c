"""The base of stores of named values: names that hold the namespace, sealed pages, and what becomes of a damaged one."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

from commplane.api import StoreContext
from commplane.errors import CommplaneError
from commplane_cache.stores.batch import Part
from commplane_cache.stores.sealed import SEAL_BYTES, is_whole, seal
from commplane_cache.stores.threaded import ThreadedStore

__all__ = ["ValuedStore", "library"]


def library(store: str, module: str, extra: str) -> Any:
    """Import what an extra of this wheel brings.

    Raises:
        CommplaneError: it is not there, or does not load on this machine.
    """
    try:
        return import_module(module)
    except ImportError as error:
        text = f"{store}: wanted the package {module.partition('.')[0]}, found {error}"
        raise CommplaneError(f"{text}; pip install 'commplane-cache[{extra}]'") from error


class ValuedStore(ThreadedStore):
    """A store defines how values go in and out, many at a time, by the methods ``values_*``, which run in worker threads."""

    def open(self, context: StoreContext) -> None:
        """See `PageStore`."""
        self.namespace = hashlib.sha256(context.namespace.encode()).digest()[:16]
        super().open(context)

    @abstractmethod
    def values_there(self, names: Sequence[bytes]) -> Sequence[bool]:
        """Which of them are there."""

    @abstractmethod
    def values_read(self, names: Sequence[bytes], take: Callable[[int, memoryview], None]) -> str | None:
        """Call `take` with the index and value of each that is there; what went wrong with others that may be there."""

    @abstractmethod
    def values_write(self, names: Sequence[bytes], values: Sequence[bytearray]) -> Sequence[str | None]:
        """Store values whose names are not there yet: for each None, or why not."""

    @abstractmethod
    def values_remove(self, names: Sequence[bytes]) -> Sequence[str | None]:
        """Make sure that none of them is there: for each None, or why it still is."""

    def do_exists(self, part: Part) -> None:
        """See `ThreadedStore`."""
        for index, there in enumerate(self.values_there(self._names(part))):
            if there:
                part.done(index)

    def do_get(self, part: Part) -> None:
        """See `ThreadedStore`."""
        names = self._names(part)
        damaged: list[bytes] = []

        def take(index: int, value: memoryview) -> None:
            if is_whole(value, self.page_bytes):
                part.fill(index, value[SEAL_BYTES:])
            else:
                damaged.append(names[index])

        error = self.values_read(names, take)
        if error is not None:
            part.fail(f"{self.name}: get failed: {error}")
        if damaged:
            part.fail(f"{self.name}: {len(damaged)} pages are damaged; they are forgotten")
            self.values_remove(damaged)

    def do_put(self, part: Part) -> None:
        """See `ThreadedStore`."""
        names = self._names(part)
        values: list[bytearray] = []
        for index in range(len(names)):
            value = seal(part, index)
            if value is None:
                return
            values.append(value)
        self._tell(part, self.values_write(names, values))

    def do_remove(self, part: Part) -> None:
        """See `ThreadedStore`."""
        self._tell(part, self.values_remove(self._names(part)))

    def _tell(self, part: Part, outcomes: Iterable[str | None]) -> None:
        for index, error in enumerate(outcomes):
            if error is None:
                part.done(index)
            else:
                part.fail(f"{self.name}: {part.batch.kind} failed: {error}")

    def _names(self, part: Part) -> list[bytes]:
        return [self.namespace + key for key in part.keys]
