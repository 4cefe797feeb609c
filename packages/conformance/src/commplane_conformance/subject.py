"""The backend under test, as its wheel declares it. Needs no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from commplane.api import BackendSpec, Spec
from commplane.config import Config
from commplane.errors import CommplaneError
from commplane.plugins import PluginHost, core_version

__all__ = ["AnySubject", "Subject", "find_subject"]


class AnySubject(ABC):
    """What a run of the kit proves, of whatever kind.

    Attributes:
        folder: of the tests that are for its kind, beside this file.
        contract: name of the API that it is made for.
        page: of the documentation, which has the clauses that its tests cite.
        ranks: sizes of the groups that its tests run with; none where the kind knows no groups.
    """

    folder: ClassVar[str]
    contract: ClassVar[str]
    page: ClassVar[str]
    ranks: tuple[int, ...]

    @property
    @abstractmethod
    def declaration(self) -> Spec:
        """As the plugin registered it."""

    @property
    def name(self) -> str:
        """As users select it."""
        return self.declaration.name

    @property
    def capabilities(self) -> Collection[str]:
        """What it declares that it can do."""
        return frozenset(getattr(self.declaration, "capabilities", ()))

    @abstractmethod
    def describe(self) -> str:
        """One line for the head of a report."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """A JSON object."""

    def declared(self) -> list[str]:
        """What it declares and a test can exercise, such as ``capability network``."""
        return [f"capability {c}" for c in sorted(self.capabilities)]

    def exercised(self, item: pytest.Item) -> set[str]:
        """What of `declared` a test exercised by its parameters."""
        return set()

    def notes(self) -> list[str]:
        """More lines for the end of a report."""
        return []


@dataclass(frozen=True)
class Subject(AnySubject):
    """A backend that is proved.

    Attributes:
        spec: as the plugin registered it.
        dist: the distribution and its version.
        device: where its tensors are in this run, ``cpu`` or ``cuda``.
        ranks: sizes of the groups.
        full: whether all cases are run.
        hosts: on how many hosts the ranks are, as far as the facts tell.
    """

    folder: ClassVar[str] = "comm"
    contract: ClassVar[str] = "comm"
    page: ClassVar[str] = "docs/semantics.md"

    spec: BackendSpec
    dist: str
    device: str
    ranks: tuple[int, ...]
    full: bool
    hosts: int = 1

    @property
    def declaration(self) -> Spec:
        """As the plugin registered it."""
        return self.spec

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Those it declares, in the order of the alphabet; where it declares every one, those that all of commplane knows."""
        return tuple(sorted(self.spec.dtypes or _EVERY_DTYPE))

    def ops(self, dtype: str) -> tuple[str, ...]:
        """The reductions that it has for `dtype`: a mean is for floating-point numbers only."""
        return tuple(op for op in ("sum", "min", "max", "avg") if op in self.spec.ops and (op != "avg" or "float" in dtype))

    def describe(self) -> str:
        """One line for the head of a report."""
        api = ".".join(map(str, self.spec.api))
        ranks = ",".join(map(str, self.ranks))
        hosts = f" on {self.hosts} hosts" if self.hosts > 1 else ""
        return f"{self.name} from {self.dist}, comm API {api}, commplane {core_version()}, {ranks} ranks{hosts}, {self.device}"

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "backend": self.name,
            "dist": self.dist,
            "commplane": core_version(),
            "device": self.device,
            "ranks": list(self.ranks),
            "hosts": self.hosts,
            "full": self.full,
            "spec": self.spec.to_json(),
        }

    def declared(self) -> list[str]:
        """Capabilities, dtypes and ops."""
        dtypes, ops = (f"dtype {d}" for d in sorted(self.spec.dtypes)), (f"op {o}" for o in sorted(self.spec.ops))
        return [*super().declared(), *dtypes, *ops]

    def exercised(self, item: pytest.Item) -> set[str]:
        """The dtype and the op of a case."""
        parameters = getattr(item, "callspec", None)
        kinds = (("dtype", "dtype"), ("float_dtype", "dtype"), ("op", "op"))
        return set() if parameters is None else {f"{k} {parameters.params[n]}" for n, k in kinds if n in parameters.params}

    def notes(self) -> list[str]:
        """Where its limits are, if it has any."""
        least, most = self.spec.min_bytes, self.spec.max_bytes
        if not least and most is None:
            return []
        return [f"messages below {least} or above {most or 'any'} bytes went to other backends of the plan"]


_EVERY_DTYPE = ("float16", "bfloat16", "float32", "float64", "int8", "uint8", "int32", "int64")


def find_subject(name: str, ranks: tuple[int, ...], device: str | None, full: bool, hosts: int = 1) -> Subject:
    """The installed backend of that name.

    Raises:
        PluginError: it is not installed or cannot be used; the text lists what there is.
        CommplaneError: it does not serve any of the sizes of a group, or not the device.
    """
    host = PluginHost.discover(Config.load({}))
    host.require([name])
    found = host.backends(device)[name]
    spec = found.spec
    assert isinstance(spec, BackendSpec)
    where = device or ("cpu" if spec.device == "any" else spec.device)
    if spec.device not in ("any", where):
        raise CommplaneError(f"backend {name!r} serves device {spec.device}, found --commplane-device {where}")
    most = spec.max_world_size
    served = tuple(n for n in ranks if n >= max(2, spec.min_world_size, hosts) and (most is None or n <= most))
    if not served:
        bounds = f"{spec.min_world_size} to {most or 'any number of'}"
        raise CommplaneError(f"backend {name!r} serves groups of {bounds} ranks, found --commplane-ranks {ranks}")
    return Subject(spec, f"{found.dist or found.plugin} {found.version}", where, served, full, hosts)
