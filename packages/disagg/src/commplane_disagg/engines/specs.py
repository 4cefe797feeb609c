"""The declarations of the engines. Imports none of them."""

from __future__ import annotations

from commplane.api import TransferSpec

__all__ = ["SPECS"]

_HERE = "commplane_disagg.engines"

SPECS = (
    TransferSpec(name="shm", api=(1, 0), factory=f"{_HERE}.shm:SharedMemory", capabilities={"quiet"}),
    TransferSpec(name="tcp", api=(1, 0), factory=f"{_HERE}.tcp:Tcp", capabilities={"network", "fenced"}),
    TransferSpec(name="nixl", api=(1, 0), factory=f"{_HERE}.nixl:Nixl", capabilities={"network"}),
    TransferSpec(name="mooncake", api=(1, 0), factory=f"{_HERE}.mooncake:Mooncake", capabilities={"network"}),
)
"""What `commplane_register_transfer_engines` returns."""
