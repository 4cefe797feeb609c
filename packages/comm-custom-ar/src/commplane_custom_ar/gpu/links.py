# SPDX-License-Identifier: Apache-2.0
"""How the GPUs of a group are connected, pair by pair, as NVML knows it. Local; no CUDA context.

A rank may not see the GPUs of the others (containers with some of them each). What one rank sees holds for all: `merge`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from commplane_custom_ar.gpu.nvml import CAPS_NVLINK, CAPS_READ, CAPS_WRITE, P2P_OK, P2P_STATUS, Nvml, NvmlError

__all__ = ["Link", "Links", "look", "merge"]


@dataclass(frozen=True)
class Link:
    """Two ranks of the group, `one` below `other`. None where it cannot be told.

    `reason` says why it is not NVLink, or not known.
    """

    one: int
    other: int
    nvlink: bool | None
    p2p: bool | None
    shared_gpu: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Links:
    """All pairs of a group; group ranks."""

    pairs: tuple[Link, ...]

    @property
    def full_mesh_nvlink(self) -> bool:
        """Every pair is known to have NVLink, or shares a GPU."""
        return all(pair.nvlink is True or pair.shared_gpu for pair in self.pairs)

    @property
    def full_mesh_p2p(self) -> bool:
        """Every pair is known to reach each other's memory, over NVLink or PCIe, or shares a GPU."""
        return all(pair.p2p is True or pair.shared_gpu for pair in self.pairs)

    @property
    def shared_gpu(self) -> bool:
        """Some ranks share a GPU."""
        return any(pair.shared_gpu for pair in self.pairs)

    @property
    def without_nvlink(self) -> tuple[Link, ...]:
        """The pairs that are not known to have NVLink."""
        return tuple(pair for pair in self.pairs if not (pair.nvlink or pair.shared_gpu))

    @property
    def without_p2p(self) -> tuple[Link, ...]:
        """The pairs that are known not to reach each other's memory."""
        return tuple(pair for pair in self.pairs if pair.p2p is False and not pair.shared_gpu)

    def to_json(self) -> list[dict[str, Any]]:
        """A JSON array; `from_json` reads it back."""
        return [asdict(pair) for pair in self.pairs]

    @classmethod
    def from_json(cls, data: Sequence[Mapping[str, Any]]) -> Links:
        """Of another rank, as published."""
        return cls(tuple(Link(**pair) for pair in data))


def look(uuids: Sequence[str], *, nvml: Any = None) -> Links:
    """The links between the GPUs of the ranks, one UUID a rank in group order. What NVML does not know is None, with the reason.

    Args:
        uuids: full, ``GPU-...`` or ``MIG-...``.
        nvml: NVML's library; by default ``libnvidia-ml.so.1``.
    """
    pairs = [(i, j) for j in range(len(uuids)) for i in range(j)]
    with ExitStack() as stack:
        try:
            management = stack.enter_context(Nvml(nvml))
            handles = {uuid: management.handle(uuid) for uuid in set(uuids)}
        except NvmlError as error:
            return Links(tuple(_plain(i, j, uuids) or Link(i, j, None, None, reason=str(error)) for i, j in pairs))
        return Links(tuple(_plain(i, j, uuids) or _asked(i, j, uuids, management, handles) for i, j in pairs))


def _plain(one: int, other: int, uuids: Sequence[str]) -> Link | None:
    """What the UUIDs say alone."""
    if any(uuids[rank].startswith("MIG-") for rank in (one, other)):
        return Link(one, other, False, False, reason="CUDA does not share memory between MIG instances")
    return Link(one, other, None, None, shared_gpu=True) if uuids[one] == uuids[other] else None


def _asked(one: int, other: int, uuids: Sequence[str], nvml: Nvml, handles: Mapping[str, Any]) -> Link:
    hidden = [uuids[rank] for rank in (one, other) if handles[uuids[rank]] is None]
    if hidden:
        return Link(one, other, None, None, reason=f"{' and '.join(hidden)} cannot be seen from here")
    a, b = handles[uuids[one]], handles[uuids[other]]
    try:
        found = {caps: [nvml.p2p_status(*way, caps) for way in ((a, b), (b, a))] for caps in (CAPS_NVLINK, CAPS_READ, CAPS_WRITE)}
    except NvmlError as error:
        return Link(one, other, None, None, reason=str(error))
    nvlink = all(status == P2P_OK for status in found[CAPS_NVLINK])
    p2p = nvlink or all(status == P2P_OK for caps in (CAPS_READ, CAPS_WRITE) for status in found[caps])
    return Link(one, other, nvlink, p2p, reason="; ".join(_words(found)) if not nvlink else "")


def _words(found: Mapping[int, Sequence[int]]) -> list[str]:
    """What does not work in which way, in words."""
    names = {CAPS_NVLINK: "NVLink", CAPS_READ: "P2P reads", CAPS_WRITE: "P2P writes"}
    bad = {caps: next((s for s in statuses if s != P2P_OK), P2P_OK) for caps, statuses in found.items()}
    return [f"{names[caps]}: {P2P_STATUS.get(status, f'status {status}')}" for caps, status in bad.items() if status != P2P_OK]


def merge(seen: Sequence[Links]) -> Links:
    """What the ranks know together. Pure. A pair is connected if any rank sees that it is; unknown only if no rank can tell."""
    return Links(tuple(_best(same) for same in zip(*(links.pairs for links in seen), strict=True)))


def _best(same: Sequence[Link]) -> Link:
    # max takes the first of equals: the lowest rank's words.
    return max(same, key=lambda link: (link.shared_gpu, _known(link.nvlink), _known(link.p2p)))


def _known(value: bool | None) -> int:
    return {True: 2, False: 1, None: 0}[value]
