"""The store `lmdb`: a database file of this machine that several processes may share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from commplane.api import StoreContext, StoreUsage
from commplane.errors import CommplaneError, ConfigError
from commplane_cache.stores.valued import ValuedStore, library

__all__ = ["LmdbStore"]

_SLACK = 64 << 20


class LmdbStore(ValuedStore):
    """Over LMDB; wants ``commplane-cache[lmdb]``.

    Options: `path` of a folder; `capacity_bytes` of pages, beyond which puts fail; `sync`: a put is acknowledged when it is on
    the device, without it a power failure may take the whole file; `threads`.

    LMDB maps its file: a file that is cut while it is open ends the process, as it does for every user of LMDB. One process opens
    a path once. Its folder and files are its user's alone, as far as it makes them itself.
    """

    name = "lmdb"
    defaults: ClassVar[Mapping[str, Any]] = {"path": "", "capacity_bytes": 4 << 30, "sync": False}

    def do_open(self, context: StoreContext, options: Mapping[str, Any]) -> None:
        """See `ThreadedStore`."""
        if not options["path"]:
            raise ConfigError("lmdb: wanted a folder of its own, found none; set the option path")
        self._lmdb = library("lmdb", "lmdb", "lmdb")
        folder = Path(options["path"])
        self._capacity = options["capacity_bytes"] // context.page_bytes
        try:
            folder.mkdir(0o700, parents=True, exist_ok=True)  # pages say what was in the prompts
            # Twice what its pages take: LMDB writes anew what changes, so that a file that is full could not even forget.
            map_size = 2 * options["capacity_bytes"] + _SLACK
            self._env = self._lmdb.open(str(folder), map_size=map_size, sync=options["sync"], mode=0o600)
            self._env.reader_check()  # forget readers that were killed: they hold old pages of the file
        except (OSError, self._lmdb.Error) as error:
            raise CommplaneError(f"lmdb: {folder} cannot be opened: {error}") from error
        self._is_open = True

    def values_there(self, names: Sequence[bytes]) -> Sequence[bool]:
        """See `ValuedStore`."""
        with self._env.begin(buffers=True) as view:  # else each value would be copied to say that it is there
            return [view.get(name) is not None for name in names]

    def values_read(self, names: Sequence[bytes], take: Callable[[int, memoryview], None]) -> str | None:
        """See `ValuedStore`."""
        with self._env.begin(buffers=True) as view:
            for index, name in enumerate(names):
                value = view.get(name)
                if value is not None:
                    take(index, value)
        return None

    def values_write(self, names: Sequence[bytes], values: Sequence[bytearray]) -> Sequence[str | None]:
        """See `ValuedStore`."""
        full = f"its {self._capacity} pages are all taken; remove some, or raise capacity_bytes"
        outcomes: list[str | None] = []
        with self._env.begin(write=True) as edit:
            room = self._capacity - edit.stat()["entries"]
            for name, value in zip(names, values, strict=True):
                if room > 0:
                    room -= edit.put(name, value, overwrite=False)
                    outcomes.append(None)
                else:
                    outcomes.append(None if edit.get(name) is not None else full)
        return outcomes

    def values_remove(self, names: Sequence[bytes]) -> Sequence[str | None]:
        """See `ValuedStore`."""
        with self._env.begin(write=True) as edit:
            for name in names:
                edit.delete(name)
        return [None] * len(names)

    def usage(self) -> StoreUsage:
        """Pages of all namespaces."""
        return StoreUsage(self._env.stat()["entries"] if self._is_open else None, self._capacity)

    def do_shut(self) -> None:
        """See `ThreadedStore`."""
        self._is_open = False
        self._env.close()
