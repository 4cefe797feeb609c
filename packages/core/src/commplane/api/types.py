"""The enumerations of the contract. All are strings, so they travel as JSON and read well in a message."""

from __future__ import annotations

from enum import Enum

__all__ = ["Capability", "Collective", "Numerics", "ReduceOp", "Vote"]


class _Text(str, Enum):
    def __str__(self) -> str:
        return str(self.value)


class Collective(_Text):
    """An operation of a communicator, in torch's spelling."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    BROADCAST = "broadcast"
    BARRIER = "barrier"

    @property
    def reduces(self) -> bool:
        """Whether the operation takes a `ReduceOp`."""
        return self in (Collective.ALL_REDUCE, Collective.REDUCE_SCATTER)


class ReduceOp(_Text):
    """How elements of the ranks are combined. ``avg`` is the sum divided by the world size."""

    SUM = "sum"
    MIN = "min"
    MAX = "max"
    AVG = "avg"


class Capability(_Text):
    """What a backend offers. A collective it declares is exercised by the canary before anything real."""

    ALL_REDUCE = "all_reduce"
    """`all_reduce_`, and `all_reduce` out of place."""
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    BROADCAST = "broadcast"
    BARRIER = "barrier"
    SYMMETRIC_MEMORY = "symmetric_memory"
    """`empty`: tensors in memory that every rank maps, reduced without a staging copy."""
    CAPTURE = "capture"
    """Needs `capture_begin` and `capture_end` around a capture. Without it a capture passes the backend by."""


class Numerics(_Text):
    """What a backend promises about the order of additions."""

    RANK_ORDER = "rank_order"
    """Added in the order of group ranks 0..N-1 on every rank, at every size: bitwise equal across ranks and runs."""
    UNORDERED = "unordered"
    """Any order, possibly another one at another size."""


class Vote(_Text):
    """The rule by which local values become one agreed value."""

    ANY = "any"
    ALL = "all"
    MIN = "min"
    MAX = "max"
    LEADER = "leader"
