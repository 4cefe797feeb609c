# SPDX-License-Identifier: Apache-2.0
"""Who takes part in field.py: whether it is installed, how its ranks are started, and with which settings it is at its best.

The MPI libraries have files of the same names, so each lies in a folder of its own: `FOLDER/openmpi`, `FOLDER/impi`,
`FOLDER/mpich`. mpi4py is told which one to load by its variables MPI4PY_LIBMPI and MPI4PY_MPIABI.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["CANDIDATES", "Candidate", "Missing", "Setup", "candidates"]


class Missing(Exception):
    """A candidate is not installed; the text says what is missing and how to get it."""


@dataclass(frozen=True)
class Setup:
    """Where and on what a candidate is to run.

    Attributes:
        ranks: how many processes.
        cores: on how many cores.
        folder: with the MPI libraries and vLLM's source.
    """

    ranks: int
    cores: int
    folder: Path

    @property
    def oversubscribed(self) -> bool:
        """More ranks than cores: waiting ranks have to give way, and most libraries must be told."""
        return self.ranks > self.cores


@dataclass(frozen=True)
class Candidate:
    """One line-up of ranks.

    Attributes:
        name: of the library.
        library: its key in `field_libraries.LIBRARIES`.
        settings: environment variables that are shown in the report, because they are a choice.
        environment: the others.
        launcher: the command that starts all ranks when the command of one rank is put behind it; empty where the driver starts
            each of them.
        note: what else was chosen, for the report.
    """

    name: str
    library: str
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    launcher: Sequence[str] = ()
    note: str = ""

    @property
    def label(self) -> str:
        """Name and settings."""
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.settings.items())])


def candidates(name: str, setup: Setup) -> list[Candidate]:
    """The candidates of library `name`: several where it is not known beforehand which of its settings is the best.

    Raises:
        Missing: it is not installed, or cannot run this many ranks.
    """
    return CANDIDATES[name](setup)


def _wants_modules(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise Missing(f"{module} is not installed: pip install {module}")


def _custom_ar(_setup: Setup) -> list[Candidate]:
    if importlib.util.find_spec("commplane_custom_ar") is None:
        raise Missing("commplane_custom_ar is not installed: pip install ./packages/core ./packages/comm-custom-ar")
    return [Candidate("custom_ar", "custom_ar")]


def _gloo(_setup: Setup) -> list[Candidate]:
    return [Candidate("gloo", "gloo", environment={"GLOO_SOCKET_IFNAME": "lo"})]


def _deepspeed(_setup: Setup) -> list[Candidate]:
    _wants_modules("deepspeed", "ninja")
    return [Candidate("deepspeed", "deepspeed", environment={"DS_ACCELERATOR": "cpu"})]


def _vllm(setup: Setup) -> list[Candidate]:
    if setup.ranks not in (2, 3, 4, 8):
        raise Missing(f"its kernel is for 2, 3, 4 or 8 ranks, wanted {setup.ranks}")
    source = setup.folder / "vllm"
    if (source / "csrc" / "cpu" / "shm.cpp").is_file():
        _wants_modules("ninja")
        return [Candidate("vllm", "vllm", environment={"FIELD_VLLM_SOURCE": str(source)}, note="its csrc/cpu/shm.cpp alone")]
    source_wanted = f"unpack its source distribution to {source.name} in the folder of --field"
    if importlib.util.find_spec("vllm") is None:
        raise Missing(f"neither its source nor a CPU build is there: {source_wanted}")
    version = importlib.metadata.version("vllm")
    if "+cpu" not in version:
        raise Missing(f"the installed vllm {version} is not a CPU build, and so has no shared-memory kernel: {source_wanted}")
    return [Candidate("vllm", "vllm")]


def _mpi(name: str, wheel: str, setup: Setup, library: str) -> tuple[Path, dict[str, str]]:
    """Folder and environment of one MPI, whose library file matches the pattern `library`."""
    _wants_modules("mpi4py")
    home = setup.folder / name
    found = sorted(home.glob(f"lib/{library}"))
    if not found or not (home / "bin" / "mpiexec").is_file():
        raise Missing(f"no {library} and mpiexec in {name} of the folder of --field: pip install --prefix .../{name} {wheel}")
    path = [str(home / "lib"), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return home, {"MPI4PY_LIBMPI": str(found[0]), "LD_LIBRARY_PATH": ":".join(path)}


def _openmpi(setup: Setup) -> list[Candidate]:
    home, environment = _mpi("openmpi", "openmpi", setup, "libmpi.so.40")
    launcher = [str(home / "bin" / "mpiexec"), "-n", str(setup.ranks), "--bind-to", "none"]
    if os.geteuid() == 0:
        launcher.append("--allow-run-as-root")
    if setup.oversubscribed:
        # What it does by itself when its launcher counts too few cores; said here because it does not see an affinity mask.
        launcher += ["--map-by", ":OVERSUBSCRIBE", "--mca", "mpi_yield_when_idle", "1"]
    note = "yields when idle" if setup.oversubscribed else ""
    return [Candidate("openmpi", "mpi", {}, {**environment, "MPI4PY_MPIABI": "openmpi"}, launcher, note)]


def _impi(setup: Setup) -> list[Candidate]:
    home, environment = _mpi("impi", "impi-rt", setup, "libmpi.so.12")
    environment |= {
        "MPI4PY_MPIABI": "mpich",
        "I_MPI_ROOT": str(home),
        "I_MPI_FABRICS": "shm",
        "I_MPI_PIN": "0",  # the ranks place themselves, as those of all candidates do
        "FIELD_MPI_BFLOAT16": "MPIX_C_BF16=0x4c000247",
    }
    launcher = [str(home / "bin" / "mpiexec"), "-n", str(setup.ranks)]
    # Its manual has three ways to wait; with more ranks than cores it depends on the size which is the best.
    ways: list[dict[str, str]] = [{}]
    if setup.oversubscribed:
        ways += [{"I_MPI_THREAD_YIELD": "2"}, {"I_MPI_THREAD_YIELD": "3", "I_MPI_THREAD_SLEEP": "0"}]
    return [Candidate("impi", "mpi", way, environment, launcher, "over shared memory only") for way in ways]


def _mpich(setup: Setup) -> list[Candidate]:
    home, environment = _mpi("mpich", "mpich", setup, "libmpi.so.12")
    environment |= {"MPI4PY_MPIABI": "mpich", "FIELD_MPI_BFLOAT16": "MPIX_BFLOAT16=0x4c00024c"}
    launcher = [str(home / "bin" / "mpiexec"), "-n", str(setup.ranks)]
    ways: list[dict[str, str]] = [{}]
    if setup.oversubscribed:
        ways.append({"MPIR_CVAR_POLLS_BEFORE_YIELD": "1"})
    return [Candidate("mpich", "mpi", way, environment, launcher) for way in ways]


CANDIDATES: dict[str, Callable[[Setup], list[Candidate]]] = {
    "custom_ar": _custom_ar,
    "gloo": _gloo,
    "deepspeed": _deepspeed,
    "vllm": _vllm,
    "openmpi": _openmpi,
    "impi": _impi,
    "mpich": _mpich,
}
"""In the order of the report."""
