"""What all ranks of a group said, with those that said the same together.

A thousand ranks mostly say the same. Who looks at the groups does not repeat for each rank what holds for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

__all__ = ["Gathered", "alike"]


class Gathered(Sequence[Any]):
    """One JSON value a rank, in group order. Equal ones are one object, and parts of different ones may be: change none.

    Attributes:
        groups: each value once, with the group ranks that said it, both in the order of first appearance.
    """

    def __init__(self, groups: Sequence[tuple[Any, Sequence[int]]], size: int) -> None:
        self.groups = groups
        self._size = size
        self._values: list[Any] | None = None

    def _all(self) -> list[Any]:
        if self._values is None:
            if len(self.groups) == 1:
                self._values = [self.groups[0][0]] * self._size
            else:
                self._values = [None] * self._size
                for value, positions in self.groups:
                    for i in positions:
                        self._values[i] = value
        return self._values

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        return self._all()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._all())


def alike(values: Sequence[Any]) -> Sequence[tuple[Any, Sequence[int]]]:
    """Each different value with the positions where it stands, in the order of first appearance. Pure."""
    if isinstance(values, Gathered):
        return values.groups
    groups: list[tuple[Any, list[int]]] = []
    for i, value in enumerate(values):
        for known, positions in groups:
            if known is value or known == value:
                positions.append(i)
                break
        else:
            groups.append((value, [i]))
    return groups
