"""Which test of the kit is meant for each wrong backend."""

from __future__ import annotations

from collections.abc import Callable

from honest import Honest

__all__ = ["catalogue"]


def catalogue() -> tuple[dict[str, str], Callable[[str], Callable[[type[Honest]], type[Honest]]]]:
    """Name of each wrong backend of a module -> the test that has to fail; and the decorator that notes it there."""
    caught: dict[str, str] = {}

    def caught_by(test: str) -> Callable[[type[Honest]], type[Honest]]:
        def note(cls: type[Honest]) -> type[Honest]:
            caught[cls.__name__] = test
            return cls

        return note

    return caught, caught_by
