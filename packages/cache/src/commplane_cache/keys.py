"""What a page is called in storage: a namespace that says what its bytes are, and a key that says which tokens they hold.

Two processes that would compute the same bytes arrive at the same names without talking; processes that differ in anything that
changes the bytes (weights, dtype, page size, layout, shard) never meet. Keys are chained: a key names the whole prefix up to the
end of its page, and a page is found only after the same tokens from the start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from commplane.errors import ConfigError

__all__ = ["KEY_BYTES", "KeyScheme", "next_key", "page_keys", "root"]

KEY_BYTES = 32
_ROOT = b"commplane page chain 1\0"


@dataclass(frozen=True, kw_only=True)
class KeyScheme:
    """What decides the bytes of a page, apart from the tokens. All ranks of an engine differ in `shard` only.

    Attributes:
        model: name of the model.
        revision: of the weights: a commit, a checksum; whatever changes when they do.
        dtype: of keys and values as stored, such as ``"bfloat16"``.
        page_tokens: tokens in a page.
        layout: how keys and values lie in a page: order of layers, heads and halves, such as ``"layer,kv,token,head,dim"``.
        shard: which part of it this rank holds, such as ``"heads 0-15 of 32, tokens 0 of 2"``: name the bytes, not the rank that
            wrote them, so that another rank with the same part finds it. ``"whole"`` where every rank holds all of it; there is
            no default, because ranks that hold different parts under one name would be served each other's bytes.
    """

    model: str
    revision: str
    dtype: str
    page_tokens: int
    layout: str
    shard: str

    def __post_init__(self) -> None:
        if self.page_tokens < 1:
            raise ConfigError(f"key scheme: wanted at least one token in a page, found {self.page_tokens}")
        empty = [name for name, value in asdict(self).items() if value == ""]
        if empty:
            raise ConfigError(f"key scheme: wanted what decides a page's bytes, found nothing for {', '.join(empty)}; name it")

    @property
    def namespace(self) -> str:
        """One text of all of it, equal only for equal schemes; for `StoreContext.namespace`."""
        # repr quotes: no value can run over into its neighbour.
        return " ".join(f"{name}={value!r}" for name, value in asdict(self).items())

    def digest(self) -> bytes:
        """`KEY_BYTES` bytes that stand for the namespace."""
        return hashlib.sha256(self.namespace.encode()).digest()


def root(salt: bytes = b"") -> bytes:
    """The key before the first page. Another salt (an adapter, a tenant) is another tree of keys."""
    return hashlib.sha256(_ROOT + salt).digest()


def next_key(parent: bytes, tokens: bytes) -> bytes:
    """The key of the page after `parent` that holds `tokens`, as little-endian 32-bit integers."""
    return hashlib.sha256(parent + tokens).digest()


def page_keys(tokens: Sequence[int] | np.ndarray, page_tokens: int, parent: bytes | None = None) -> list[bytes]:
    """Keys of all full pages of `tokens`; a last page that is not full has none.

    Args:
        tokens: ids, below 2**31.
        page_tokens: tokens in a page.
        parent: key of the page before the first one here; None at the start of a prompt.

    Raises:
        ConfigError: ids that do not fit.
    """
    given = np.asarray(tokens)
    ids = given.astype("<i4")
    if given.dtype != ids.dtype and not np.array_equal(given, ids):  # else ids that differ by 2**32 would share pages
        raise ConfigError(
            "page keys: wanted token ids that are integers below 2**31, found others; look at the tokenizer's output"
        )
    raw = ids.tobytes()
    step = 4 * page_tokens
    key = root() if parent is None else parent
    keys: list[bytes] = []
    for start in range(0, len(raw) - step + 1, step):
        key = hashlib.sha256(key + raw[start : start + step]).digest()
        keys.append(key)
    return keys
