"""How long a request waits for its pages from storage.

A policy is asked on each rank alone, and its answer is a vote: a prefetch ends when all ranks can let it end. So a policy may
look at this rank's clock.
"""

from __future__ import annotations

from collections.abc import Callable

from commplane.errors import ConfigError

__all__ = ["POLICIES", "PrefetchPolicy", "policy_of"]

POLICIES = ("best_effort", "wait_complete", "timeout")


class PrefetchPolicy:
    """When a prefetch may end before its time.

    Attributes:
        name: of `POLICIES`.
    """

    __slots__ = ("_base", "_clock", "_most", "_per_page", "name")

    def __init__(self, name: str, clock: Callable[[], float], base: float, per_page: float, most: float) -> None:
        self.name = name
        self._clock, self._base, self._per_page, self._most = clock, base, per_page, most

    def now(self) -> float:
        """This rank's time, which is nobody else's."""
        return self._clock()

    def can_end(self, wanted_at: float, pages: int) -> bool:
        """Whether this rank can let a prefetch of `pages` end that was wanted at `wanted_at`."""
        if self.name == "wait_complete":
            return False
        return self.name == "best_effort" or self._clock() - wanted_at >= min(self._most, self._base + self._per_page * pages)


def policy_of(
    name: str, clock: Callable[[], float], *, base: float, per_1024_tokens: float, most: float, page_tokens: int
) -> PrefetchPolicy:
    """The policy of that name.

    Args:
        name: ``best_effort``: take what is there when all ranks want the request; ``wait_complete``: wait for all; ``timeout``:
            wait for all, but no longer than a time that grows with the pages.
        clock: seconds, of this rank.
        base: seconds that ``timeout`` waits at least, from when the request is first wanted.
        per_1024_tokens: seconds that it waits more for each 1,024 tokens.
        most: seconds that it waits at most.
        page_tokens: tokens in a page.

    Raises:
        ConfigError: there is no such policy.
    """
    if name not in POLICIES:
        raise ConfigError(f"cache: wanted a prefetch policy of {', '.join(POLICIES)}, found {name!r}")
    return PrefetchPolicy(name, clock, base, per_1024_tokens * page_tokens / 1024, most)
