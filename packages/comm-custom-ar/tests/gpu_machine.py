"""A machine with GPUs that are not there: `gpu_standin.c` as its three libraries; threads as ranks of a real control plane."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from torch.distributed import HashStore

from commplane.agree import Activity, BoundedStore, CaptureGuard, StoreBootstrap
from commplane_custom_ar.gpu.devices import Device

T = TypeVar("T")

UUIDS = [f"GPU-{'{0}' * 4}-{'{0}' * 2}-{'{0}' * 2}-{'{0}' * 2}-{'{0}' * 6}".format(f"{0xA0 + gpu:02x}") for gpu in range(8)]


class Machine:
    """The libraries, as files and loaded, and the environment in which processes find them.

    Args:
        folder: of this machine's own.
    """

    def __init__(self, folder: Path) -> None:
        self.library = folder / "libcommplane_car.so"
        source = Path(__file__).with_name("gpu_standin.c")
        flags = ["-std=gnu11", "-shared", "-fPIC", "-Wall"]
        subprocess.run(["cc", *flags, "-o", str(self.library), str(source)], check=True, timeout=60)
        for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
            (folder / name).symlink_to(self.library)
        memory = folder / "memory"
        memory.mkdir()
        self.env = {"LD_LIBRARY_PATH": str(folder), "STANDIN_MEMORY": str(memory), "_COMMPLANE_CAR_LIBRARY": str(self.library)}
        self.loaded = ctypes.CDLL(str(self.library))

    def environ(self, **settings: str) -> dict[str, str]:
        """For a process on this machine."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("CUDA_", "STANDIN_"))}
        return {**kept, **self.env, **settings}

    def here(self, monkeypatch: pytest.MonkeyPatch, **settings: str) -> None:
        """The same settings in this process, whose stand-in looks them up at each call."""
        for key in [key for key in os.environ if key.startswith(("CUDA_", "STANDIN_"))]:
            monkeypatch.delenv(key)
        for key, value in settings.items():
            monkeypatch.setenv(key, value)


def a_device(gpu: int = 0, **changes: Any) -> Device:
    """What `devices.device` says of one H200 of the machine."""
    plain = {
        "ordinal": gpu,
        "uuid": UUIDS[gpu],
        "name": "H200",
        "pci_bus_id": f"0000:{16 + gpu:02x}:00.0",
        "capability": (9, 0),
        "mig": False,
        "mps": False,
        "driver": "580.95.05",
    }
    return Device(**{**plain, **changes})


def ranks(
    world_size: int, function: Callable[[StoreBootstrap], T], timeout: float = 120.0, patience: float = 120.0
) -> list[T | Exception]:
    """``function(bootstrap)`` on as many threads, each with the control plane of its rank: results or exceptions, by rank.

    Args:
        world_size: number of ranks.
        function: what a rank does.
        timeout: seconds that all of it may take.
        patience: seconds that a round may take.
    """
    shared = HashStore()
    out: list[Any] = [TimeoutError(f"rank {rank} had not finished after {timeout:g} s") for rank in range(world_size)]

    def rank_main(rank: int) -> None:
        store = BoundedStore(shared, patience)
        control = StoreBootstrap(
            store,
            range(world_size),
            rank,
            prefix="p",
            timeout=patience,
            who=f"[rank {rank}]",
            guard=CaptureGuard(),
            activity=Activity(store, rank, "notes"),
        )
        try:
            out[rank] = function(control)
        except Exception as error:  # a test looks at what each rank raised
            out[rank] = error

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    return out


def all_of(found: list[T | Exception]) -> list[T]:
    """The results, where no rank raised."""
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found  # type: ignore[return-value]


__all__ = ["UUIDS", "Machine", "a_device", "all_of", "ranks"]
