"""The store `fsspec`: a file or object for each page, wherever fsspec reaches: S3, GCS, Azure, a shared folder."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from commplane.api import StoreContext, StoreUsage
from commplane.api.shm import is_abandoned, owned_name
from commplane.errors import CommplaneError, ConfigError
from commplane_cache.stores.address import Address
from commplane_cache.stores.valued import ValuedStore, library

__all__ = ["FsspecStore"]

_NOT_THERE = (FileNotFoundError, NotADirectoryError, KeyError)


class FsspecStore(ValuedStore):
    """Over fsspec; wants ``commplane-cache[fsspec]``, and what the address needs (``s3fs`` for S3).

    Options: `url` such as ``s3://bucket/prefix`` or ``file:///folder``; `storage_options` as a mapping, as fsspec takes them;
    `threads`. One request a page: for large pages, or what is rarely read. A local folder that it makes is its user's alone;
    make it beforehand to share it with others.
    """

    name = "fsspec"
    defaults: ClassVar[Mapping[str, Any]] = {"url": "", "storage_options": None}

    def do_open(self, context: StoreContext, options: Mapping[str, Any]) -> None:
        """See `ThreadedStore`."""
        if not options["url"]:
            raise ConfigError("fsspec: wanted an address, found none; set the option url, such as s3://bucket/prefix")
        core = library("fsspec", "fsspec.core", "fsspec")
        self._asyn = library("fsspec", "fsspec.asyn", "fsspec")
        self._address = Address(options["url"])
        given = {"use_listings_cache": False, **(options["storage_options"] or {})}
        try:
            self._fs, root = core.url_to_fs(options["url"], **given)
            self._root = f"{root.rstrip('/')}/{self.namespace.hex()}"
            self._parts = f"{root.rstrip('/')}/unfinished"
            self._is_local = "file" in ((self._fs.protocol,) if isinstance(self._fs.protocol, str) else self._fs.protocol)
            if self._is_local:
                Path(root).mkdir(0o700, parents=True, exist_ok=True)  # pages say what was in the prompts
                self._fs.makedirs(self._parts, exist_ok=True)
                self._sweep()
            else:
                self._fs.exists(self._root)  # says now what an address or a password that is wrong would say later
        except Exception as error:  # each file system has errors of its own
            # A logged traceback would show the cause, and libraries quote the address.
            raise CommplaneError(f"fsspec: {self._address.shown} cannot be used: {self._text_of(error)}") from (
                None if self._address.has_secrets else error
            )

    def _sweep(self) -> None:
        """Remove what processes that have ended were writing. Of those of other hosts only what is old: they may live."""
        for path in Path(self._parts).iterdir():
            try:
                if is_abandoned(path):
                    path.unlink(missing_ok=True)
            except FileNotFoundError:  # it has its name by now, or somebody else removed it
                continue

    def _paths(self, names: Sequence[bytes]) -> list[str]:
        # 256 folders, because a file system does not like millions of files in one.
        keys = [name[len(self.namespace) :].hex() for name in names]
        return [f"{self._root}/{key[:2]}/{key}" for key in keys]

    def _each(self, method: str, *columns: Sequence[Any]) -> list[Any]:
        """Call a method of the file system for each row of arguments, side by side where it can: results and exceptions."""
        if self._fs.async_impl:
            call: Callable[..., Awaitable[Any]] = getattr(self._fs, f"_{method}")

            async def gather() -> list[Any]:
                return await asyncio.gather(*(call(*row) for row in zip(*columns, strict=True)), return_exceptions=True)

            return list(self._asyn.sync(self._fs.loop, gather, timeout=self.timeout))
        results: list[Any] = []
        for row in zip(*columns, strict=True):
            try:
                results.append(getattr(self._fs, method)(*row))
            except Exception as error:  # the caller tells it for this page
                results.append(error)
        return results

    def values_there(self, names: Sequence[bytes]) -> Sequence[bool]:
        """See `ValuedStore`."""
        found = self._each("info", self._paths(names))
        for error in _real_errors(found):
            raise CommplaneError(self._text_of(error)) from None
        return [not isinstance(one, Exception) for one in found]

    def values_read(self, names: Sequence[bytes], take: Callable[[int, memoryview], None]) -> str | None:
        """See `ValuedStore`."""
        found = self._each("cat_file", self._paths(names))
        for index, value in enumerate(found):
            if not isinstance(value, Exception):
                take(index, memoryview(value))
        return next((self._text_of(error) for error in _real_errors(found)), None)

    def values_write(self, names: Sequence[bytes], values: Sequence[bytearray]) -> Sequence[str | None]:
        """See `ValuedStore`."""
        there = self.values_there(names)
        new = [
            (path, bytes(value)) for path, value, is_there in zip(self._paths(names), values, there, strict=True) if not is_there
        ]
        found = iter(self._each("pipe_file", *zip(*new, strict=True)) if not self._is_local else map(self._write_local, new))
        outcomes = [None if is_there else next(found) for is_there in there]
        return [self._text_of(one) if isinstance(one, Exception) else None for one in outcomes]

    def _write_local(self, item: tuple[str, bytes]) -> Exception | None:
        """A file has its name only when it is whole: another process may read it at any time, and this one may be killed."""
        path, value = item
        unfinished = f"{self._parts}/{owned_name('page')}"
        try:
            self._fs.pipe_file(unfinished, value)
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.mv(unfinished, path)
        except OSError as error:
            if self._fs.exists(unfinished):
                self._fs.rm_file(unfinished)
            return error
        return None

    def values_remove(self, names: Sequence[bytes]) -> Sequence[str | None]:
        """See `ValuedStore`."""
        found = self._each("rm_file", self._paths(names))
        return [self._text_of(one) if _is_real_error(one) else None for one in found]

    def _text_of(self, error: Exception) -> str:
        return f"{type(error).__name__}: {self._address.hide(str(error))}"

    def usage(self) -> StoreUsage:
        """Not known without asking."""
        return StoreUsage(None, None)

    def do_shut(self) -> None:
        """See `ThreadedStore`."""


def _real_errors(found: Sequence[Any]) -> list[Exception]:
    return [one for one in found if _is_real_error(one)]


def _is_real_error(result: Any) -> bool:
    return isinstance(result, Exception) and not isinstance(result, _NOT_THERE)
