"""Which engine two ends use: a pure function of what both offer and of what each of them found, so both come to the same.

Shared memory counts only if each end has really mapped the other's pool (`mapping_refusal`): host names, addresses and flags say
nothing about it. The order of the rest is `PREFERENCE`, or one that both ends were configured with.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from commplane.errors import CommplaneError, SelectionError
from commplane_disagg.engines.envelope import unseal
from commplane_disagg.engines.handover import knock
from commplane_disagg.engines.memory import host_identity, map_peer
from commplane_disagg.engines.shm import SharedMemory, ShmMetadata

__all__ = ["PREFERENCE", "Choice", "End", "choose", "mapping_refusal"]

PREFERENCE = ("shm", "nixl", "mooncake", "tcp")
"""Best first. TCP is always there, so two ends that offer it always agree on something."""


@dataclass(frozen=True)
class End:
    """What one end publishes.

    Attributes:
        name: of the end, for texts.
        engines: names of the engines that it has open, in any order.
        mapping: None if it has mapped the other's pool, else why it could not.
    """

    name: str
    engines: Sequence[str]
    mapping: str | None = "it has not tried"


@dataclass(frozen=True)
class Choice:
    """An engine, and why not those that come before it."""

    engine: str
    refused: tuple[tuple[str, str], ...] = ()


def choose(one: End, two: End, preference: Sequence[str] = PREFERENCE) -> Choice:
    """The engine for transfers between two ends, in both directions. Pure, and the same whichever end is `one`.

    Args:
        one: either end.
        two: the other.
        preference: names, best first; equal at both ends. An engine that is not among them is not taken.

    Raises:
        SelectionError: nothing is left; the text has the reason for each.
    """
    refused: list[tuple[str, str]] = []
    for engine in preference:
        missing = sorted(end.name for end in (one, two) if engine not in end.engines)
        if missing:
            refused.append((engine, f"{' and '.join(missing)} did not open it"))
            continue
        unmapped = sorted(f"{end.name}: {end.mapping}" for end in (one, two) if end.mapping is not None)
        if engine == SharedMemory.name and unmapped:
            refused.append((engine, "; ".join(unmapped)))
            continue
        return Choice(engine, tuple(refused))
    ends = " and ".join(sorted((one.name, two.name)))
    reasons = "; ".join(f"{engine}: {why}" for engine, why in refused)
    raise SelectionError(
        f"no transfer engine for {ends}: {reasons or 'none is preferred'}; open tcp at both, which needs nothing"
    )


def mapping_refusal(metadata: bytes, peer: str, timeout: float) -> str | None:
    """Map the pool that `metadata` of the engine ``shm`` stands for, read a byte of it, and let it go: None, or why it cannot be.

    Waits for the peer for up to `timeout` seconds.
    """
    try:
        found = unseal(SharedMemory.name, 1, ShmMetadata, metadata, peer)
        if found.host != host_identity():
            return "the other is on another host, or in another network namespace"
        if not found.nbytes:
            return "the other's pool is not of its engine's allocate"
        connection, fd = knock(found.address, found.token, peer, time.monotonic() + timeout)
        try:
            mapping = map_peer(fd, found.offset, found.nbytes, peer)
            _ = mapping.memory[found.offset]
        finally:
            os.close(fd)
            connection.close()
    except CommplaneError as error:
        return str(error)
    return None
