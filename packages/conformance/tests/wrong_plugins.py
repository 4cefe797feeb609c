"""What the wrong wheels register. Imports no torch: that is one of the things the kit looks for."""

from __future__ import annotations

from typing import Any

from commplane.api import BackendSpec, Capability, Numerics, QuantFormat, Usable, hookimpl


def probe(_request: Any, _facts: Any) -> Usable:
    """Always usable."""
    return Usable()


def spec(factory: str, **changes: Any) -> BackendSpec:
    """What all of them declare."""
    values: dict[str, Any] = {
        "name": "subject",
        "api": (1, 3),
        "factory": factory,
        "probe": "wrong_plugins:probe",
        "capabilities": set(Capability),
        "dtypes": {"float16", "bfloat16", "float32", "float64", "int8", "int64"},
        "ops": {"sum", "min", "max", "avg"},
        "formats": set(QuantFormat),
        "device": "cpu",
        "numerics": Numerics.RANK_ORDER,
        "priority": 10,
    }
    return BackendSpec(**{**values, **changes})


class Plugin:
    """Registers one backend, under the name `subject`."""

    def __init__(self, factory: str) -> None:
        self.factory = factory

    @hookimpl
    def commplane_register_comm_backends(self) -> list[BackendSpec]:
        return [spec(self.factory)]


def __getattr__(name: str) -> Plugin:
    """``wrong_plugins:Honest`` and ``wrong_plugins:OffByOne`` are plugins."""
    if not name[0].isupper():
        raise AttributeError(name)
    return Plugin(f"honest:{name}" if name == "Honest" else f"wrong:{name}")
