"""Page stores beside bare pread and pwrite and a memcpy of the same pages, in one process and one run.

In each round every contestant writes fresh keys, reads them and asks for them, in an order that rotates, and a ratio is taken
within the round. The first round is not counted: memory and files are touched for the first time in it.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from commplane.api import PageStore, StoreContext
from commplane.errors import CommplaneError
from commplane_cache.bench.servers import mooncake_master, redis_server

__all__ = ["add_arguments", "run", "table"]

_BARE, _COPY = "bare pread/pwrite", "memcpy"
_PATIENCE = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What can be asked for."""
    parser.add_argument("--page-kib", type=int, nargs="+", default=[2048, 64], help="sizes of a page (default 2048 64)")
    parser.add_argument("--mib", type=int, default=128, help="pages of one pass, together (default 128)")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds (default 7)")
    parser.add_argument("--stores", nargs="+", default=list(_SETUPS), choices=list(_SETUPS), help="default all that work here")
    parser.add_argument("--folder", type=Path, help="on the file system to be measured (default a temporary one)")
    parser.add_argument("--threads", type=int, default=2, help="worker threads of a store (default 2)")


@dataclass
class _Pages:
    """Buffers of one pass: what is written, and what is read into."""

    nbytes: int
    source: list[memoryview]
    target: list[memoryview]

    @classmethod
    def make(cls, nbytes: int, total: int) -> _Pages:
        count = max(1, total // nbytes)
        pools = [memoryview(mmap.mmap(-1, count * nbytes)) for _ in range(2)]
        source, target = ([pool[at * nbytes : (at + 1) * nbytes] for at in range(count)] for pool in pools)
        noise = os.urandom(1 << 16)
        for number, page in enumerate(source):  # incompressible, and no two alike
            for at in range(0, nbytes, len(noise)):
                piece = page[at : at + len(noise)]
                piece[:] = noise[: len(piece)]
            page[:4] = number.to_bytes(4, "little")
        return cls(nbytes, source, target)

    @property
    def total(self) -> int:
        return self.nbytes * len(self.source)


class _Bare:
    """The same pages to and from a file, one call a page, one thread."""

    def __init__(self, folder: Path, pages: _Pages) -> None:
        self._fd = os.open(folder / "bare", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._pages = pages

    def write(self) -> None:
        for number, page in enumerate(self._pages.source):
            os.pwrite(self._fd, page, number * self._pages.nbytes)

    def read(self) -> None:
        for number, page in enumerate(self._pages.target):
            os.preadv(self._fd, [page], number * self._pages.nbytes)

    def close(self) -> None:
        os.close(self._fd)


class _Copy:
    """The same pages from memory to memory."""

    def __init__(self, pages: _Pages) -> None:
        self._pages = pages

    def write(self) -> None:
        for source, target in zip(self._pages.source, self._pages.target, strict=True):
            target[:] = source

    def read(self) -> None:
        self.write()

    def close(self) -> None:
        """It has nothing open."""


class _Stored:
    """A page store: one batch writes all pages, one reads them, one asks for them and as many that are not there."""

    def __init__(self, store: PageStore, pages: _Pages) -> None:
        self._store, self._pages = store, pages
        self._keys: list[bytes] = []

    def _end(self, ticket: int, expected: Sequence[bool]) -> None:
        limit = time.monotonic() + _PATIENCE
        while time.monotonic() < limit:
            for done in self._store.poll(1.0):
                if done.ticket != ticket or done.ok != tuple(expected):
                    raise CommplaneError(f"{sum(done.ok)} of {len(done.ok)} keys were served: {done.error}")
                return
        raise CommplaneError(f"a batch has no end after {_PATIENCE:.0f} s")

    def prepare(self, number: int) -> None:
        """Make room: the pages of the round before are removed."""
        if self._keys:
            self._end(self._store.submit_remove(self._keys), [True] * len(self._keys))
        self._keys = [b"%08d%024d" % (number, at) for at in range(len(self._pages.source))]

    def write(self) -> None:
        self._end(self._store.submit_put(self._keys, self._pages.source), [True] * len(self._keys))

    def read(self) -> None:
        self._end(self._store.submit_get(self._keys, self._pages.target), [True] * len(self._keys))

    def exists(self) -> float:
        """Seconds a key."""
        keys = [*self._keys, *(b"no" + key for key in self._keys)]
        expected = [True] * len(self._keys) + [False] * len(self._keys)
        start = time.perf_counter()
        self._end(self._store.submit_exists(keys), expected)
        return (time.perf_counter() - start) / len(keys)

    def close(self) -> None:
        self._store.close()


def _slab(folder: Path, room: int, stack: ExitStack) -> Mapping[str, Any]:
    return {"path": str(folder / "slab"), "capacity_bytes": room}


def _slab_direct(folder: Path, room: int, stack: ExitStack) -> Mapping[str, Any]:
    return {"path": str(folder / "slab_direct"), "capacity_bytes": room, "direct": True}


def _lmdb(folder: Path, room: int, stack: ExitStack) -> Mapping[str, Any]:
    return {"path": str(folder / "lmdb"), "capacity_bytes": 4 * room + (64 << 20)}


def _fsspec(folder: Path, room: int, stack: ExitStack) -> Mapping[str, Any]:
    return {"url": f"file://{folder}/fsspec"}


def _redis(folder: Path, room: int, stack: ExitStack) -> Mapping[str, Any]:
    return {"url": stack.enter_context(redis_server(folder)).address}


def _mooncake(folder: Path, room: int, stack: ExitStack) -> Mapping[str, Any]:
    return {"master": stack.enter_context(mooncake_master(folder)).address, "segment_bytes": 2 * room + (64 << 20)}


_Setup = Callable[[Path, int, ExitStack], Mapping[str, Any]]
_SETUPS: dict[str, tuple[str, _Setup]] = {
    "slab": ("slab:SlabStore", _slab),
    "slab_direct": ("slab:SlabStore", _slab_direct),
    "lmdb": ("lmdb:LmdbStore", _lmdb),
    "fsspec": ("fsspec:FsspecStore", _fsspec),
    "redis": ("redis:RedisStore", _redis),
    "mooncake": ("mooncake:MooncakeStore", _mooncake),
}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure: a row for each size of a page and contestant, with medians, or with the reason why a store does not work here."""
    rows: list[dict[str, Any]] = []
    for kib in arguments.page_kib:
        with tempfile.TemporaryDirectory(prefix="commplane-cache-bench-", dir=arguments.folder) as folder, ExitStack() as stack:
            pages = _Pages.make(kib << 10, arguments.mib << 20)
            rows += _measure(Path(folder), pages, arguments, stack)
    return {"machine": {"cpus": os.cpu_count()}, "mib": arguments.mib, "rounds": arguments.rounds, "rows": rows}


def _opened(
    names: Sequence[str], folder: Path, pages: _Pages, threads: int, stack: ExitStack
) -> Iterator[tuple[str, _Stored | str]]:
    """Each store by name: open, or why not."""
    for name in names:
        factory, setup = _SETUPS[name]
        module, _, attribute = factory.partition(":")
        store: PageStore = getattr(import_module(f"commplane_cache.stores.{module}"), attribute)()
        try:
            options = {"threads": threads, **setup(folder, pages.total, stack)}
            store.open(StoreContext(pages.nbytes, "bench", _PATIENCE, options))
        except CommplaneError as error:
            yield name, str(error)
        else:
            stack.callback(store.close)
            yield name, _Stored(store, pages)


def _measure(folder: Path, pages: _Pages, arguments: argparse.Namespace, stack: ExitStack) -> list[dict[str, Any]]:
    bare = _Bare(folder, pages)
    stack.callback(bare.close)
    contestants: dict[str, _Bare | _Copy | _Stored] = {_COPY: _Copy(pages), _BARE: bare}
    refused: dict[str, str] = {}
    for name, found in _opened(arguments.stores, folder, pages, arguments.threads, stack):
        if isinstance(found, str):
            refused[name] = found
        else:
            contestants[name] = found
    names = list(contestants)
    seconds: dict[str, dict[str, list[float]]] = {name: {"write": [], "read": [], "exists": []} for name in names}
    for number in range(arguments.rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            contestant = contestants[name]
            if isinstance(contestant, _Stored):
                contestant.prepare(number)
            spent = {"write": _timed(contestant.write), "read": _timed(contestant.read)}
            if isinstance(contestant, _Stored):
                spent["exists"] = contestant.exists()
            if number:
                for what, value in spent.items():
                    seconds[name][what].append(value)
    rows = [_row(name, pages, seconds[name], seconds[_BARE]) for name in names]
    return rows + [{"store": name, "page_bytes": pages.nbytes, "refused": why} for name, why in refused.items()]


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _row(name: str, pages: _Pages, own: Mapping[str, list[float]], bare: Mapping[str, list[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"store": name, "page_bytes": pages.nbytes, "pages": len(pages.source)}
    for what in ("write", "read"):
        row[f"{what}_gb_s"] = pages.total / statistics.median(own[what]) / 1e9
        row[f"{what}_to_bare"] = statistics.median(b / o for o, b in zip(own[what], bare[what], strict=True))
    row["exists_us_a_key"] = statistics.median(own["exists"]) * 1e6 if own["exists"] else None
    return row


def table(result: Mapping[str, Any]) -> str:
    """The rows as text."""
    lines = [
        f"{'page':>8}  {'store':<18} {'write GB/s':>10} {'to bare':>8} {'read GB/s':>10} {'to bare':>8} {'exists us/key':>14}"
    ]
    for row in result["rows"]:
        start = f"{row['page_bytes'] >> 10:>4} KiB  {row['store']:<18}"
        if "refused" in row:
            lines.append(f"{start} {row['refused']}")
            continue
        moved = [f"{row[f'{what}_gb_s']:>10.2f} {row[f'{what}_to_bare']:>8.2f}" for what in ("write", "read")]
        asked = "" if row["exists_us_a_key"] is None else f"{row['exists_us_a_key']:.1f}"
        lines.append(f"{start} {' '.join(moved)} {asked:>14}".rstrip())
    return "\n".join(lines)
