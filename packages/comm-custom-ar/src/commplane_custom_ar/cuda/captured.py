# SPDX-License-Identifier: Apache-2.0
"""Inputs of captured calls that all ranks read where they are: what a capture remembered is exchanged after it and filled in."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from commplane.api import Bootstrap, BuildContext
from commplane.errors import MismatchError
from commplane_custom_ar.cuda.comm import CudaComm, DeviceMemory

__all__ = ["CapturedInputs"]


class CapturedInputs:
    """The allocations of peers that graphs of this rank read. They stay mapped until `close`, because graphs may be replayed."""

    def __init__(self, context: BuildContext, comm: CudaComm, memory: DeviceMemory) -> None:
        self._context, self._comm, self._memory = context, comm, memory
        self._opened: dict[tuple[int, str], int] = {}

    def exchange(self, bootstrap: Bootstrap) -> None:
        """Fill in where the inputs of all ranks lie. Collective; until then the graphs may not be replayed.

        Raises:
            MismatchError: the ranks remembered different inputs; what was captured cannot be used then.
        """
        try:
            self._exchange(bootstrap, self._comm.captured())
        finally:
            self._comm.filled()  # also after an error: those graphs are lost, and the next capture begins anew

    def _exchange(self, bootstrap: Bootstrap, inputs: Sequence[tuple[int, int]]) -> None:
        rank = self._context.rank
        sizes: list[list[int]] = bootstrap.all_gather([nbytes for _, nbytes in inputs], what="captured inputs: bytes")
        text = first_difference(dict(zip(self._context.ranks, sizes, strict=True)))
        if text is not None:
            raise MismatchError(f"{self._context.who} {text}")
        if not inputs:  # on no rank then
            return
        handles: dict[str, int] = {}
        places = []
        for address, _ in inputs:
            handle, offset = self._memory.handle(address)
            places.append([handles.setdefault(handle.hex(), len(handles)), offset])
        said = bootstrap.all_gather({"handles": list(handles), "places": places}, what="captured inputs: handles")
        bases = [
            [0 if peer == rank else self._open(peer, handle) for handle in theirs["handles"]] for peer, theirs in enumerate(said)
        ]
        for index, (address, _) in enumerate(inputs):
            places_of_ranks = (theirs["places"][index] for theirs in said)
            self._comm.fill(
                index,
                [
                    address if peer == rank else bases[peer][which] + offset
                    for peer, (which, offset) in enumerate(places_of_ranks)
                ],
            )

    def _open(self, peer: int, handle: str) -> int:
        known = self._opened.get((peer, handle))
        if known is None:
            known = self._opened[peer, handle] = self._memory.open(bytes.fromhex(handle))
        return known

    def close(self) -> None:
        """Let go of the peers' memory; the device is idle. Local, idempotent."""
        opened, self._opened = self._opened, {}
        with ExitStack() as stack:
            for base in opened.values():
                stack.callback(self._memory.close, base)


def first_difference(sizes: dict[int, list[int]]) -> str | None:
    """How the inputs that the ranks remembered differ, or None. By global rank. Pure."""
    if len({tuple(of_rank) for of_rank in sizes.values()}) == 1:
        return None
    counts = {rank: len(of_rank) for rank, of_rank in sizes.items()}
    most = max(counts.values())
    at = next(i for i in range(most) if len({of_rank[i] if i < len(of_rank) else None for of_rank in sizes.values()}) > 1)
    shown = "; ".join(f"rank {rank} {f'{of_rank[at]} bytes' if at < len(of_rank) else 'none'}" for rank, of_rank in sizes.items())
    totals = ", ".join(f"rank {rank} {count}" for rank, count in counts.items())
    return (
        f"wanted the same inputs captured on all ranks, found a difference at input number {at + 1}: {shown} ({totals} in all): "
        f"are all of them aligned to 16 bytes, and captured in one order?"
    )
