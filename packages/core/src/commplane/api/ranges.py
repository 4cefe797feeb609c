"""Which sizes a backend is the right choice for, as it finds when it is open."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SizeRange"]


@dataclass(frozen=True)
class SizeRange:
    """Messages of ``low <= bytes < high`` of a rank's tensor.

    Attributes:
        low: in bytes.
        high: in bytes; None for no end.
        algorithm: what the backend runs there, such as ``"one_shot"``: shown by ``commplane explain`` and the plan, compared
            by the ranks, not given back to the backend. Empty where there is nothing to tell.
    """

    low: int
    high: int | None
    algorithm: str = ""

    def __post_init__(self) -> None:
        if self.low < 0 or (self.high is not None and self.high <= self.low):
            raise ValueError(f"a size range wants 0 <= low < high in bytes, found low {self.low} and high {self.high}")

    def __contains__(self, nbytes: int) -> bool:
        return self.low <= nbytes and (self.high is None or nbytes < self.high)

    def __str__(self) -> str:
        return f"{self.low} <= bytes < {self.high or 'inf'}" + (f" ({self.algorithm})" if self.algorithm else "")
