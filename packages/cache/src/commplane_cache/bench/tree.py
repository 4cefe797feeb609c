"""What it costs to look a prompt up and to insert it: against a plain Python tree with a dictionary for each page.

All candidates take turns in one run, in an order that turns; figures are medians, times in us. The cache does more than the plain
tree: it keeps who owns each page, the state's digest, counters and the order of eviction.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from commplane.api import Agreed
from commplane_cache.cache import PrefixCache
from commplane_cache.options import CacheOptions
from commplane_cache.tree import TokenRun

__all__ = ["PlainTree", "add_arguments", "measure", "run", "table"]

_TARGET = 5.0
_TARGET_TOKENS = 4096
_LINEAR = 1.5


class PlainTree:
    """A prefix tree with one dictionary a page, as one writes it first."""

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._root: dict[tuple[int, ...], Any] = {}

    def match(self, tokens: Sequence[int]) -> list[int]:
        """Pages of the longest known prefix."""
        level, pages, step = self._root, [], self._page_tokens
        for i in range(0, len(tokens) - step + 1, step):
            found = level.get(tuple(tokens[i : i + step]))
            if found is None:
                break
            page, level = found
            pages.append(page)
        return pages

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Remember a page for each page of tokens."""
        level, step = self._root, self._page_tokens
        for i, page in zip(range(0, len(tokens) - step + 1, step), pages, strict=False):
            key = tuple(tokens[i : i + step])
            found = level.get(key)
            if found is None:
                found = level[key] = (page, {})
            level = found[1]


class _Alone:
    """The rounds of one rank: every rule gives back its own value."""

    rank, world_size, ranks, steps = 0, 1, (0,), 0

    def __init__(self) -> None:
        self._notes: deque[tuple[int, str, tuple[int, ...]]] = deque(maxlen=512)

    def step(self, values: Mapping[str, int | Sequence[int]], *, digest: int = 0) -> Agreed:
        self.steps += 1
        return {name: value if isinstance(value, int) else tuple(value) for name, value in values.items()}

    def issue(self, values: Mapping[str, int | Sequence[int]], *, digest: int = 0) -> None:
        raise NotImplementedError("the bench's cache is not pipelined")

    def result(self) -> Agreed:
        raise NotImplementedError("the bench's cache is not pipelined")

    def note(self, what: str, *numbers: int) -> None:
        self._notes.append((self.steps, what, numbers))

    def close(self) -> None:
        """Nothing is held."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``commplane-cache bench tree``."""
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 65536], metavar="N", help="lengths of prompts"
    )
    parser.add_argument("--page-tokens", type=int, default=16, help="tokens in a page (default 16)")
    parser.add_argument("--passes", type=int, default=60, help="turns of each candidate (default 60)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure as the options say; `table` shows it."""
    return measure(tokens=arguments.tokens, page_tokens=arguments.page_tokens, passes=arguments.passes)


def measure(*, tokens: Sequence[int] = (1024, 4096, 16384, 65536), page_tokens: int = 16, passes: int = 60) -> dict[str, Any]:
    """All figures, as JSON holds them.

    Returns:
        ``lengths``: for each number of tokens the median of each candidate in us; ``targets``: which were met.
    """
    out: dict[str, Any] = {"page_tokens": page_tokens, "passes": passes, "lengths": {}, "targets": []}
    for length in tokens:
        out["lengths"][str(length)] = _length(length, page_tokens, passes)
    out["targets"] = _targets(out["lengths"])
    return out


def _length(length: int, page_tokens: int, passes: int) -> dict[str, float]:
    draw = np.random.default_rng(length)
    # Other prompts share the first half, so that a walk goes through more than one node.
    prompts = [draw.integers(0, 100_000, length).astype(np.int32) for _ in range(4)]
    for other in prompts[1:]:
        other[: length // 2] = prompts[0][: length // 2]
    known, pages = prompts[0].tolist(), length // page_tokens
    plain, cache = PlainTree(page_tokens), _cache(pages * (len(prompts) + 2), page_tokens)
    for prompt in prompts:
        plain.insert(prompt.tolist(), range(pages))
        _insert(cache, TokenRun(prompt, page_tokens))
    kept, array = TokenRun(known, page_tokens), prompts[0]
    looks: dict[str, Callable[[], object]] = {
        "plain match": lambda: plain.match(known),
        "match": lambda: cache.match(kept),
        "match, array": lambda: cache.match(TokenRun(array, page_tokens)),
        "match, list": lambda: cache.match(TokenRun(known, page_tokens)),
    }
    taken: dict[str, list[float]] = {}
    for turn in range(passes + 3):
        names = list(looks)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter_ns()
            looks[name]()
            taken.setdefault(name, []).append(time.perf_counter_ns() - began)
        # A prompt that nobody knows is new once: another for every turn, and the cache's goes again after it.
        fresh = draw.integers(0, 100_000, length).tolist()
        _new(taken, turn, plain, cache, fresh, TokenRun(fresh, page_tokens))
    return {name: statistics.median(ns[3:]) / 1000 for name, ns in taken.items()}


def _new(
    taken: dict[str, list[float]], turn: int, plain: PlainTree, cache: PrefixCache, tokens: list[int], kept: TokenRun
) -> None:
    own = cache.allocate(kept.pages)  # evicts the prompt of an earlier turn
    assert own is not None
    numbers = own.tolist()

    def insert_plain() -> None:
        plain.insert(tokens, numbers)

    def insert() -> None:
        cache.insert(kept, own)

    began = time.perf_counter_ns()
    kept.keys(0, kept.pages)
    taken.setdefault("keys, once", []).append(time.perf_counter_ns() - began)
    both = [("plain insert", insert_plain), ("insert", insert)]
    for name, call in both if turn % 2 else both[::-1]:
        began = time.perf_counter_ns()
        call()
        taken.setdefault(name, []).append(time.perf_counter_ns() - began)


def _cache(pages: int, page_tokens: int) -> PrefixCache:
    cache = PrefixCache(_Alone(), pages, options=CacheOptions(page_tokens=page_tokens))
    cache.step()
    return cache


def _insert(cache: PrefixCache, run_: TokenRun) -> None:
    known = cache.match(run_)
    own = cache.allocate(run_.pages - known.device)
    assert own is not None
    cache.insert(run_, own, start=known.device)


def _targets(lengths: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    met: list[dict[str, Any]] = []
    at = lengths.get(str(_TARGET_TOKENS))
    if at:
        for what in ("match", "insert"):
            ratio = at[f"plain {what}"] / at[what]
            met.append({"what": f"{what} of {_TARGET_TOKENS} tokens, times faster than plain", "limit": _TARGET, "found": ratio})
            met[-1]["met"] = ratio >= _TARGET
    sizes = sorted(map(int, lengths))
    if len(sizes) > 1:
        for what in ("match", "insert"):
            # Below linear is fine: what a call costs whatever its length is in both.
            growth = (lengths[str(sizes[-1])][what] / sizes[-1]) / (lengths[str(sizes[0])][what] / sizes[0])
            met.append({"what": f"{what}, cost a token of the longest to the shortest", "limit": _LINEAR, "found": growth})
            met[-1]["met"] = growth <= _LINEAR
    return met


def table(out: Mapping[str, Any]) -> str:
    """The figures for a person."""
    lines = [f"looking up and inserting a prompt, pages of {out['page_tokens']} tokens; medians of {out['passes']} in us"]
    names = list(dict.fromkeys(name for figures in out["lengths"].values() for name in figures))
    lines.append(f"{'tokens':>7} " + " ".join(f"{name:>13}" for name in names) + f" {'match':>7} {'insert':>7}")
    for length, figures in out["lengths"].items():
        ratios = " ".join(f"{figures[f'plain {what}'] / figures[what]:>6.1f}x" for what in ("match", "insert"))
        lines.append(f"{length:>7} " + " ".join(f"{figures[name]:>13.1f}" for name in names) + f" {ratios}")
    for target in out["targets"]:
        word = "met" if target["met"] else "MISSED"
        lines.append(f"  {word}: {target['what']}: {target['found']:.2f}, wanted {target['limit']:g}")
    return "\n".join(lines)
