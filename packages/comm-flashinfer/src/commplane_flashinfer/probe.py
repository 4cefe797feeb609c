"""May this rank use FlashInfer, as far as can be told without a CUDA context and without importing it? Local, some milliseconds.

Which GPU a rank has is not known here; what depends on it is agreed in `open` (`commplane_flashinfer.topology`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from commplane.api import Facts, ProbeRequest, Unusable, Usable, Verdict
from commplane_flashinfer import versions
from commplane_flashinfer.capacity import WORLD_SIZES

__all__ = ["missing_module", "probe"]

# Importing flashinfer.comm takes 4 s, so that it can be imported is judged by what it would import.
_NEEDED = {
    "torch": "pip install torch",
    "flashinfer": "pip install 'commplane-flashinfer[flashinfer]'",
    "cuda.bindings": "pip install cuda-bindings",
    "pynvml": "pip install nvidia-ml-py",
}


def missing_module(find: Callable[[str], object | None] = importlib.util.find_spec) -> str | None:
    """The first of the modules that FlashInfer cannot do without and that is not installed, with what to do. Local."""
    for name, fix in _NEEDED.items():
        try:
            found = find(name)
        except (ImportError, ValueError):  # of the package that it is in; of a module in sys.modules that says no origin
            found = None
        if found is None:
            return f"wanted the module {name}, found none: {fix}"
    return None


def probe(request: ProbeRequest, facts: Facts) -> Verdict:
    """One host, a number of ranks that there are kernels for, and a FlashInfer that is new enough and complete."""
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
    reason = missing_module()
    if reason is not None:
        return Unusable(reason)
    found = versions.installed("flashinfer-python")
    reason = versions.refusal(versions.required(), found)
    if reason is not None:
        return Unusable(reason)
    # Said in the plan, because an operator who reads it should know: there is no flag that could end such a wait.
    return Usable(
        {"flashinfer": str(found), "kernels": "trtllm", "multicast": "never", "waits": "on the device, without a deadline"}
    )
