"""examples/backend-mpi is treated as what it shows, a stranger's wheel: built alone, installed by path, held to what all are."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

EXAMPLE = ROOT / "examples" / "backend-mpi"
KIT = ROOT / "packages" / "conformance"

pytestmark = pytest.mark.timeout(170)


def python(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    command = [sys.executable, *arguments]
    out = subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=160)
    assert out.returncode == 0, f"{out.stdout[-8000:]}\n{out.stderr[-8000:]}"
    return out.stdout


@pytest.fixture(scope="module")
def beside_core(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The environment of a Python that finds the wheel, what it needs and the kit in a folder of their own."""
    folder = tmp_path_factory.mktemp("mpi")
    pip, site = ("-m", "pip", "--quiet", "--disable-pip-version-check"), folder / "site"
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    for name, source in (("wheel", EXAMPLE), ("kit", KIT)):
        python(*build, name, str(source), cwd=folder)
    # Not --target: that leaves out the folder lib, where the wheel of MPICH has its library.
    install = [*pip, "install", "--prefix", str(site)]
    python(*install, *map(str, folder.glob("wheel/*.whl")), cwd=folder)
    python(*install, "--no-deps", *map(str, folder.glob("kit/*.whl")), cwd=folder)
    path = [*map(str, site.glob("lib*/python*/site-packages")), os.environ.get("PYTHONPATH", "")]
    # Where mpi4py does not look by itself; without it MPICH was there before, and mpi4py finds it.
    found = next(site.glob("lib/libmpi.so.12"), None)
    library = {"MPI4PY_LIBMPI": str(found)} if found else {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1", **library}


@pytest.mark.long
def test_the_mpi_example_passes_the_conformance_kit(beside_core: Mapping[str, str], tmp_path: Path) -> None:
    kit = ["--pyargs", "commplane_conformance", "--commplane-backend", "mpi", "--commplane-ranks", "2"]
    kit += ["--commplane-report", "report.json"]
    kit += ["--commplane-expected-failures", str(EXAMPLE / "conformance-expected-failures.txt")]
    python("-m", "pytest", "-q", "-p", "no:cacheprovider", *kit, cwd=tmp_path, env=beside_core)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["summary"]["passed"] > 100
    assert report["unexercised"] == []


@pytest.mark.long
def test_the_mpi_example_stands_in_the_bench_table_beside_torch(beside_core: Mapping[str, str], tmp_path: Path) -> None:
    options = [
        "--backends",
        "mpi",
        "--sizes",
        "64,8K",
        "--dtypes",
        "f32,bf16",
        "--pin",
        "off",
        "--rounds",
        "2",
        "--json",
        "b.json",
    ]
    table = python("-m", "commplane", "bench", "--ranks", "2", *options, cwd=tmp_path, env=beside_core)
    assert "mpi staged" in table
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert sorted((row["backend"], row["dtype"], row["bytes"]) for row in rows) == sorted(
        (backend, dtype, nbytes) for backend in ("mpi", "torch") for dtype in ("bfloat16", "float32") for nbytes in (64, 8192)
    )


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_the_mpi_example_is_small_and_knows_only_the_contract() -> None:
    sources = sorted((EXAMPLE / "src").rglob("*.py"))
    lines: list[Any] = [line for path in sources for line in path.read_text().splitlines() if line.strip()]
    assert 0 < len(lines) < 250
    ours = {name for path in sources for name in imports(path) if name.partition(".")[0].startswith("commplane")}
    assert ours == {"commplane.api", "commplane.errors", "commplane_mpi.process"}
