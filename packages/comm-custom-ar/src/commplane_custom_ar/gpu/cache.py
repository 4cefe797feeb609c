# SPDX-License-Identifier: Apache-2.0
"""What `proof` found is remembered until the machine starts again: a file each in ``$XDG_CACHE_HOME/commplane``.

Local. Only the file of a group's first rank counts, so that all ranks go the same way (`gate.agree`). A file that cannot be read
or written is a log line and nothing else: what it would have said is found out again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import commplane_custom_ar
from commplane_custom_ar.gpu.proof import Proof

__all__ = ["folder", "key", "place", "recall", "remember"]

_FORMAT: Final = 1
_STALE_AFTER_S: Final = 30 * 24 * 3600.0  # files of machines that have long been started again
_log = logging.getLogger("commplane.custom_ar")


def place() -> dict[str, str]:
    """Where this process runs: this start of the machine, and the namespaces by which containers differ. Local."""
    out = {}
    try:
        out["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError as error:
        out["boot"] = f"unknown ({error.strerror})"
    for name in ("pid", "ipc", "mnt"):
        try:
            out[name] = str(Path(f"/proc/self/ns/{name}").readlink())
        except OSError as error:
            out[name] = f"unknown ({error.strerror})"
    return out


def key(uuids: Sequence[str], drivers: Sequence[str], mps: Sequence[bool], places: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What a proof depends on, from what all ranks said, in any order of ranks. Pure."""
    return {
        "format": _FORMAT,
        "version": commplane_custom_ar.__version__,
        "gpus": sorted(uuids),
        "drivers": sorted(set(drivers)),
        "mps": any(mps),
        "places": sorted({json.dumps(p, sort_keys=True) for p in places}),
    }


def folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where the files lie, or None where there is no home. Local; nothing is created."""
    for base in (Path(environ.get("XDG_CACHE_HOME", "")), Path(environ.get("HOME", ""), ".cache")):
        if base.is_absolute():  # its specification has no other
            return base / "commplane"
    return None


def _file(where: Path, about: Mapping[str, Any]) -> Path:
    return where / f"p2p-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]}.json"


def recall(about: Mapping[str, Any], seconds: float, where: Path | None) -> Proof | None:
    """What was found for this key, or None. Local.

    A process that was held to hang after less than half of `seconds` is given its time.
    """
    if where is None:
        return None
    path = _file(where, about)
    try:
        said = json.loads(path.read_text())
        if said["key"] != about:
            raise ValueError("it is about something else")
        proof, when = Proof.from_json(said["proof"]), float(said["when"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s is ignored, and the GPUs are tried again: %r", path, error)
        return None
    if not proof.holds and proof.waited < seconds / 2:
        return None
    day = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
    return replace(proof, recalled=f"found on {day} and remembered until the machine restarts; remove {path} to try again")


def remember(about: Mapping[str, Any], proof: Proof, where: Path | None) -> None:
    """Write it down, so that who reads meanwhile sees the old file or the new one. Local.

    What says nothing of the GPUs is not kept.
    """
    if where is None or not proof.conclusive:
        return
    try:
        where.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=where, prefix=".p2p-", delete=False) as file:
            try:
                json.dump({"key": about, "proof": proof.to_json(), "when": time.time()}, file, indent=1)
                file.close()
                Path(file.name).replace(_file(where, about))
            except BaseException:
                with contextlib.suppress(OSError):
                    Path(file.name).unlink()
                raise
        for old in where.glob("p2p-*.json"):
            if time.time() - old.stat().st_mtime > _STALE_AFTER_S:
                old.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("what was found of P2P cannot be remembered in %s, and is found out again next time: %s", where, error)
