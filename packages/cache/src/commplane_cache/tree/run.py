"""The tokens of one request as the tree compares them: one run of bytes, converted once, with its page keys."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from commplane.errors import ConfigError
from commplane_cache.keys import next_key, root

__all__ = ["TOKEN_BYTES", "TokenRun"]

TOKEN_BYTES = 4


class TokenRun:
    """Tokens of one request. Keep it with the request: the conversion and the page keys are made once.

    Attributes:
        page_tokens: tokens in a page.
        page_bytes: bytes of `data` that stand for one page.
        data: all tokens as little-endian 32-bit integers, also those after the last full page.
        pages: full pages.
        salt: separates what must not share pages though tokens are equal, such as adapters or tenants.
    """

    __slots__ = ("_keys", "data", "page_bytes", "page_tokens", "pages", "salt")

    def __init__(self, tokens: Sequence[int] | np.ndarray, page_tokens: int, *, salt: bytes = b"") -> None:
        if page_tokens < 1:
            raise ConfigError(f"token run: wanted at least one token in a page, found {page_tokens}")
        self._take(_bytes_of(tokens), page_tokens, salt, [])

    def _take(self, data: bytes, page_tokens: int, salt: bytes, keys: list[bytes]) -> None:
        self.data, self.page_tokens, self.salt, self._keys = data, page_tokens, salt, keys
        self.page_bytes = page_tokens * TOKEN_BYTES
        self.pages = len(data) // self.page_bytes

    def __len__(self) -> int:
        return len(self.data) // TOKEN_BYTES

    def extended(self, tokens: Sequence[int] | np.ndarray) -> TokenRun:
        """This run with `tokens` after it. The keys made so far are taken over."""
        longer = TokenRun.__new__(TokenRun)
        longer._take(self.data + _bytes_of(tokens), self.page_tokens, self.salt, self._keys[:])
        return longer

    def keys(self, start: int, stop: int) -> list[bytes]:
        """Keys in storage of pages `start` to `stop`: each stands for its page and everything before it. Made once."""
        keys, data, step = self._keys, self.data, self.page_bytes
        if len(keys) < stop:
            key = keys[-1] if keys else root(self.salt)
            for i in range(len(keys), stop):
                key = next_key(key, data[i * step : (i + 1) * step])
                keys.append(key)
        return keys[start:stop]


def _bytes_of(tokens: Sequence[int] | np.ndarray) -> bytes:
    if isinstance(tokens, (list, tuple, range)):
        try:
            return struct.pack(f"<{len(tokens)}i", *tokens)  # from a list twice as fast as array and numpy
        except struct.error as error:
            raise ConfigError(f"token run: wanted token ids that are integers below 2**31: {error}") from error
    given = np.asarray(tokens)
    ids = given.astype("<i4")
    if ids.ndim != 1 or (given.dtype != ids.dtype and not np.array_equal(given, ids)):
        raise ConfigError("token run: wanted one row of token ids that are integers below 2**31, found others")
    return ids.tobytes()
