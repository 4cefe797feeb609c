"""What plugins declare. Specs are data: importing them needs neither torch nor any native library."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from commplane.api.types import Capability, Collective, Numerics, QuantFormat, ReduceOp, Vote
from commplane.api.versions import ApiVersion

__all__ = ["BackendSpec", "PageStoreSpec", "Spec", "SyncField", "SyncSpec", "TransferSpec"]


def _check_path(owner: str, label: str, path: str) -> None:
    module, sep, attribute = path.partition(":")
    if not (module and sep and attribute):
        raise ValueError(f"{owner}: {label} must read 'package.module:attribute', found {path!r}")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What all specs share.

    Attributes:
        name: the name users select by; unique among installed plugins for its kind, but that one plugin may give a backend of
            one name for each type of device.
        api: the contract version the plugin was made for, a literal such as ``(1, 0)``.
    """

    name: str
    api: ApiVersion

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"{type(self).__name__}: name must be an identifier, found {self.name!r}")
        api = tuple(self.api) if isinstance(self.api, (tuple, list)) else ()  # type: ignore[redundant-expr]
        if len(api) != 2 or not all(isinstance(n, int) for n in api):
            raise ValueError(f"{self.name}: api must be two integers such as (1, 0), found {self.api!r}")
        object.__setattr__(self, "api", api)

    def set_defaulted(self, attribute: str, value: object) -> None:
        """Normalise a field of a frozen instance during construction."""
        object.__setattr__(self, attribute, value)


@dataclass(frozen=True, kw_only=True)
class BackendSpec(Spec):
    """A provider of communicators.

    Attributes:
        factory: ``"package.module:Class"`` of a `CommBackend`; imported when the backend is built.
        probe: ``"package.module:function"`` called as ``probe(request, facts)``; imported when a group is probed.
        capabilities: what it can do.
        dtypes: names of dtypes it serves, such as ``"bfloat16"``; empty means every dtype.
        device: device type it serves, or ``"any"``.
        ops: reductions it serves.
        formats: of `all_reduce_rms_norm_quant`: the formats it serves.
        min_world_size: smallest group.
        max_world_size: largest group, or None.
        min_bytes: smallest message in bytes it should be chosen for.
        max_bytes: largest message in bytes it can serve, or None.
        numerics: what it promises about the order of additions.
        priority: higher is preferred where the user gave no order; equal ones are ordered by name. Below 0: used only where
            the user names it.
        options: settings of its own with their defaults; the type of a default is the type of the setting.
    """

    factory: str
    probe: str
    capabilities: Collection[Capability]
    dtypes: Collection[str]
    device: str
    ops: Collection[str] = ("sum",)
    formats: Collection[str] = ()
    min_world_size: int = 2
    max_world_size: int | None = None
    min_bytes: int = 0
    max_bytes: int | None = None
    numerics: Numerics = Numerics.UNORDERED
    priority: int = 0
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_path(self.name, "factory", self.factory)
        _check_path(self.name, "probe", self.probe)
        for label in ("capabilities", "dtypes", "ops", "formats"):
            if isinstance(getattr(self, label), str):
                raise ValueError(f"{self.name}: {label} must be a collection of names, found {getattr(self, label)!r}")
        self.set_defaulted("capabilities", frozenset(Capability(c) for c in self.capabilities))
        self.set_defaulted("dtypes", frozenset(self.dtypes))
        self.set_defaulted("ops", frozenset(ReduceOp(o) for o in self.ops))
        self.set_defaulted("formats", frozenset(QuantFormat(f) for f in self.formats))
        if bool(self.formats) != (Capability.ALL_REDUCE_RMS_NORM_QUANT in self.capabilities):
            raise ValueError(f"{self.name}: formats and the capability all_reduce_rms_norm_quant go together, found one of them")
        self.set_defaulted("numerics", Numerics(self.numerics))
        self.set_defaulted("options", dict(self.options))
        if self.max_world_size is not None and self.max_world_size < self.min_world_size:
            raise ValueError(f"{self.name}: max_world_size {self.max_world_size} is below min_world_size {self.min_world_size}")
        if self.max_bytes is not None and self.max_bytes < self.min_bytes:
            raise ValueError(f"{self.name}: max_bytes {self.max_bytes} is below min_bytes {self.min_bytes}")

    def collectives(self) -> list[Collective]:
        """The collectives among the capabilities, in the order of the enumeration."""
        return [c for c in Collective if Capability(c.value) in self.capabilities]

    def to_json(self) -> dict[str, Any]:
        """A JSON object that is equal for equal specs."""
        return {
            "name": self.name,
            "api": list(self.api),
            "factory": self.factory,
            "capabilities": sorted(map(str, self.capabilities)),
            "dtypes": sorted(self.dtypes),
            "device": self.device,
            "ops": sorted(map(str, self.ops)),
            "formats": sorted(map(str, self.formats)),
            "world_size": [self.min_world_size, self.max_world_size],
            "bytes": [self.min_bytes, self.max_bytes],
            "numerics": str(self.numerics),
            "priority": self.priority,
        }


@dataclass(frozen=True, kw_only=True)
class TransferSpec(Spec):
    """A provider of KV transfer between prefill and decode; `factory` is imported when a transfer is set up."""

    factory: str
    capabilities: Collection[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_path(self.name, "factory", self.factory)
        self.set_defaulted("capabilities", frozenset(self.capabilities))


@dataclass(frozen=True, kw_only=True)
class PageStoreSpec(Spec):
    """A storage tier for cache pages; `factory` is imported when a cache is opened.

    `capabilities` are words that `PageStore` explains, such as ``"durable"``.
    """

    factory: str
    tier: str = "storage"
    capabilities: Collection[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_path(self.name, "factory", self.factory)
        if self.tier not in ("device", "host", "storage"):
            raise ValueError(f"{self.name}: tier must be device, host or storage, found {self.tier!r}")
        if isinstance(self.capabilities, str):
            raise ValueError(f"{self.name}: capabilities must be a collection of words, found {self.capabilities!r}")
        self.set_defaulted("capabilities", frozenset(self.capabilities))


@dataclass(frozen=True)
class SyncField:
    """A number of a sync round, or a vector of them: a name and the rule by which the ranks' values become one.

    Attributes:
        name: unique in its spec.
        rule: of each number, element by element where there are several.
        count: how many numbers; fixed, so that every round has one layout. With one the value is an integer, else a sequence.
    """

    name: str
    rule: Vote
    count: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", Vote(self.rule))
        if type(self.count) is not int or self.count < 1:
            raise ValueError(f"{self.name}: count must be a positive integer, found {self.count!r}")


@dataclass(frozen=True, kw_only=True)
class SyncSpec(Spec):
    """Numbers that a plugin wants agreed in every sync round of a group; the schema is fixed once registered."""

    fields: tuple[SyncField, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.set_defaulted("fields", tuple(self.fields))
        names = [f.name for f in self.fields]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"{self.name}: fields must be named, once each, found {names}")
