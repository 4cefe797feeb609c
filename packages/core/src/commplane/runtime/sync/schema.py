"""What travels in a sync round: the fields of all specs as columns of one row a rank, with a header before them."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import index, itemgetter
from typing import Any, NoReturn

from commplane.api import SyncField, SyncSpec, Vote
from commplane.errors import ConfigError, UnsupportedOperation

__all__ = ["HEADER", "Schema"]

HEADER = 3
"""Columns before the fields: hash of the schema, number of the round, digest of the rank's state."""

Values = Mapping[str, int | Sequence[int]]

_FLAGS = (Vote.ANY, Vote.ALL)
_BITS = frozenset((0, 1))


class Schema:
    """The columns of a round. A pure function of the specs, equal on all ranks that have equal ones.

    Single numbers come first and vectors last: the single ones, mostly all there are, are read from a mapping by one call.

    Attributes:
        fields: ``"spec.field"`` -> field, sorted by name.
        columns: of a row, in numbers of 64 bits.
        rules: the rule of each column after the header. Those of ``any`` and ``all`` hold 0 or 1.
        hash: of names, rules and counts; 56 bits.
    """

    def __init__(self, specs: Iterable[SyncSpec], world_size: int) -> None:
        ordered = sorted(specs, key=lambda spec: spec.name)
        names = [spec.name for spec in ordered]
        if len(set(names)) != len(names):
            raise ConfigError(f"sync round: wanted each spec once, found {', '.join(names)}: leave out or rename one")
        # By name, so that the order in which a plugin gives its fields is no difference.
        named = {f"{spec.name}.{f.name}": f for spec in ordered for f in spec.fields}
        self.fields: dict[str, SyncField] = dict(sorted(named.items()))
        single = {name: f for name, f in self.fields.items() if f.count == 1}
        summed = [name for name, f in single.items() if f.rule is Vote.SUM]
        flags = [name for name, f in single.items() if f.rule in _FLAGS]
        others = [name for name in single if name not in {*summed, *flags}]
        self._single = (*summed, *flags, *others)
        self._pick = _picker(self._single)
        self._summed, self._flags = slice(0, len(summed)), slice(len(summed), len(summed) + len(flags))
        self._vectors: list[tuple[str, SyncField, slice]] = []
        at = len(single)
        for name, f in self.fields.items():
            if f.count > 1:
                self._vectors.append((name, f, slice(at, at + f.count)))
                at += f.count
        self.columns = HEADER + at
        names = [*self._single, *(name for name, _, _ in self._vectors)]
        self.rules = tuple(self.fields[name].rule for name in names for _ in range(self.fields[name].count))
        self._row = struct.Struct(f"={self.columns}q")
        # Sums wrap around in 64 bits: no rank may bring more than its part of them.
        self._largest_summand = (2**63 - 1) // world_size
        digest = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).digest()
        self.hash = int.from_bytes(digest[:7], "big")

    def to_json(self) -> dict[str, str]:
        """Name -> rule, and the count where it is not 1; compared by the ranks when the round is made."""
        return {name: str(f.rule) if f.count == 1 else f"{f.rule} x {f.count}" for name, f in self.fields.items()}

    @property
    def row_bytes(self) -> int:
        """Size of a row."""
        return self._row.size

    def pack_into(self, buffer: Any, offset: int, step: int, values: Values, digest: int) -> None:
        """Write this rank's row of round `step` at byte `offset`.

        Raises:
            UnsupportedOperation: `values` do not fit the fields; nothing of use was written.
        """
        try:
            flat = self._pick(values)
            if len(values) != len(self.fields):
                self._refuse(values, digest)
            summed, flags = flat[self._summed], flat[self._flags]
            if summed:
                self._check_summands(summed)
            if not _BITS.issuperset(flags):
                flat = (*summed, *map(bool, map(index, flags)), *flat[self._flags.stop :])
            for name, f, _ in self._vectors:
                vector: Any = values[name]
                if len(vector) != f.count:
                    self._refuse(values, digest)
                if f.rule is Vote.SUM:
                    self._check_summands(vector)
                elif f.rule in _FLAGS:
                    vector = map(bool, map(index, vector))
                flat = (*flat, *vector)
            self._row.pack_into(buffer, offset, self.hash, step, digest, *flat)
        except (KeyError, TypeError, struct.error) as error:
            self._refuse(values, digest, error)

    def named(self, numbers: Sequence[int]) -> dict[str, int | tuple[int, ...]]:
        """The agreed numbers, one a column after the header, by the names of the fields."""
        out: dict[str, int | tuple[int, ...]] = dict(zip(self._single, numbers))  # noqa: B905  vectors follow
        for name, _, at in self._vectors:
            out[name] = tuple(numbers[at])
        return out

    def _check_summands(self, summands: Sequence[int]) -> None:
        limit, worst = self._largest_summand, max(map(abs, summands))
        if worst > limit:
            raise UnsupportedOperation(
                f"sync round wants numbers whose sum over the ranks fits into 64 bits, found one of {worst}: up to {limit} each"
            )

    def _refuse(self, values: Values, digest: int, error: Exception | None = None) -> NoReturn:
        """Say what is wrong with `values`, which could not be packed."""
        missing, unknown = self.fields.keys() - values.keys(), values.keys() - self.fields.keys()
        if missing or unknown:
            raise UnsupportedOperation(
                f"sync round wants a value for each of {', '.join(self.fields) or 'no field'}; "
                f"missing: {', '.join(sorted(missing)) or 'none'}, unknown: {', '.join(sorted(unknown)) or 'none'}"
            ) from None
        for name, f in self.fields.items():
            value: Any = values[name]
            if f.count == 1:
                wrong = not _fits(value)
                wanted = "an integer of 64 bits"
            else:
                wrong = not hasattr(value, "__len__") or len(value) != f.count or not all(map(_fits, value))
                wanted = f"{f.count} integers of 64 bits"
            if wrong:
                raise UnsupportedOperation(f"sync round wants {wanted} for {name}, found {value!r}") from None
        if not _fits(digest):
            raise UnsupportedOperation(f"sync round wants a digest of at most 63 bits, found {digest!r}: cut it") from None
        raise UnsupportedOperation(f"sync round could not pack its values: {error}") from error


def _picker(names: Sequence[str]) -> Callable[[Values], tuple[Any, ...]]:
    """A function that gives the values of `names` as a tuple, in one call where there are several."""
    if not names:
        return lambda _values: ()
    if len(names) == 1:
        name = names[0]
        return lambda values: (values[name],)
    return itemgetter(*names)


def _fits(value: Any) -> bool:
    try:
        struct.pack("=q", value)
    except struct.error:
        return False
    return True
