"""What importing loads, and that what is named exists."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import commplane
from commplane import hookspecs

# Shows which heavy modules a statement loaded.
_PROBE = """
import json, sys
try:
    exec({statement!r})
except SystemExit as error:
    code = error.code
else:
    code = None
names = sys.modules
print("\\n" + json.dumps([code, sorted(m for m in names if m.partition(".")[0] in {heavy!r})]))
"""


def loaded(statement: str, *heavy: str) -> tuple[object, list[str], str]:
    """Exit code of `statement`, the modules of `heavy` that it loaded, and what it printed, in an isolated Python."""
    run = subprocess.run(
        [sys.executable, "-I", "-c", _PROBE.format(statement=statement, heavy=set(heavy))],
        capture_output=True,
        text=True,
        # Core alone: what else is installed on the machine is not what is tested here.
        env={k: v for k, v in os.environ.items() if not k.startswith("COMMPLANE_")} | {"COMMPLANE_PLUGINS": "torch"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    out, _, last = run.stdout.rstrip("\n").rpartition("\n")
    code, modules = json.loads(last)
    return code, modules, out


def test_the_probe_sees_what_is_loaded() -> None:
    assert loaded("import json.tool", "json")[1] == [
        "json",
        "json.decoder",
        "json.encoder",
        "json.scanner",
        "json.tool",
    ]


@pytest.mark.parametrize(
    "module",
    [
        "commplane",
        "commplane.api",
        "commplane.errors",
        "commplane.hookspecs",
        "commplane.config",
        "commplane.plugins",
        "commplane.select",
        "commplane.handles",
        "commplane.tracer",
        "commplane.runtime",
        "commplane.engines",
        "commplane.cli",
    ],
)
def test_importing_loads_neither_torch_nor_numpy(module: str) -> None:
    assert loaded(f"import {module}", "torch", "numpy")[1] == []


def test_importing_the_package_loads_no_backend() -> None:
    assert loaded("import commplane, commplane.config", "commplane_custom_ar", "commplane_flashinfer")[1] == []


def test_importing_the_package_loads_nothing_that_adapters_stand_on() -> None:
    assert "commplane.engines" not in loaded("import commplane, commplane.runtime", "commplane")[1]


def test_the_plugins_command_works_without_importing_torch() -> None:
    statement = "import runpy; sys.argv = ['commplane', 'plugins']; runpy.run_module('commplane', run_name='__main__')"
    code, modules, out = loaded(statement, "torch", "numpy")
    assert (code, modules) == (0, [])
    assert "torch" in out and "backend torch" in out


def test_the_plugins_command_works_as_a_module() -> None:
    run = subprocess.run(
        [sys.executable, "-I", "-m", "commplane", "plugins", "--json"],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("COMMPLANE_")} | {"COMMPLANE_PLUGINS": "torch"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert [(p["name"], p["dist"], p["provides"]) for p in report["plugins"]] == [
        ("torch", "commplane", ["backend hierarchical", "backend torch", "backend torch_symm"])
    ]


def modules(package: str) -> list[str]:
    """The package and all modules below, by their files: to walk the packages would import them."""
    folder = Path(str(importlib.import_module(package).__file__)).parent
    parts = (file.relative_to(folder).with_suffix("").parts for file in sorted(folder.rglob("*.py")))
    below = [".".join((package, *p)).removesuffix(".__init__") for p in parts if p[-1] != "__main__"]
    return [package, *(m for m in below if m != package)]


# The only modules that import torch when they are imported; in this folder torch may be missing.
NEED_TORCH = (
    "commplane.agree.canary",
    "commplane.backends.hierarchical",
    "commplane.backends.torch_dist",
    "commplane.demo",
    "commplane.engines",
    "commplane.ops",
)


@pytest.mark.parametrize("module", [m for m in modules("commplane") if not m.startswith(NEED_TORCH)])
def test_every_name_that_a_module_exports_exists(module: str) -> None:
    loaded = importlib.import_module(module)
    exported = getattr(loaded, "__all__", [])
    assert [name for name in exported if not hasattr(loaded, name)] == []
    assert len(set(exported)) == len(exported)


def test_the_api_gives_out_every_name_its_modules_export_but_the_core_side_ones() -> None:
    from commplane import api

    parts = {n for m in modules("commplane.api")[1:] for n in importlib.import_module(m).__all__}
    core_side = {
        "FP8_MAX",
        "swizzled_offsets",
        "PROJECT",
        "SHM_DIRECTORY",
        "Owner",
        "owner",
        "is_abandoned",
        "hookspec",
        "has_ended",
        "process_start",
        "pid_namespace",
        "CUTS",
        "mesh_of",
        "shape_of",
        "sizes_of",
        "ApiVersion",
    }
    assert parts - set(api.__all__) == core_side


def test_the_package_gives_out_the_names_of_the_design() -> None:
    assert {"init", "errors", "CommplaneError", "hookimpl", "__version__"} <= set(commplane.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = commplane.nonsense


def test_every_hook_is_named_for_what_it_does_and_documented() -> None:
    for name in hookspecs.__all__:
        assert name.startswith("commplane_")
        assert inspect.getdoc(getattr(hookspecs, name))
    specified = {n for n in vars(hookspecs) if n.startswith("commplane_")}
    assert specified == set(hookspecs.__all__)
