"""What the wheels of `wrong_fused` register: ``fused_plugins:ScaleInverted``. Imports no torch."""

from __future__ import annotations

from wrong_plugins import spec

from commplane.api import BackendSpec, hookimpl


class Plugin:
    """Registers one backend, under the name `subject`."""

    def __init__(self, factory: str, formats: frozenset[str] | None = None) -> None:
        self.factory, self.formats = factory, formats

    @hookimpl
    def commplane_register_comm_backends(self) -> list[BackendSpec]:
        return [spec(self.factory, **({} if self.formats is None else {"formats": self.formats}))]


def __getattr__(name: str) -> Plugin:
    """``Honest`` has every format, ``HonestInTwo`` two, of which the others are composed; all else is of `wrong_fused`."""
    if not name[0].isupper():
        raise AttributeError(name)
    if name == "HonestInTwo":
        return Plugin("honest:Honest", frozenset({"fp8_static", "fp8_group"}))
    return Plugin("honest:Honest" if name == "Honest" else f"wrong_fused:{name}")
