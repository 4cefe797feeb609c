"""What a test of the kit says of itself: which clauses it proves, and what a backend must declare for it to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest

from commplane.api import BackendSpec, Capability, Numerics
from commplane_conformance.subject import AnySubject

__all__ = ["Needs", "at_least", "clause", "clauses_of", "needs", "needs_dtype", "needs_of", "numerics", "since"]

F = TypeVar("F", bound=Callable[..., Any])


def clause(*numbers: str) -> Callable[[F], F]:
    """The test proves these clauses of docs/semantics.md."""
    return pytest.mark.clause(*numbers)


def needs(*capabilities: str) -> Callable[[F], F]:
    """The test is for those that declare all of these."""
    return pytest.mark.needs(*capabilities)


def needs_dtype(name: str) -> Callable[[F], F]:
    """The test uses this dtype: on a backend that does not declare it, it would prove another backend of the plan."""
    return pytest.mark.needs_dtype(name)


def numerics(kind: Numerics) -> Callable[[F], F]:
    """The test is for backends that promise this class."""
    return pytest.mark.numerics(kind)


def since(major: int, minor: int) -> Callable[[F], F]:
    """The test is for backends made for this version of the comm API or a later one of the same major."""
    return pytest.mark.since(major, minor)


def at_least(ranks: int) -> Callable[[F], F]:
    """The test needs this many ranks."""
    return pytest.mark.at_least(ranks)


def clauses_of(item: pytest.Item) -> list[str]:
    """The clauses that a test cites, the module's own among them."""
    numbers = {number for mark in item.iter_markers("clause") for number in mark.args}
    return sorted(numbers, key=lambda n: int(n[1:]))


def needs_of(item: pytest.Item) -> list[str]:
    """The capabilities that a test exercises: those of communicators in the order of the enumeration, then others."""
    found = {str(capability) for mark in item.iter_markers("needs") for capability in mark.args}
    known = [str(c) for c in Capability]
    return [*(c for c in known if c in found), *sorted(found.difference(known))]


@dataclass(frozen=True)
class Needs:
    """Why a test does not run for a subject."""

    subject: AnySubject

    def refusal(self, item: pytest.Item) -> str | None:
        """What the subject lacks for `item`, or None."""
        name, spec = self.subject.name, self.subject.declaration
        missing = [c for c in needs_of(item) if c not in self.subject.capabilities]
        if missing:
            return f"{name} does not declare the capability {' and '.join(missing)}"
        for mark in item.iter_markers("since"):
            wanted: Sequence[int] = mark.args
            if tuple(spec.api) < tuple(wanted):
                return (
                    f"since {self.subject.contract} API {wanted[0]}.{wanted[1]}, {name} is made for {spec.api[0]}.{spec.api[1]}"
                )
        if not isinstance(spec, BackendSpec):
            return None
        for mark in item.iter_markers("needs_dtype"):
            if spec.dtypes and mark.args[0] not in spec.dtypes:
                return f"the test uses {mark.args[0]}, which {name} does not declare"
        for mark in item.iter_markers("numerics"):
            if spec.numerics is not mark.args[0]:
                return f"for numerics {mark.args[0]}, {name} declares {spec.numerics}"
        return None
