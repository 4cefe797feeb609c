"""Was a plugin made for this core? Two checks beside the resolver's, which vendored and editable installs skip."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import importlib_metadata
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from commplane.api.spec import BackendSpec, Spec, TransferSpec
from commplane.api.versions import CACHE_API, COMM_API, TRANSFER_API, ApiVersion
from commplane.plugins.report import Mismatch

__all__ = ["check_api", "check_requirements", "contract_of"]


def contract_of(spec: Spec) -> tuple[str, ApiVersion]:
    """Name and present version of the contract that `spec` belongs to."""
    if isinstance(spec, BackendSpec):
        return "comm", COMM_API
    if isinstance(spec, TransferSpec):
        return "transfer", TRANSFER_API
    return "cache", CACHE_API


def check_api(spec: Spec, dist: str) -> list[Mismatch]:
    """Equal major, and a minor not above core's."""
    name, core = contract_of(spec)
    if spec.api[0] == core[0] and spec.api[1] <= core[1]:
        return []
    newer = spec.api > core
    fix = (
        f"upgrade commplane, or install an older {dist}"
        if newer
        else f"upgrade {dist} to a release made for {name} API {core[0]}"
    )
    return [Mismatch(f"{name} API {spec.api[0]}.{spec.api[1]}", f"{name} API {core[0]}.{core[1]}", fix)]


def _installed(name: str) -> str | None:
    try:
        return str(importlib_metadata.version(name))
    except importlib_metadata.PackageNotFoundError:
        return None


def _satisfies(specifier: SpecifierSet, found: str) -> bool:
    try:
        version = Version(found)
    except InvalidVersion:
        return not specifier
    # A development version of core counts as the release it leads to: 1.2.0.dev3 serves a plugin that wants >=1.2.
    return specifier.contains(version, prereleases=True) or (
        version.is_devrelease and specifier.contains(version.base_version, prereleases=True)
    )


def check_requirements(requires: Iterable[str], installed: Callable[[str], str | None] = _installed) -> list[Mismatch]:
    """Re-read ``Requires-Dist``: what the plugin's own metadata wants against what is installed here."""
    mismatches = []
    for line in requires:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            mismatches.append(Mismatch("a valid Requires-Dist", repr(line), "rebuild the plugin's wheel"))
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = installed(requirement.name)
        ok = found is not None and _satisfies(requirement.specifier, found)
        if not ok:
            wanted = f"{requirement.name}{requirement.specifier}"
            mismatches.append(Mismatch(wanted, f"{requirement.name} {found or 'not installed'}", f'pip install "{wanted}"'))
    return mismatches
