"""The engines pass the conformance kit: the built-in ones always, NIXL and Mooncake where they are installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from commplane.errors import CommplaneError
from commplane_disagg.engines.mooncake import load_mooncake

_SHORT = "odd_sizes or both_directions or killed_peer"
"""Of the kit, for every run of the tests: the bytes, and a peer that dies."""


def run_kit(folder: Path, engine: str, *options: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--pyargs", "commplane_conformance"]
    done = subprocess.run(
        [*command, "--commplane-engine", engine, *options], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(170)
@pytest.mark.parametrize("engine", ["shm", "tcp"])
def test_bytes_arrive(tmp_path: Path, engine: str) -> None:
    run_kit(tmp_path, engine, "-k", "whole_pool or odd_sizes or both_directions or lost_peer or reader_has_disconnected")


@pytest.mark.timeout(170)
def test_nixl_moves_bytes_and_outlives_a_killed_peer(tmp_path: Path) -> None:
    if importlib.util.find_spec("nixl") is None:
        pytest.skip("wants nixl: pip install 'commplane-disagg[nixl]'")
    run_kit(tmp_path, "nixl", "-k", _SHORT)


@pytest.mark.timeout(170)
def test_mooncake_moves_bytes_and_outlives_a_killed_peer(tmp_path: Path) -> None:
    try:
        load_mooncake()
    except CommplaneError as error:
        pytest.skip(str(error))
    run_kit(tmp_path, "mooncake", "-k", _SHORT)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["shm", "tcp"])
def test_a_built_in_engine_passes_all_of_the_kit(tmp_path: Path, engine: str) -> None:
    run_kit(tmp_path, engine)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("options", [(), ("--commplane-option", "tls=tcp")], ids=["auto", "tcp"])
def test_nixl_passes_all_of_the_kit(tmp_path: Path, options: tuple[str, ...]) -> None:
    pytest.importorskip("nixl", reason="wants nixl: pip install 'commplane-disagg[nixl]'")
    run_kit(tmp_path, "nixl", *options)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_mooncake_passes_all_of_the_kit(tmp_path: Path) -> None:
    try:
        load_mooncake()
    except CommplaneError as error:
        pytest.skip(str(error))
    run_kit(tmp_path, "mooncake")


@pytest.mark.timeout(120)
def test_an_engine_that_cannot_be_opened_is_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--pyargs", "commplane_conformance"]
    options = ["--commplane-engine", "tcp", "--commplane-option", "bind=192.0.2.1"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "engine 'tcp' cannot be opened here" in done.stderr + done.stdout
    assert "192.0.2.1" in done.stderr + done.stdout and "Traceback" not in done.stderr + done.stdout
