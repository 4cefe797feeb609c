"""What is tuned: the arguments of `Communicator.tune`, checked before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from commplane.api import Collective, QuantFormat, Quantization, Variant
from commplane.errors import UnsupportedOperation

if TYPE_CHECKING:
    import torch

__all__ = ["Subject", "quantization", "sizes_up_to", "subject_of"]

_SCALES = {QuantFormat.FP8_STATIC: 0.25, QuantFormat.NVFP4: 16.0}


def sizes_up_to(max_bytes: int) -> tuple[int, ...]:
    """Powers of two from 8 KiB, each twice the one before, and `max_bytes` itself. Pure."""
    out = [n for i in range(13, 63) if (n := 1 << i) < max_bytes]
    return (*out, max_bytes)


def quantization(variant: Variant | None, device: str) -> Quantization | None:
    """How a norm is quantised while `variant` is tuned, with a scale on `device` where the format wants one; else None."""
    import torch

    if not isinstance(variant, QuantFormat):
        return None
    scale = _SCALES.get(variant)
    return Quantization(variant, None if scale is None else torch.tensor([scale], device=device))


@dataclass(frozen=True)
class Subject:
    """What is tuned; equal on all ranks.

    Attributes:
        collective: `all_reduce`, or a norm after one.
        variant: the op or format.
        dtype: torch's name.
        sizes: bytes of a rank's tensor, ascending.
        hidden: last dimension of the tensor of a norm; 0 where there is none.
        graph: whether in CUDA graphs.
    """

    collective: Collective
    variant: Variant | None
    dtype: str
    sizes: tuple[int, ...]
    hidden: int
    graph: bool

    def to_json(self) -> dict[str, Any]:
        """A JSON object for the comparison of the ranks."""
        return {
            "collective": str(self.collective),
            "variant": self.variant and str(self.variant),
            "dtype": self.dtype,
            "sizes": list(self.sizes),
            "hidden": self.hidden,
            "graph": self.graph,
        }


def subject_of(
    who: str,
    device: str,
    collective: str,
    dtype: torch.dtype | str,
    max_bytes: int,
    sizes: Sequence[int] | None,
    hidden: int,
    op: str | None,
    graph: bool | None,
) -> Subject:
    """The arguments of `Communicator.tune`, checked. Local.

    Raises:
        UnsupportedOperation: what was given cannot be tuned.
    """
    import torch

    tunable = [c for c in Collective if c is Collective.ALL_REDUCE or c.norms]
    if collective not in tunable:
        raise UnsupportedOperation(f"{who} tune wants one of {', '.join(tunable)}, found {collective!r}")
    kind, name = Collective(collective), str(dtype).removeprefix("torch.")
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise UnsupportedOperation(f"{who} tune wants a dtype of torch, found {name!r}")
    wanted = op or str(kind.variants[0])
    variant = next((v for v in kind.variants if v is not None and v == wanted), None)
    if variant is None and (kind.variants != (None,) or op is not None):
        raise UnsupportedOperation(f"{who} tune of {kind} wants op {', '.join(map(str, kind.variants))}, found {op!r}")
    chosen = sizes_up_to(max_bytes) if sizes is None else tuple(sorted(set(sizes)))
    if not chosen or chosen[0] < 1:
        raise UnsupportedOperation(f"{who} tune wants sizes of 1 byte or more, found {list(chosen)}")
    if kind.norms:
        _check_hidden(f"{who} tune of {kind}", hidden, variant)
        # Whole rows: what two sizes both come to is measured once.
        row = hidden * getattr(torch, name).itemsize
        chosen = tuple(sorted({max(1, n // row) * row for n in chosen}))
    on_cuda = device.startswith("cuda")
    if graph and not on_cuda:
        raise UnsupportedOperation(f"{who} tune in graphs wants a communicator on cuda, found {device}: leave graph out")
    return Subject(kind, variant, name, chosen, hidden if kind.norms else 0, on_cuda if graph is None else graph)


def _check_hidden(what: str, hidden: int, variant: Variant | None) -> None:
    if hidden < 1:
        raise UnsupportedOperation(f"{what} wants a hidden size of 1 or more, found {hidden}")
    how = quantization(variant, "cpu")
    misfit = None if how is None else how.misfit(hidden)
    if misfit is not None:
        raise UnsupportedOperation(f"{what} {misfit}")
