"""Where the bytes of a KV page lie in a pool, and which runs of bytes go from one pool's pages into another's.

A layout is five strides: of layer, part (key, value), page, token and head. So it says whole pages one after the other as well
as one buffer a layer, tokens before heads as well as heads before tokens; and two ranks whose layouts differ can still write
into each other's pages, in pieces of what is contiguous in both.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import msgspec

from commplane.errors import ConfigError, UnsupportedOperation

__all__ = ["KvLayout", "copies"]


class KvLayout(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's pool. All sizes and strides are in bytes; layers and heads are numbered in the whole model.

    Attributes:
        pages: number of pages in the pool.
        layers: first layer and one past the last that this rank holds.
        heads: first KV head and one past the last.
        tokens: in a page.
        row: size of one head of one token.
        parts: 2 for keys and values, 1 for a latent.
        dtype: name of the type of the numbers; compared with the peer's.
        base: offset of the first byte of page 0.
        strides: from one layer, part, page, token and head to the next.
    """

    pages: int
    layers: tuple[int, int]
    heads: tuple[int, int]
    tokens: int
    row: int
    strides: tuple[int, int, int, int, int]
    parts: int = 2
    dtype: str = ""
    base: int = 0

    def __post_init__(self) -> None:
        counts = (*self.counts[:2], self.pages, *self.counts[2:])
        if min(counts) < 1 or self.row < 1 or self.base < 0:
            raise ConfigError(f"kv layout: every extent must be at least 1, found {self}")
        step = self.row
        for stride, count in sorted(zip(self.strides, counts, strict=True)):
            if count > 1 and stride < step:
                raise ConfigError(f"kv layout: strides {self.strides} let rows of {self.row} bytes overlap; extents are {counts}")
            step = max(step, stride * count) if count > 1 else step

    @classmethod
    def page_major(
        cls,
        *,
        pages: int,
        layers: tuple[int, int],
        heads: tuple[int, int],
        tokens: int,
        row: int,
        parts: int = 2,
        dtype: str = "",
        heads_first: bool = False,
    ) -> KvLayout:
        """``[page][layer][part][token][head]``, or ``[page][layer][part][head][token]`` with `heads_first`."""
        n = heads[1] - heads[0]
        token, head = (row, row * tokens) if heads_first else (row * n, row)
        part = row * n * tokens
        strides = (part * parts, part, part * parts * (layers[1] - layers[0]), token, head)
        return cls(pages=pages, layers=layers, heads=heads, tokens=tokens, row=row, parts=parts, dtype=dtype, strides=strides)

    @classmethod
    def layer_major(
        cls,
        *,
        pages: int,
        layers: tuple[int, int],
        heads: tuple[int, int],
        tokens: int,
        row: int,
        parts: int = 2,
        dtype: str = "",
    ) -> KvLayout:
        """``[layer][part][page][token][head]``: one buffer of keys and one of values a layer."""
        n = heads[1] - heads[0]
        page = row * n * tokens
        strides = (page * pages * parts, page * pages, page, row * n, row)
        return cls(pages=pages, layers=layers, heads=heads, tokens=tokens, row=row, parts=parts, dtype=dtype, strides=strides)

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Extents of layer, part, token and head."""
        return self.layers[1] - self.layers[0], self.parts, self.tokens, self.heads[1] - self.heads[0]

    @property
    def nbytes(self) -> int:
        """Size of the pool, from its first byte."""
        layer, part, token, head = self.counts
        counts = (layer, part, self.pages, token, head)
        return self.base + self.row + sum(s * (c - 1) for s, c in zip(self.strides, counts, strict=True))

    @property
    def page_bytes(self) -> int:
        """Bytes of one page on this rank, over all its layers and heads."""
        layer, part, token, head = self.counts
        return layer * part * token * head * self.row

    def differs(self, other: KvLayout) -> str | None:
        """Why pages of one cannot be copied to the other, or None. Strides, layers and heads may differ."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in ("tokens", "row", "parts", "dtype")}
        differences = [
            f"{name} is {mine!r} here and {theirs!r} there" for name, (mine, theirs) in pairs.items() if mine != theirs
        ]
        return ", ".join(differences) or None


def copies(
    local: KvLayout, remote: KvLayout, layers: tuple[int, int], heads: tuple[int, int], pages: Sequence[tuple[int, int]]
) -> tuple[list[int], list[int], list[int]]:
    """The runs of bytes that bring pages of one pool into another: offsets here, there, and sizes; each as long as both allow.

    Args:
        local: the pool that is read.
        remote: the pool that is written.
        layers: which layers; both pools hold them.
        heads: which heads; both pools hold them.
        pages: (page here, page there) in order.

    Raises:
        UnsupportedOperation: the two differ in the size of a page's rows, or a page, layer or head lies outside of a pool.
    """
    difference = local.differs(remote)
    if difference:
        raise UnsupportedOperation(f"kv layouts do not fit: {difference}; both sides must use the same")
    for side, layout, which in (("local", local, 0), ("remote", remote, 1)):
        if not (layout.layers[0] <= layers[0] < layers[1] <= layout.layers[1]):
            raise UnsupportedOperation(f"kv layouts do not fit: layers {layers} are not among the {side} {layout.layers}")
        if not (layout.heads[0] <= heads[0] < heads[1] <= layout.heads[1]):
            raise UnsupportedOperation(f"kv layouts do not fit: heads {heads} are not among the {side} {layout.heads}")
        outside = next((pair[which] for pair in pages if not 0 <= pair[which] < layout.pages), None)
        if outside is not None:
            raise UnsupportedOperation(f"{side} page {outside} is outside of a pool of {layout.pages} pages")
    block, mine, theirs = _within_page(local, remote, layers, heads)
    here: list[int] = []
    there: list[int] = []
    sizes: list[int] = []
    local_page, remote_page = local.strides[2], remote.strides[2]
    for page, peer_page in pages:
        a, b = page * local_page, peer_page * remote_page
        if len(mine) == 1 and sizes and here[-1] + sizes[-1] == a + mine[0] and there[-1] + sizes[-1] == b + theirs[0]:
            sizes[-1] += block
            continue
        here += [a + offset for offset in mine]
        there += [b + offset for offset in theirs]
        sizes += [block] * len(mine)
    return here, there, sizes


@lru_cache(maxsize=1024)
def _within_page(
    local: KvLayout, remote: KvLayout, layers: tuple[int, int], heads: tuple[int, int]
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Of page 0: the size of every run, and the runs' offsets in both pools."""
    counts = (layers[1] - layers[0], local.parts, local.tokens, heads[1] - heads[0])
    pick = (0, 1, 3, 4)  # of the strides: all but the page's
    dims = sorted((local.strides[s], remote.strides[s], n) for s, n in zip(pick, counts, strict=True) if n > 1)
    block = local.row
    while dims and dims[0][:2] == (block, block):  # the next run begins where this one ends, in both
        block *= dims.pop(0)[2]
    first = [
        layout.base + (layers[0] - layout.layers[0]) * layout.strides[0] + (heads[0] - layout.heads[0]) * layout.strides[4]
        for layout in (local, remote)
    ]
    dims.reverse()
    steps = list(itertools.product(*(range(n) for _, _, n in dims)))
    mine = tuple(first[0] + sum(i * d[0] for i, d in zip(step, dims, strict=True)) for step in steps)
    theirs = tuple(first[1] + sum(i * d[1] for i, d in zip(step, dims, strict=True)) for step in steps)
    return block, mine, theirs
