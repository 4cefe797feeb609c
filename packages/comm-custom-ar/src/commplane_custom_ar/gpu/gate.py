# SPDX-License-Identifier: Apache-2.0
"""May this group use custom_ar on CUDA, and over what? One answer for all ranks.

`probe` is local and quick. `agree` is collective, a part of the backend's `open`: the ranks gather what they know, `decide` makes
one answer of it, which depends on nothing else, and what the driver says is proved before it is believed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from commplane.api import BuildContext, Facts, ProbeRequest, Unusable, Usable, Verdict
from commplane.errors import CommunicatorError
from commplane_custom_ar import _library
from commplane_custom_ar.gpu import cache
from commplane_custom_ar.gpu.devices import Device, NoDevice, device
from commplane_custom_ar.gpu.driver import Driver, DriverError
from commplane_custom_ar.gpu.links import Link, Links, look, merge
from commplane_custom_ar.gpu.memory import GpuMemory, GpuMemoryError
from commplane_custom_ar.gpu.proof import Proof, prove

__all__ = ["Allowed", "Refused", "Sources", "agree", "decide", "probe"]

MAX_RANKS: Final = 8
# Of what is left for opening the backend. A round of the control plane waits longer than this, so a rank whose process hangs
# can still tell the others.
_SHARE_OF_DEADLINE: Final = 0.5


@dataclass(frozen=True)
class Allowed:
    """The group may use it.

    Attributes:
        kind: ``"nvlink"`` (every pair has it), ``"pcie"`` (two GPUs that reach each other without it) or ``"shared"`` (all ranks
            on one GPU, side by side through MPS). What algorithms are right depends on it.
        facts: what was found, for people.
    """

    kind: str
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    """The group may not; the reason is the same on every rank."""

    reason: str


@dataclass(frozen=True)
class Sources:
    """Where facts come from; replaced in tests."""

    device: Callable[[int], Device] = device
    links: Callable[[Sequence[str]], Links] = look
    place: Callable[[], dict[str, str]] = cache.place
    folder: Callable[[], Path | None] = cache.folder
    library: Callable[[], Path] = _library._find_library
    prove: Callable[..., Proof] = prove


def probe(request: ProbeRequest, facts: Facts) -> Verdict:
    """Whether this rank could. Local: no CUDA context, but the CUDA driver is initialised.

    Which device this rank will use is not known yet; `agree` looks at that.
    """
    if not facts.same_host(request.ranks):
        return Unusable(
            f"the group spans hosts, and GPU memory is shared inside one ({facts.describe_hosts(request.ranks)}); "
            f"groups inside a host keep it"
        )
    try:
        GpuMemory(str(_library._find_library().resolve()), 0).check()
        driver = Driver()
        if driver.count == 0:
            setting = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
            return Unusable(f"no CUDA device is visible: CUDA_VISIBLE_DEVICES is {setting!r}")
        names = [driver.name(ordinal) for ordinal in range(driver.count)]
        return Usable({"gpus": ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names)), "cuda": driver.version()})
    except (ImportError, GpuMemoryError, DriverError) as error:
        return Unusable(str(error))


def decide(world_size: int, devices: Sequence[Device], links: Links, proof: Proof | None) -> Allowed | Refused:
    """The answer for a group. Pure: ranks that gathered the same give the same.

    Args:
        world_size: number of ranks.
        devices: of the ranks, in group order.
        links: of all pairs, as the ranks know them together.
        proof: that memory goes everywhere; None where it has not been tried yet, which is right only after an answer without it.

    Different products of one compute capability are allowed. Different compute capabilities are refused: kernels and the sizes at
    which to change between them are chosen by it, and ranks of one group must choose alike. So are different drivers: the ranks
    are then not on one machine, or one of them runs with the libraries of another.
    """
    if not 2 <= world_size <= MAX_RANKS:
        return Refused(f"serves groups of 2 to {MAX_RANKS} ranks on CUDA, this one has {world_size}")
    mig = [i for i, d in enumerate(devices) if d.mig]
    if mig:
        return Refused(
            f"{_ranks(mig)} {'has' if len(mig) == 1 else 'have'} a MIG instance, and CUDA does not share memory between MIG "
            f"instances: give each rank a whole GPU"
        )
    for what, values in (
        ("compute capabilities", [".".join(map(str, d.capability)) for d in devices]),
        ("driver versions", [d.driver for d in devices]),
    ):
        if len(set(values)) > 1:
            return Refused(f"the ranks have GPUs of different {what} ({_by_value(values)}): wanted one for the whole group")
    kind = _kind(world_size, devices, links)
    if isinstance(kind, Refused):
        return kind
    if proof is not None and not proof.holds:
        shown = "; ".join(proof.failures)
        return Refused(f"{shown}{f' ({proof.recalled})' if proof.recalled else ''}")
    tried = "not yet" if proof is None else proof.recalled or "memory written and read back between all ranks, just now"
    names = [d.name for d in devices]
    gpus = names[0] if len(set(names)) == 1 else _by_value(names)
    facts = {"kind": kind, "gpus": gpus, "driver": devices[0].driver, "proof": tried}
    if kind == "pcie":
        facts["not nvlink"] = links.pairs[0].reason
    return Allowed(kind, facts)


def _kind(world_size: int, devices: Sequence[Device], links: Links) -> str | Refused:
    """What the group's memory goes over, or why it does not."""
    on = [d.uuid for d in devices]
    if len(set(on)) == 1:
        without = [i for i, d in enumerate(devices) if not d.mps]
        if not without:
            return "shared"
        return Refused(
            f"all ranks are on one GPU ({on[0]}), and {_ranks(without)} {'does' if len(without) == 1 else 'do'} not use "
            f"MPS: their kernels would take turns of milliseconds and wait for each other; start nvidia-cuda-mps-control -d "
            f"before the ranks, with the same CUDA_MPS_PIPE_DIRECTORY, or give each rank a GPU of its own"
        )
    if links.shared_gpu:
        return Refused(f"some ranks share a GPU ({_by_value(on)}): wanted one GPU a rank, or one for all of them under MPS")
    if links.full_mesh_nvlink:
        return "nvlink"
    blocked = links.without_p2p
    if blocked:
        return Refused(f"GPU memory cannot be shared between {_pairs(blocked, on)}")
    missing = links.without_nvlink
    if world_size == 2:
        return "pcie"  # also where nothing is known of the link: the proof decides, and what suits PCIe is right on NVLink too
    return Refused(
        f"more than 2 ranks want NVLink between all GPUs, and it is not there, or cannot be seen, between {_pairs(missing, on)}"
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"group {'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def _by_value(values: Sequence[str]) -> str:
    found: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        found.setdefault(value, []).append(rank)
    return "; ".join(f"{_ranks(ranks)}: {value}" for value, ranks in found.items())


def _pairs(pairs: Sequence[Link], uuids: Sequence[str]) -> str:
    """GPUs by UUID with their group ranks; pairs with the same reason together."""
    by_reason: dict[str, list[str]] = {}
    for pair in pairs:
        text = f"{uuids[pair.one]} and {uuids[pair.other]} (group ranks {pair.one} and {pair.other})"
        by_reason.setdefault(pair.reason, []).append(text)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())


def agree(context: BuildContext, sources: Sources | None = None) -> Allowed:
    """The answer for this communicator. Collective over its ranks, in the backend's `open`.

    Raises:
        CommunicatorError: the group may not, with the same text on every rank.
        PeerError: a rank did not take part.
    """
    sources = Sources() if sources is None else sources
    bootstrap = context.bootstrap

    def refuse(reason: str) -> CommunicatorError:
        return CommunicatorError(f"[{context.key.purpose} {context.backend}] {reason}")

    said: list[dict[str, Any]] = bootstrap.all_gather(_say(context.device, sources), what="GPUs of the ranks")
    unknown = {rank: s["problem"] for rank, s in zip(bootstrap.ranks, said, strict=True) if s["problem"]}
    if unknown:
        raise refuse("; ".join(f"rank {rank}: {problem}" for rank, problem in unknown.items()))
    devices = [Device.from_json(s["device"]) for s in said]
    uuids = [d.uuid for d in devices]
    seen = bootstrap.all_gather(sources.links(uuids).to_json(), what="links between GPUs")
    links = merge([Links.from_json(s) for s in seen])
    answer = decide(context.world_size, devices, links, None)
    if isinstance(answer, Refused):
        raise refuse(answer.reason)
    proof = _proof(context, sources, devices, [s["place"] for s in said], said[bootstrap.rank]["library"])
    answer = decide(context.world_size, devices, links, proof)
    if isinstance(answer, Refused):
        raise refuse(answer.reason)
    return answer


def _say(where: str, sources: Sources) -> dict[str, Any]:
    """What this rank tells the others of itself. Local."""
    kind, _, ordinal = where.partition(":")
    try:
        if kind != "cuda" or not ordinal.isdecimal():
            raise NoDevice(f"wanted a device such as 'cuda:0', found {where!r}")
        found, library = sources.device(int(ordinal)), str(sources.library().resolve())
        return {"problem": "", "device": found.to_json(), "library": library, "place": sources.place()}
    except (NoDevice, ImportError) as error:
        return {"problem": str(error)}


def _proof(
    context: BuildContext, sources: Sources, devices: Sequence[Device], places: Sequence[Mapping[str, str]], library: str
) -> Proof:
    """Remembered by the first rank, or tried. Collective: the first rank says which, so that no rank waits for others alone."""
    bootstrap = context.bootstrap
    uuids = [d.uuid for d in devices]
    seconds = bootstrap.broadcast(context.deadline.remaining() * _SHARE_OF_DEADLINE, what="P2P proof: time")
    about = cache.key(uuids, [d.driver for d in devices], [d.mps for d in devices], places)
    folder = sources.folder() if bootstrap.rank == 0 else None  # the other ranks neither read nor write
    known = cache.recall(about, seconds, folder)
    remembered = bootstrap.broadcast(known and known.to_json(), what="P2P proof: known")
    if remembered is not None:
        return Proof.from_json(remembered)
    proof = sources.prove(bootstrap, uuids, ordinal=devices[bootstrap.rank].ordinal, library=library, seconds=seconds)
    cache.remember(about, proof, folder)
    return proof
