"""Is the FlashInfer that is installed one that this wheel was made for? The range is read from this wheel's own metadata.

The resolver looks at it only where the extra was asked for, and not where a wheel is vendored or replaced later.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

__all__ = ["EXTRA", "installed", "refusal", "required"]

EXTRA = "flashinfer"
_OWN = "commplane-flashinfer"


def required(read: Callable[[str], Sequence[str] | None] = importlib.metadata.requires) -> Requirement | None:
    """What the extra of this distribution asks for; None where its metadata is missing or says nothing. Local."""
    try:
        lines = read(_OWN) or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    for line in lines:
        try:
            wanted = Requirement(line)
        except InvalidRequirement:
            continue
        if wanted.name == "flashinfer-python" and wanted.marker is not None and wanted.marker.evaluate({"extra": EXTRA}):
            return wanted
    return None


def installed(name: str, read: Callable[[str], str] = importlib.metadata.version) -> str | None:
    """Version of a distribution; None where it is not installed, or has no metadata. Local."""
    try:
        return read(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def refusal(wanted: Requirement | None, found: str | None) -> str | None:
    """Why the version `found` will not do, or None. Pure."""
    if wanted is None:
        return (
            f"wanted to read from the metadata of {_OWN} which flashinfer-python it was made for, found none: "
            f"install {_OWN} as a wheel"
        )
    fix = f"pip install '{wanted.name}{wanted.specifier}'"
    if found is None:
        return f"wanted {wanted.name}{wanted.specifier}, found no metadata of it: {fix}"
    try:
        version = Version(found)
    except InvalidVersion:
        return f"wanted {wanted.name}{wanted.specifier}, found {found!r}, which is no version: {fix}"
    if not wanted.specifier.contains(version, prereleases=True):
        return f"wanted {wanted.name}{wanted.specifier}, found {found}: {fix}"
    return None
