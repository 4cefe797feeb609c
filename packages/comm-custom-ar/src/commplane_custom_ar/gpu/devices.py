# SPDX-License-Identifier: Apache-2.0
"""The GPU behind a device ordinal of this process. Local; makes no CUDA context and needs no torch.

The CUDA driver is asked first: it alone knows what ``CUDA_VISIBLE_DEVICES``, ``CUDA_DEVICE_ORDER`` and the settings of an MPS
daemon come to. NVML says the rest, and stands in where the driver does not load.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from commplane_custom_ar.gpu.driver import Driver, DriverError
from commplane_custom_ar.gpu.nvml import Nvml, NvmlError
from commplane_custom_ar.gpu.visible import visible

__all__ = ["Device", "NoDevice", "device", "uses_mps"]

_MPS_FOLDER = "/tmp/nvidia-mps"  # CUDA's default


class NoDevice(Exception):
    """There is no such device, or nothing to ask for it; the text is a reason that can be shown."""


@dataclass(frozen=True)
class Device:
    """One GPU, or MIG instance, as this process has it.

    Attributes:
        ordinal: number in this process, as in ``cuda:0``; ranks give different ones to the same GPU.
        uuid: ``GPU-...`` or ``MIG-...``, the same in every process of the machine.
        name: product name.
        pci_bus_id: such as ``0000:65:00.0``; empty where the CUDA driver could not be asked.
        capability: compute capability.
        mig: whether it is a MIG instance.
        mps: whether processes share it through MPS.
        driver: version of the kernel driver, such as ``580.95.05``.
    """

    ordinal: int
    uuid: str
    name: str
    pci_bus_id: str
    capability: tuple[int, int]
    mig: bool
    mps: bool
    driver: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Device:
        """Of another rank, as published."""
        return cls(**{**data, "capability": tuple(data["capability"])})


def uses_mps(environ: Mapping[str, str]) -> bool:
    """Whether an MPS daemon seems to be there for this process: for drivers that do not say themselves."""
    return (Path(environ.get("CUDA_MPS_PIPE_DIRECTORY") or _MPS_FOLDER) / "control").exists()


def device(ordinal: int, *, cuda: Any = None, nvml: Any = None, environ: Mapping[str, str] = os.environ) -> Device:
    """The device with this ordinal.

    Args:
        ordinal: as in ``cuda:0``.
        cuda: the CUDA driver's library; by default ``libcuda.so.1``.
        nvml: NVML's library; by default ``libnvidia-ml.so.1``.
        environ: the environment of this process.

    Raises:
        NoDevice: with the reason.
    """
    with ExitStack() as stack:
        management: Nvml | None = None
        unmanaged = ""
        try:
            management = stack.enter_context(Nvml(nvml))
        except NvmlError as error:  # the driver may do without
            unmanaged = str(error)
        try:
            driver = Driver(cuda)
        except DriverError as error:
            if management is None:
                raise NoDevice(f"{error}; and {unmanaged}") from error
            try:
                return _by_nvml(ordinal, management, environ)
            except (NoDevice, NvmlError) as second:
                raise NoDevice(f"{error}; and {second}") from second
        try:
            if not 0 <= ordinal < driver.count:
                why = _why(management, environ, driver.count)
                raise NoDevice(f"cuda:{ordinal} does not exist: this process sees {driver.count} devices{why}")
            return _by_driver(ordinal, driver, management, environ)
        except (DriverError, NvmlError) as error:
            raise NoDevice(str(error)) from error


def _why(nvml: Nvml | None, environ: Mapping[str, str], count: int) -> str:
    """Why CUDA shows so few, where NVML can tell."""
    if nvml is None:
        return ""
    try:
        gpus = nvml.gpus()
    except NvmlError as error:
        return f" (NVML: {error})"
    found = visible(environ.get("CUDA_VISIBLE_DEVICES"), environ.get("CUDA_DEVICE_ORDER"), gpus)
    return f" ({found.reason})" if found.uuids is not None and len(found.uuids) == count else ""


def _by_driver(ordinal: int, driver: Driver, nvml: Nvml | None, environ: Mapping[str, str]) -> Device:
    plain, mig = driver.uuid(ordinal)
    # A driver that has only one of its two functions for UUIDs cannot tell an instance from a GPU by them.
    if not mig and nvml is not None and nvml.handle(f"GPU-{plain}") is None:
        mig = nvml.handle(f"MIG-{plain}") is not None
    mps = driver.mps(ordinal)
    return Device(
        ordinal=ordinal,
        uuid=f"{'MIG' if mig else 'GPU'}-{plain}",
        name=driver.name(ordinal),
        pci_bus_id=driver.pci_bus_id(ordinal),
        capability=driver.capability(ordinal),
        mig=mig,
        mps=uses_mps(environ) if mps is None else mps,
        driver=nvml.driver_version() if nvml is not None else _kernel_driver() or f"one that serves CUDA {driver.version()}",
    )


def _kernel_driver() -> str:
    """The version in ``/proc``, for containers without NVML; empty where it cannot be read."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return ""
    return next((word for word in words if word[0].isdigit() and "." in word), "")


def _by_nvml(ordinal: int, nvml: Nvml, environ: Mapping[str, str]) -> Device:
    gpus = nvml.gpus()
    found = visible(environ.get("CUDA_VISIBLE_DEVICES"), environ.get("CUDA_DEVICE_ORDER"), gpus)
    if found.uuids is None:
        raise NoDevice(found.reason)
    if not 0 <= ordinal < len(found.uuids):
        raise NoDevice(f"cuda:{ordinal} does not exist: this process sees {len(found.uuids)} devices ({found.reason})")
    uuid = found.uuids[ordinal]
    gpu = next((gpu for gpu in gpus if gpu.uuid == uuid), None)
    if gpu is None:  # a MIG instance, of which only the name is known
        return Device(ordinal, uuid, "MIG instance", "", (0, 0), True, uses_mps(environ), nvml.driver_version())
    return Device(ordinal, uuid, gpu.name, "", gpu.capability, gpu.mig, uses_mps(environ), nvml.driver_version())
