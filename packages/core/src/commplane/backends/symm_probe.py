"""Can this group use torch's symmetric memory? Local; torch is loaded only when a group on CUDA is probed."""

from __future__ import annotations

import importlib.util

from commplane.api import Facts, ProbeRequest, Unusable, Usable, Verdict

__all__ = ["OLDEST_TORCH", "OPERATORS", "WORLD_SIZES", "probe"]

OLDEST_TORCH = (2, 8)
"""The first release with all of `OPERATORS`."""

OPERATORS = ("one_shot_all_reduce_out", "one_shot_all_reduce_copy_out", "two_shot_all_reduce_", "two_shot_all_reduce_out")
"""What is called in ``torch.ops.symm_mem``; none of those that begin with ``multimem``."""

WORLD_SIZES = (2, 4, 8)
"""torch's kernels are specialised for these. For others they begin at +0.0, so that -0.0 on all ranks would come out as +0.0
(S54), and the two-shot into another tensor refuses."""


def probe(request: ProbeRequest, facts: Facts) -> Verdict:
    """One host, a number of ranks that torch's kernels are made for, and a CUDA build of torch that has the operators."""
    if not facts.same_host(request.ranks):
        return Unusable(
            f"the group spans hosts, and this backend does not ({facts.describe_hosts(request.ranks)}); "
            f"groups inside a host can have it"
        )
    if request.world_size not in WORLD_SIZES:
        return Unusable(
            f"serves groups of {', '.join(map(str, WORLD_SIZES))} ranks, this one has {request.world_size}: "
            f"use another backend for it"
        )
    if importlib.util.find_spec("torch") is None:
        return Unusable("torch is not installed: pip install commplane[torch]")
    import torch

    reason = refusal(torch.__version__, torch.version.cuda, [n for n in OPERATORS if not hasattr(torch.ops.symm_mem, n)])
    if reason is not None:
        return Unusable(reason)
    if not torch.cuda.is_available():
        return Unusable("wanted a CUDA device, torch finds none: check the driver and CUDA_VISIBLE_DEVICES")
    # Said in the plan, because an operator who reads it should know: there is no flag that could end such a wait.
    return Usable({"torch": torch.__version__, "multicast": "never", "waits": "on the device, without a deadline"})


def refusal(version: str, cuda: str | None, missing: list[str]) -> str | None:
    """Why a build of torch is of no use here, or None. Pure.

    Args:
        version: ``torch.__version__``.
        cuda: ``torch.version.cuda``.
        missing: those of `OPERATORS` that it does not have.
    """
    oldest = ".".join(map(str, OLDEST_TORCH))
    numbers = tuple(int(part) if part.isdecimal() else 0 for part in version.split("+")[0].split(".")[:2])
    if numbers < OLDEST_TORCH:
        return f"wanted torch {oldest} or newer, found {version}: install a newer torch"
    if cuda is None:
        return f"wanted a CUDA build of torch, found {version} without CUDA: install one"
    if missing:
        return f"wanted torch.ops.symm_mem with {', '.join(missing)}, torch {version} has no such operator: install another torch"
    return None
