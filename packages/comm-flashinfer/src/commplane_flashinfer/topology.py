"""Are the GPUs of a group such that FlashInfer's kernels run there, and pay? The ranks say what they have; one pure answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "Card", "look", "refusal"]

ARCHITECTURES = (9, 10, 12)
"""Major compute capabilities that the kernels are compiled for."""


@dataclass(frozen=True)
class Card:
    """The GPU of one rank.

    Attributes:
        uuid: identity, as NVML writes it.
        name: product.
        capability: compute capability.
        confidential: whether the machine does confidential computing.
    """

    uuid: str
    name: str
    capability: tuple[int, int]
    confidential: bool


def refusal(cards: Sequence[Card], linked: Sequence[Sequence[str]], ranks: Sequence[int], any_topology: bool) -> str | None:
    """Why the group is none for these kernels, or None. Pure: ranks that gathered the same give the same.

    Args:
        cards: of the ranks, in group order.
        linked: for each rank, the UUIDs of cards that it sees NVLink to.
        ranks: global ranks in group order.
        any_topology: whether GPUs without NVLink will do.
    """
    private = [r for r, c in zip(ranks, cards, strict=True) if c.confidential]
    if private:
        return f"wanted machines without confidential computing, found it on {_ranks(private)}: use another backend there"
    old = [r for r, c in zip(ranks, cards, strict=True) if c.capability[0] not in ARCHITECTURES]
    if old:
        found = ", ".join(
            f"{c.name} with {c.capability[0]}.{c.capability[1]}" for c in cards if c.capability[0] not in ARCHITECTURES
        )
        return f"wanted GPUs of compute capability 9, 10 or 12, found {found} on {_ranks(old)}: use another backend there"
    kinds = {c.capability for c in cards}
    if len(kinds) > 1:
        found = "; ".join(f"rank {r}: {c.capability[0]}.{c.capability[1]}" for r, c in zip(ranks, cards, strict=True))
        return f"wanted GPUs of one compute capability, found {found}: group alike ones"
    if any_topology:
        return None
    apart = [
        f"ranks {ranks[i]} and {ranks[j]}"
        for i, one in enumerate(cards)
        for j, other in enumerate(cards)
        if i < j and one.uuid != other.uuid and other.uuid not in linked[i]
    ]
    if apart:
        return (
            f"wanted NVLink between all GPUs, found none between {', '.join(apart)}: other backends are many times faster there; "
            f"set flashinfer.any_topology=true to run all the same"
        )
    return None


def look(uuid: str, others: Sequence[str]) -> list[str]:
    """Those of `others` that the card `uuid` has NVLink to, or that NVML cannot tell apart from it. Local, through NVML."""
    import pynvml  # type: ignore[import-untyped,import-not-found,unused-ignore]

    pynvml.nvmlInit()
    try:
        mine = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        found = []
        for other in others:
            if other == uuid:
                continue
            theirs = pynvml.nvmlDeviceGetHandleByUUID(other)
            if pynvml.nvmlDeviceGetP2PStatus(mine, theirs, pynvml.NVML_P2P_CAPS_INDEX_NVLINK) == pynvml.NVML_P2P_STATUS_OK:
                found.append(other)
        return found
    finally:
        pynvml.nvmlShutdown()


def _ranks(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
