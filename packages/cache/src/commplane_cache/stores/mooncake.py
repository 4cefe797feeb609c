"""The store `mooncake`: pages in the memory of many machines, through Mooncake Store."""

from __future__ import annotations

import mmap
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from commplane.api import StoreContext, StoreUsage
from commplane.errors import CommplaneError, ConfigError
from commplane_cache.stores.address import Address
from commplane_cache.stores.sealed import SEAL_BYTES
from commplane_cache.stores.valued import ValuedStore, library

__all__ = ["MooncakeStore"]

_FOUND_IN_PLACE = -705  # OBJECT_ALREADY_EXISTS
_NOT_FOUND = -704  # OBJECT_NOT_FOUND


class _Staging:
    """Memory of one thread that Mooncake moves from and into. Not the caller's: a late call goes on writing there."""

    def __init__(self, store: Any, values: int, value_bytes: int) -> None:
        self.stride = -(-value_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = memoryview(mmap.mmap(-1, values * self.stride))
        self.address: int = np.frombuffer(self.memory, np.uint8).__array_interface__["data"][0]
        code = store.register_buffer(self.address, self.memory.nbytes)
        if code:
            raise CommplaneError(f"mooncake: {self.memory.nbytes} bytes cannot be registered: error {code}")

    def addresses(self, count: int) -> list[int]:
        return [self.address + index * self.stride for index in range(count)]

    def slot(self, index: int, nbytes: int) -> memoryview:
        return self.memory[index * self.stride : index * self.stride + nbytes]


class MooncakeStore(ValuedStore):
    """Over Mooncake Store; wants ``commplane-cache[mooncake]`` and a ``mooncake_master`` that runs somewhere.

    Options: `master` as ``host:port``; `host`: address of this machine that peers reach; `metadata`: of the transfer engine, by
    default its own peer-to-peer handshake; `segment_bytes`: memory that this process gives to the store, 0 to only use that of
    others; `buffer_bytes`: memory for moving; `protocol` (``tcp``, ``rdma``) and `devices`; `threads`.

    Pages live in the segments of the processes that are connected: they go with them. `exists` may be wrong for seconds after one
    has died. What was read or asked for lately is kept by a lease, but `remove` takes it nevertheless.
    """

    name = "mooncake"
    defaults: ClassVar[Mapping[str, Any]] = {
        "master": "",
        "host": "127.0.0.1",
        "metadata": "P2PHANDSHAKE",
        "segment_bytes": 512 << 20,
        "buffer_bytes": 64 << 20,
        "protocol": "tcp",
        "devices": "",
    }

    def do_open(self, context: StoreContext, options: Mapping[str, Any]) -> None:
        """See `ThreadedStore`."""
        if not options["master"]:
            raise ConfigError("mooncake: wanted the address of mooncake_master, found none; set the option master to host:port")
        self._store = library("mooncake", "mooncake.store", "mooncake").MooncakeDistributedStore()
        self._local = threading.local()
        self._value_bytes = SEAL_BYTES + context.page_bytes
        self._reach(options["master"], context.timeout)
        code = self._store.setup(
            options["host"],
            options["metadata"],
            options["segment_bytes"],
            options["buffer_bytes"],
            options["protocol"],
            options["devices"],
            options["master"],
        )
        if code:
            self._store.close()
            master = Address(options["master"]).shown
            raise CommplaneError(
                f"mooncake: the master at {master} was not joined, error {code}; does it reach {options['host']}?"
            )

    def _reach(self, master: str, timeout: float) -> None:
        """Connect once: the library tries for minutes where nobody answers, and holds Python's global lock all the time."""
        host, _, port = master.rpartition(":")
        if not port.isdigit() or "//" in host:  # a registry of masters, which only the library can ask
            return
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout).close()
        except OSError as error:
            raise CommplaneError(f"mooncake: nobody answers at {master}: {error}; does mooncake_master run there?") from error

    def _staging(self) -> _Staging:
        if not hasattr(self._local, "staging"):
            self._local.staging = _Staging(self._store, self.part_pages, self._value_bytes)
        return self._local.staging  # type: ignore[no-any-return]

    def values_there(self, names: Sequence[bytes]) -> Sequence[bool]:
        """See `ValuedStore`."""
        return [code == 1 for code in self._store.batch_is_exist(_text(names))]

    def values_read(self, names: Sequence[bytes], take: Callable[[int, memoryview], None]) -> str | None:
        """See `ValuedStore`."""
        staging = self._staging()
        sizes = self._store.batch_get_into(_text(names), staging.addresses(len(names)), [self._value_bytes] * len(names))
        for index, size in enumerate(sizes):
            if size >= 0:
                take(index, staging.slot(index, size))
        return next((f"error {size}" for size in sizes if size < 0 and size != _NOT_FOUND), None)

    def values_write(self, names: Sequence[bytes], values: Sequence[bytearray]) -> Sequence[str | None]:
        """See `ValuedStore`."""
        staging = self._staging()
        for index, value in enumerate(values):
            staging.slot(index, len(value))[:] = value
        codes = self._store.batch_put_from(_text(names), staging.addresses(len(names)), [self._value_bytes] * len(names))
        return [None if code in (0, _FOUND_IN_PLACE) else f"error {code}" for code in codes]

    def values_remove(self, names: Sequence[bytes]) -> Sequence[str | None]:
        """See `ValuedStore`."""
        codes = self._store.batch_remove(_text(names), True)
        return [None if code in (0, _NOT_FOUND) else f"error {code}" for code in codes]

    def usage(self) -> StoreUsage:
        """Not known without asking the master."""
        return StoreUsage(None, None)

    def do_shut(self) -> None:
        """See `ThreadedStore`."""
        self._store.close()


def _text(names: Sequence[bytes]) -> list[str]:
    return [name.hex() for name in names]
