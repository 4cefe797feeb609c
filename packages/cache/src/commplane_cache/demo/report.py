"""What the passes of the demo gave: compared, and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from commplane_cache.demo.launch import Ended

__all__ = ["Pass", "Request", "differences", "gather_passes", "summary", "table"]


@dataclass(frozen=True)
class Request:
    """One turn as it was served.

    Attributes:
        prompt: its tokens.
        answer: the tokens decoded.
        computed: prompt tokens that were computed.
        device: prompt tokens whose pages were on the device already.
        host: prompt tokens whose pages came back from the host.
        storage: prompt tokens whose pages came from storage.
        first: seconds from admission to the first token.
        total: seconds from admission to the end.
    """

    conversation: int
    number: int
    prompt: int
    answer: tuple[int, ...]
    computed: int
    device: int
    host: int
    storage: int
    first: float
    total: float

    def tokens_of(self, tier: str) -> int:
        """Prompt tokens that came from `tier`."""
        return int(getattr(self, tier))


@dataclass(frozen=True)
class Pass:
    """The whole stream, served once. What is measured is rank 0's.

    Attributes:
        name: of the pass.
        cached: whether the cache was on.
        seconds: from the first admission to the last answer.
        steps: of the scheduler; each had one sync round if the cache was on.
        counters: of the cache, as it names them.
        digest: of every decision of the cache.
    """

    name: str
    cached: bool
    requests: tuple[Request, ...]
    seconds: float
    steps: int
    counters: Mapping[str, Any]
    digest: int

    @property
    def prompt(self) -> int:
        """Prompt tokens of all requests."""
        return sum(r.prompt for r in self.requests)

    @property
    def computed(self) -> int:
        """Prompt tokens that were computed."""
        return sum(r.computed for r in self.requests)

    def tokens_of(self, tier: str) -> int:
        """Prompt tokens that came from `tier`."""
        return sum(r.tokens_of(tier) for r in self.requests)


def gather_passes(ended: Sequence[Ended]) -> list[list[Pass]]:
    """By rank, the passes that its process went through."""
    return [[_pass(p) for p in e.said["passes"]] for e in ended]


def _pass(said: Mapping[str, Any]) -> Pass:
    requests = tuple(Request(**{**r, "answer": tuple(r["answer"])}) for r in said["requests"])
    return Pass(said["name"], said["cached"], requests, said["seconds"], said["steps"], said["counters"], said["digest"])


def differences(runs: Sequence[Sequence[Pass]]) -> list[str]:
    """What is not as it must be, in words: answers equal in every pass and on every rank; equal tiers on every rank.

    Args:
        runs: by rank, all passes.
    """
    out = []
    reference = runs[0][0]
    for rank, passes in enumerate(runs):
        for number, one in enumerate(passes):
            where = f"pass '{one.name}', rank {rank}"
            if len(one.requests) != len(reference.requests):
                out.append(f"{where}: {len(one.requests)} requests were answered instead of {len(reference.requests)}")
            for want, got in zip(reference.requests, one.requests, strict=False):
                turn = f"conversation {want.conversation} turn {want.number}"
                if (want.conversation, want.number, want.answer) != (got.conversation, got.number, got.answer):
                    out.append(f"{where}: {turn} was answered {got.answer}, without the cache on rank 0 {want.answer}")
                    break
            mine, theirs = ([(r.computed, r.device, r.host, r.storage) for r in p.requests] for p in (one, runs[0][number]))
            if mine != theirs:
                out.append(f"{where}: pages came from other tiers than on rank 0")
            if one.digest != runs[0][number].digest:
                out.append(f"{where}: the cache took other decisions than on rank 0")
    return out


def table(passes: Sequence[Pass], page: int) -> str:
    """One line a pass.

    Args:
        passes: of one rank.
        page: tokens of a page of the cache.
    """
    head = ("pass", "prompt tokens", "computed", "", "device", "host", "storage", "first token", "whole stream")
    rows: list[tuple[str, ...]] = [head, ("", "", "", "", "pages", "pages", "pages", "median", "")]
    for one in passes:
        tiers = [str(one.tokens_of(t) // page) if one.cached else "-" for t in ("device", "host", "storage")]
        first = statistics.median(r.first for r in one.requests)
        share = f"{100 * one.computed / one.prompt:.0f}%"
        rows.append(
            (one.name, str(one.prompt), str(one.computed), share, *tiers, f"{1e3 * first:.1f} ms", f"{one.seconds:.1f} s")
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  "
        + "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def summary(passes: Sequence[Pass], page: int) -> list[str]:
    """What the cache saved, in sentences.

    Args:
        passes: of one rank; the first without the cache.
        page: tokens of a page of the cache.
    """
    plain, *cached = passes
    out = []
    for one in cached:
        saved = plain.computed / max(1, one.computed)
        first, before = (statistics.median(r.first for r in p.requests) for p in (one, plain))
        found = sum(one.tokens_of(t) for t in ("device", "host", "storage")) // page
        out.append(
            f"{one.name}: {one.computed} prompt tokens computed instead of {plain.computed}, {saved:.1f} times less; "
            f"{found} pages found; first token after {first / before:.2f} of the time"
        )
    return out
