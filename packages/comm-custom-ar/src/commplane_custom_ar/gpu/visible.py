# SPDX-License-Identifier: Apache-2.0
"""``CUDA_VISIBLE_DEVICES`` as CUDA reads it. Pure.

The first entry says what the list is made of: numbers, UUIDs of GPUs or a UUID of a MIG instance. An entry that is none of these,
or means no GPU, ends the list; one that comes twice makes it empty.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Gpu", "Visible", "visible"]


@dataclass(frozen=True)
class Gpu:
    """A GPU as NVML shows it: its full UUID (``GPU-...``), and whether it is split into MIG instances."""

    uuid: str
    name: str
    capability: tuple[int, int]
    mig: bool = False


@dataclass(frozen=True)
class Visible:
    """UUIDs by device ordinal, or None where they cannot be told without the CUDA driver; `reason` says why there are no more."""

    uuids: tuple[str, ...] | None
    reason: str = ""


def visible(value: str | None, order: str | None, gpus: Sequence[Gpu]) -> Visible:
    """What a process sees.

    Args:
        value: ``CUDA_VISIBLE_DEVICES``, or None where it is not set.
        order: ``CUDA_DEVICE_ORDER``, or None.
        gpus: by PCI bus id, the order of NVML.
    """
    if value is not None and value.startswith("GPU-"):
        return _by_uuid(value, gpus)
    if value is not None and value.startswith("MIG-"):
        # CUDA gives a process one instance, whatever follows. Whether it exists is the driver's to say.
        first = value.partition(",")[0]
        return Visible((first,), f"CUDA shows one MIG instance to a process, {first!r}")
    if value is not None and not _numbers(value):
        return Visible((), _none(value))
    if any(gpu.mig for gpu in gpus):
        return Visible(None, "which MIG instance a number means is known to the CUDA driver alone: name the instance by its UUID")
    if order != "PCI_BUS_ID" and len({gpu.name for gpu in gpus}) > 1:
        names = ", ".join(gpu.name for gpu in gpus)
        return Visible(
            None, f"which of unequal GPUs ({names}) CUDA holds for the fastest is not known: set CUDA_DEVICE_ORDER to PCI_BUS_ID"
        )
    if value is None:
        return Visible(tuple(gpu.uuid for gpu in gpus), f"the machine shows {len(gpus)}")
    return _by_number(value, gpus)


def _none(value: str) -> str:
    return f"CUDA_VISIBLE_DEVICES is {value!r}, whose first entry is no GPU" if value.strip() else "CUDA_VISIBLE_DEVICES is empty"


def _numbers(value: str) -> list[int]:
    """The numbers before the first entry that is none or below 0."""
    out = []
    for entry in value.split(","):
        found = re.match(r"\s*[+]?(\d+)", entry)  # like C's strtoul: what follows the digits does not count
        if found is None:
            break
        out.append(int(found.group(1)))
    return out


def _twice(value: str) -> Visible:
    return Visible((), f"CUDA_VISIBLE_DEVICES is {value!r}, which names a GPU twice: CUDA then shows none")


def _by_number(value: str, gpus: Sequence[Gpu]) -> Visible:
    numbers = _numbers(value)
    if len(set(numbers)) < len(numbers):
        return _twice(value)
    out: list[str] = []
    for number in numbers:
        if number >= len(gpus):
            why = f"CUDA_VISIBLE_DEVICES is {value!r}, and {number} is none of the {len(gpus)} GPUs: the list ends before it"
            return Visible(tuple(out), why)
        out.append(gpus[number].uuid)
    return Visible(tuple(out), f"CUDA_VISIBLE_DEVICES is {value!r}")


def _by_uuid(value: str, gpus: Sequence[Gpu]) -> Visible:
    out: list[str] = []
    for entry in (part.strip() for part in value.split(",")):
        found = [gpu.uuid for gpu in gpus if gpu.uuid.lower().startswith(entry.lower())] if entry.startswith("GPU-") else []
        if len(found) != 1:
            count = "no GPU" if not found else f"{len(found)} GPUs"
            return Visible(tuple(out), f"CUDA_VISIBLE_DEVICES is {value!r}, and {entry!r} means {count}: the list ends before it")
        if found[0] in out:
            return _twice(value)
        out.append(found[0])
    return Visible(tuple(out), f"CUDA_VISIBLE_DEVICES is {value!r}")
