"""The store `redis`: pages on a Redis or Valkey server, for small pages and for what is shared between hosts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from commplane.api import StoreContext, StoreUsage
from commplane.errors import CommplaneError, ConfigError
from commplane_cache.stores.address import Address
from commplane_cache.stores.valued import ValuedStore, library

__all__ = ["RedisStore"]


class RedisStore(ValuedStore):
    """Over redis-py; wants ``commplane-cache[redis]``.

    Options: `url` as redis-py takes it (``redis://host:6379/0``, ``rediss://``, ``unix://path``); `expire`: seconds after which
    the server forgets a page, 0 for never; `prefix` of all names; `threads`. What the server does when its memory is full is its
    own setting (``maxmemory-policy``).
    """

    name = "redis"
    defaults: ClassVar[Mapping[str, Any]] = {"url": "", "expire": 0, "prefix": "commplane:"}

    def do_open(self, context: StoreContext, options: Mapping[str, Any]) -> None:
        """See `ThreadedStore`."""
        if not options["url"]:
            raise ConfigError(
                "redis: wanted the address of a server, found none; set the option url, such as redis://host:6379/0"
            )
        redis = library("redis", "redis", "redis")
        retry, backoff = library("redis", "redis.retry", "redis"), library("redis", "redis.backoff", "redis")
        self._error = redis.RedisError
        self._prefix, self._lifetime = options["prefix"].encode(), options["expire"] or None
        address = Address(options["url"])
        try:
            self._client = redis.Redis.from_url(
                options["url"],
                socket_timeout=context.timeout,
                socket_connect_timeout=context.timeout,
                # Once more on a new connection: the server may have come back since the last call.
                retry=retry.Retry(backoff.NoBackoff(), 1),
            )
            self._client.ping()
        except (redis.RedisError, ValueError, OSError) as error:
            # A logged traceback would show the cause, and Python quotes pieces of an address that it cannot read.
            why = address.hide(str(error))
            raise CommplaneError(f"redis: {address.shown} does not answer: {why}; is the server running there?") from (
                None if address.has_secrets else error
            )

    def _full(self, names: Sequence[bytes]) -> list[bytes]:
        return [self._prefix + name for name in names]

    def values_there(self, names: Sequence[bytes]) -> Sequence[bool]:
        """See `ValuedStore`."""
        with self._client.pipeline(transaction=False) as pipe:
            for name in self._full(names):
                pipe.exists(name)
            return [bool(count) for count in pipe.execute()]

    def values_read(self, names: Sequence[bytes], take: Callable[[int, memoryview], None]) -> str | None:
        """See `ValuedStore`."""
        for index, value in enumerate(self._client.mget(self._full(names))):
            if value is not None:
                take(index, memoryview(value))
        return None

    def values_write(self, names: Sequence[bytes], values: Sequence[bytearray]) -> Sequence[str | None]:
        """See `ValuedStore`."""
        with self._client.pipeline(transaction=False) as pipe:
            for name, value in zip(self._full(names), values, strict=True):
                pipe.set(name, memoryview(value), nx=True, ex=self._lifetime)
            # None: it is there already.
            return [str(found) if isinstance(found, Exception) else None for found in pipe.execute(raise_on_error=False)]

    def values_remove(self, names: Sequence[bytes]) -> Sequence[str | None]:
        """See `ValuedStore`."""
        self._client.unlink(*self._full(names))
        return [None] * len(names)

    def usage(self) -> StoreUsage:
        """Not known without asking the server."""
        return StoreUsage(None, None)

    def do_shut(self) -> None:
        """See `ThreadedStore`."""
        self._client.close()
