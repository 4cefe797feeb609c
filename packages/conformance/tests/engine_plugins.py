"""What the wheels of engines register: ``engine_plugins:NAME`` is a plugin with the engine ``subject``, of that class."""

from __future__ import annotations

from commplane.api import TransferSpec, hookimpl


class Plugin:
    def __init__(self, factory: str) -> None:
        self.factory = factory

    @hookimpl
    def commplane_register_transfer_engines(self) -> list[TransferSpec]:
        return [TransferSpec(name="subject", api=(1, 0), factory=self.factory, capabilities={"quiet"})]


def __getattr__(name: str) -> Plugin:
    if not name[0].isupper():
        raise AttributeError(name)
    return Plugin(f"honest_engine:{name}")
