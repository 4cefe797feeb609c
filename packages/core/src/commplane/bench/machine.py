"""The machine and the software of a run, as JSON and in words: a figure says little without them."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from commplane.runtime import Communicator, Plane

__all__ = ["describe", "in_words"]

# Of all that a CPU lists, what decides which vector code can run.
_VECTOR_FLAGS = ("avx2", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")

# What tells generations apart that share a name in a virtual machine; arm64 has no name at all.
_CPU_NUMBERS = ("cpu family", "model", "cpu implementer", "cpu part")


def describe(plane: Plane, communicators: Iterable[Communicator], arguments: Sequence[str]) -> dict[str, Any]:
    """A JSON object about this rank's machine and what was measured on it. Local.

    Args:
        plane: whose plugins and ranks.
        communicators: those measured; what the probes of their backends found is kept.
        arguments: of the command, without its name.
    """
    import torch

    communicators = list(communicators)
    cpu = read_cpu(Path("/proc/cpuinfo").read_text())
    mine = plane.facts[plane.rank]
    share = os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")  # of a rank that shares its GPU
    return {
        **cpu,
        "instruction_set": platform.machine(),
        "cores": len(mine.cores),
        "cores_of_machine": os.cpu_count(),
        "caches": read_caches(Path("/sys/devices/system/cpu/cpu0/cache")),
        "memory_bytes": mine.memory_limit,
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "omp_num_threads": torch.get_num_threads(),
        "gpus": _gpus() if any(comm.key.device == "cuda" for comm in communicators) else [],
        "cuda": torch.version.cuda,
        "wheels": dict(sorted(plane.plugins.versions.values())),
        "backends": {
            c.name: dict(c.facts) for comm in communicators for c in comm.plan.candidates if c.name == comm.plan.backends[0]
        },
        "settings": {key: value for key, value in plane.config.shared().items() if key in plane.config.sources},
        "mps_share_percent": None if share is None else float(share),
        "ranks": plane.world_size,
        "hosts": len(plane.facts.hosts(list(plane.facts))),
        "load_before": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["commplane", *arguments]),
    }


def _gpus() -> list[str]:
    """The names of those that this process sees. Local."""
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def read_cpu(cpuinfo: str) -> dict[str, Any]:
    """Model, clock, vector flags and whether it is a virtual machine, from the text of /proc/cpuinfo. Pure."""
    fields = {
        key.strip().lower(): value.strip()
        for key, _, value in (line.partition(":") for line in reversed(cpuinfo.splitlines()))
        if value.strip()
    }
    flags = fields.get("flags", fields.get("features", "")).split()
    numbers = ", ".join(f"{key} {fields[key]}" for key in _CPU_NUMBERS if key in fields)
    return {
        "cpu": f"{fields.get('model name', 'CPU')}{numbers and f' ({numbers})'}",
        "cpu_mhz": float(fields["cpu mhz"]) if "cpu mhz" in fields else None,
        "virtual_machine": "hypervisor" in flags,
        "vector_flags": [flag for flag in _VECTOR_FLAGS if flag in flags],
    }


def read_caches(folder: Path) -> dict[str, dict[str, Any]]:
    """Data and unified caches of one core by level: bytes, and the cores that share one; empty where not told. Local."""
    caches = {}
    for index in sorted(folder.glob("index*")):
        if (index / "type").read_text().strip() == "Instruction":
            continue
        size = re.fullmatch(r"(\d+)([KM]?)", (index / "size").read_text().strip())
        if size is not None:
            level = f"L{(index / 'level').read_text().strip()}"
            shared = (index / "shared_cpu_list").read_text().strip()
            caches[level] = {"bytes": int(size[1]) * {"": 1, "K": 2**10, "M": 2**20}[size[2]], "shared_by_cores": shared}
    return caches


def in_words(machine: Mapping[str, Any]) -> str:
    """One line for people."""
    clock = "" if machine["cpu_mhz"] is None else f" at {machine['cpu_mhz'] / 1000:.1f} GHz"
    kind = "virtual machine" if machine["virtual_machine"] else "machine"
    caches = "".join(f", {level} {cache['bytes'] / 2**20:g} MiB" for level, cache in machine["caches"].items() if level != "L1")
    memory = "" if machine["memory_bytes"] is None else f", memory {machine['memory_bytes'] / 2**30:.1f} GiB"
    gpus = "".join(f", {n} x {name}" for name, n in Counter(machine["gpus"]).items())
    cuda = f", CUDA {machine['cuda']}" if machine["gpus"] else ""
    found = "".join(
        f", {name} with {', '.join(f'{key}={value}' for key, value in facts.items())}"
        for name, facts in machine["backends"].items()
        if facts
    )
    return (
        f"{kind} with {machine['cores']} cores of {machine['cpu']}{clock}{caches}{memory}{gpus}; {machine['kernel']}, "
        f"Python {machine['python']}, torch {machine['torch']}{cuda}{found}"
    )
