"""The enumerations of the contract. All are strings, so they travel as JSON and read well in a message."""

from __future__ import annotations

from enum import Enum

__all__ = ["Capability", "Collective", "Numerics", "QuantFormat", "ReduceOp", "Variant", "Vote"]


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
    ALL_REDUCE_RMS_NORM = "all_reduce_rms_norm"
    """A sum over the ranks, a residual added, and the RMS norm of that; where no backend has it, composed of `ALL_REDUCE`."""
    ALL_REDUCE_RMS_NORM_QUANT = "all_reduce_rms_norm_quant"
    """The same with the norm in a `QuantFormat`; where no backend has it, composed of `ALL_REDUCE_RMS_NORM`."""

    @property
    def reduces(self) -> bool:
        """Whether the operation takes a `ReduceOp`."""
        return self in (Collective.ALL_REDUCE, Collective.REDUCE_SCATTER)

    @property
    def combines(self) -> bool:
        """Whether numbers of several ranks become one, so that what a backend promises of the order of additions matters."""
        return self.reduces or self.norms

    @property
    def norms(self) -> bool:
        """Whether a residual is added and an RMS norm taken after the sum: for floating-point dtypes alone."""
        return self in (Collective.ALL_REDUCE_RMS_NORM, Collective.ALL_REDUCE_RMS_NORM_QUANT)

    @property
    def variants(self) -> tuple[Variant | None, ...]:
        """What a call of it says beside dtype and size: an op, a format, or nothing."""
        if self.reduces:
            return tuple(ReduceOp)
        return tuple(QuantFormat) if self is Collective.ALL_REDUCE_RMS_NORM_QUANT else (None,)


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
    ALL_REDUCE_RMS_NORM = "all_reduce_rms_norm"
    """Since comm 1.1. For the floating-point dtypes of the spec; the spec's ops do not bear on it, it sums."""
    ALL_REDUCE_RMS_NORM_QUANT = "all_reduce_rms_norm_quant"
    """Since comm 1.3. In the formats of the spec, for its floating-point dtypes."""
    SYMMETRIC_MEMORY = "symmetric_memory"
    """`empty`: tensors in memory that every rank maps, reduced without a staging copy."""
    CAPTURE = "capture"
    """Needs `capture_begin` and `capture_end` around a capture. Without it a capture passes the backend by."""


class QuantFormat(_Text):
    """A format in which a norm may be returned; see `commplane.api.quantize`."""

    FP8_STATIC = "fp8_static"
    """float8_e4m3fn by one given scale."""
    FP8_TOKEN = "fp8_token"
    """float8_e4m3fn, a scale for each token."""
    FP8_GROUP = "fp8_group"
    """float8_e4m3fn, a power of two for each group of neighbours in a token."""
    NVFP4 = "nvfp4"
    """E2M1, a float8_e4m3fn scale for each block of 16 and a given global one."""


Variant = ReduceOp | QuantFormat
"""What a call of some collectives says beside dtype and size."""


class Numerics(_Text):
    """What a backend promises about the order of additions."""

    RANK_ORDER = "rank_order"
    """Added in the order of group ranks 0..N-1 on every rank, at every size: bitwise equal across ranks and runs."""
    UNORDERED = "unordered"
    """Any order, possibly another one at another size."""


class Vote(_Text):
    """The rule by which local values become one agreed value."""

    ANY = "any"
    """1 where some rank's value is not 0, else 0."""
    ALL = "all"
    """1 where no rank's value is 0, else 0."""
    MIN = "min"
    MAX = "max"
    SUM = "sum"
    LEADER = "leader"
    """The value of group rank 0."""
