"""How torch learns the name, and that `import torch` neither fails nor gets slow by it."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import _commplane_autoload

pytestmark = pytest.mark.timeout(90)


def python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=80, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(
    not hasattr(torch, "_import_device_backends"), reason="wants torch 2.5 or newer: older ones load no entry points of backends"
)
def test_import_torch_makes_the_name_known_and_loads_nothing_of_commplane() -> None:
    installed = [e.name for e in importlib.metadata.entry_points(group="torch.backends")]
    if "commplane" not in installed:
        pytest.skip("wants commplane installed as a wheel, not on the path: its entry point is what is tested")
    code = "import sys, torch, torch.distributed as d; print('commplane' in d.Backend.backend_list, 'commplane' in sys.modules)"
    assert python(code) == "True False"


def test_where_torch_loads_no_entry_points_an_import_makes_the_name_known() -> None:
    code = (
        "import torch.distributed as d; before = 'commplane' in d.Backend.backend_list; import commplane.c10d;"
        "print(before, d.Backend.backend_list.count('commplane'))"
    )
    assert python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "False 1"


def test_a_failure_to_register_is_said_and_import_torch_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise TypeError("register_backend has other arguments now")

    monkeypatch.setattr(dist.Backend, "_plugins", {})
    monkeypatch.setattr(dist.Backend, "register_backend", fails)
    _commplane_autoload.register()
    assert "not registered: TypeError: register_backend has other arguments now" in capsys.readouterr().err


def test_registering_twice_changes_nothing() -> None:
    _commplane_autoload.register()
    before = dist.Backend._plugins["COMMPLANE"]
    _commplane_autoload.register()
    assert dist.Backend._plugins["COMMPLANE"] is before
    assert dist.Backend.default_device_backend_map["cpu"] == "gloo"  # what nobody asked for stays as it was
