"""Which GPU a device ordinal is: the CUDA driver first, then NVML and ``CUDA_VISIBLE_DEVICES`` in all spellings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_machine import UUIDS, Machine

from commplane_custom_ar.gpu.devices import Device, NoDevice, device
from commplane_custom_ar.gpu.driver import Driver
from commplane_custom_ar.gpu.nvml import Nvml, NvmlError
from commplane_custom_ar.gpu.visible import Gpu, visible

A, B, C = UUIDS[:3]
EQUAL = [Gpu(uuid, "H200", (9, 0)) for uuid in (A, B, C)]
TWINS = [Gpu("GPU-11112222-0", "H200", (9, 0)), Gpu("GPU-11113333-0", "H200", (9, 0))]
MIXED = [Gpu(A, "L40", (8, 9)), Gpu(B, "H200", (9, 0))]
SPLIT = [Gpu(A, "H200", (9, 0), mig=True)]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("gpus"))


@pytest.mark.parametrize(
    ("value", "order", "gpus", "wanted"),
    [
        (None, None, EQUAL, [A, B, C]),
        ("", None, EQUAL, []),
        (" ", None, EQUAL, []),
        ("0", None, EQUAL, [A]),
        ("2,1", None, EQUAL, [C, B]),
        (" 2 , 1", None, EQUAL, [C, B]),
        ("+1", None, EQUAL, [B]),
        ("1gpu,2", None, EQUAL, [B, C]),
        ("0,2,-1,1", None, EQUAL, [A, C]),
        ("-1", None, EQUAL, []),
        ("0,3,1", None, EQUAL, [A]),
        ("3", None, EQUAL, []),
        ("1,0,1", None, EQUAL, []),
        ("1,x,0", None, EQUAL, [B]),
        ("1,,0", None, EQUAL, [B]),
        ("none", None, EQUAL, []),
        ("NoDevFiles", None, EQUAL, []),
        (B, None, EQUAL, [B]),
        (f"{C},{A}", None, EQUAL, [C, A]),
        ("GPU-a1", None, EQUAL, [B]),
        ("GPU-A1A1,GPU-a0a0a0a0-a0a0", None, EQUAL, [B, A]),
        ("GPU-", None, EQUAL, []),
        ("GPU-1111", None, TWINS, []),
        ("GPU-11112,GPU-1111,GPU-11113", None, TWINS, ["GPU-11112222-0"]),
        ("GPU-ff,GPU-a0", None, EQUAL, []),
        ("GPU-a0,GPU-ff,GPU-a1", None, EQUAL, [A]),
        ("GPU-a0,1", None, EQUAL, [A]),
        ("GPU-a0,GPU-a0a0", None, EQUAL, []),
        ("0,GPU-a1", None, EQUAL, [A]),
        (f"MIG-{A}/1/0", None, SPLIT, [f"MIG-{A}/1/0"]),
        ("MIG-0b1c,MIG-0b1d", None, SPLIT, ["MIG-0b1c"]),
        (None, None, MIXED, None),
        ("0", None, MIXED, None),
        ("0", "FASTEST_FIRST", MIXED, None),
        ("0", "PCI_BUS_ID", MIXED, [A]),
        (None, "PCI_BUS_ID", MIXED, [A, B]),
        ("GPU-a1", None, MIXED, [B]),
        ("", None, MIXED, []),
        (None, None, SPLIT, None),
        ("0", "PCI_BUS_ID", SPLIT, None),
        (None, None, [], []),
    ],
)
def test_visible_devices_are_what_cuda_makes_of_them(
    value: str | None, order: str | None, gpus: list[Gpu], wanted: list[str] | None
) -> None:
    found = visible(value, order, gpus)
    assert (None if found.uuids is None else list(found.uuids)) == wanted
    assert found.reason


@pytest.mark.parametrize(
    ("settings", "ordinal", "wanted"),
    [
        ({}, 1, B),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, 0, B),
        # What only the driver knows: which of unequal GPUs is the fastest.
        ({"STANDIN_GPUS": "L40,H200", "STANDIN_FASTEST": "1,0"}, 0, B),
        # Without the driver NVML answers, where it can.
        ({"STANDIN_NO_CUDA": "1", "CUDA_VISIBLE_DEVICES": "1,0"}, 0, B),
        ({"STANDIN_NO_CUDA": "1", "CUDA_VISIBLE_DEVICES": "GPU-a1"}, 0, B),
        ({"STANDIN_NO_CUDA": "1", "STANDIN_GPUS": "L40,H200", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, 1, B),
        # A GPU that the container was not given is not numbered.
        ({"STANDIN_NO_CUDA": "1", "STANDIN_HIDDEN": "0"}, 0, B),
    ],
)
def test_an_ordinal_is_the_gpu_that_the_driver_or_else_nvml_says(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], ordinal: int, wanted: str
) -> None:
    machine.here(monkeypatch, **settings)
    found = device(ordinal, cuda=machine.loaded, nvml=machine.loaded)
    assert (found.uuid, found.name, found.capability, found.mig, found.driver) == (wanted, "H200", (9, 0), False, "580.95.05")
    assert found.pci_bus_id == ("" if "STANDIN_NO_CUDA" in settings else "0000:11:00.0")
    assert Device.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize(
    ("settings", "ordinal", "words"),
    [
        ({}, 2, ["cuda:2 does not exist", "sees 2 devices", "the machine shows 2"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0, ["sees 0 devices", "CUDA_VISIBLE_DEVICES is empty"]),
        ({"CUDA_VISIBLE_DEVICES": "0,7"}, 1, ["sees 1 devices", "'0,7'", "7 is none of the 2 GPUs"]),
        ({"STANDIN_NO_CUDA": "1"}, 2, ["unknown error (CUDA error 999)", "cuda:2 does not exist"]),
        ({"STANDIN_NO_CUDA": "1", "STANDIN_GPUS": "L40,H200"}, 0, ["CUDA error 999", "CUDA_DEVICE_ORDER"]),
        ({"STANDIN_NO_CUDA": "1", "STANDIN_NO_NVML": "1"}, 0, ["CUDA error 999", "Driver Not Loaded (NVML status 9)"]),
        ({"STANDIN_NO_NVML": "1"}, 5, ["cuda:5 does not exist: this process sees 2 devices"]),
    ],
)
def test_an_ordinal_that_is_no_device_has_a_reason(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], ordinal: int, words: list[str]
) -> None:
    machine.here(monkeypatch, **settings)
    with pytest.raises(NoDevice) as raised:
        device(ordinal, cuda=machine.loaded, nvml=machine.loaded)
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_mig_instance_is_known_by_its_uuid(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.here(monkeypatch, STANDIN_MIG="0")
    found = device(0, cuda=machine.loaded, nvml=machine.loaded)
    assert found.mig
    assert found.uuid == "MIG-b0b0b0b0-b0b0-b0b0-b0b0-b0b0b0b0b0b0"
    assert not device(1, cuda=machine.loaded, nvml=machine.loaded).mig
    machine.here(monkeypatch, STANDIN_NO_CUDA="1", STANDIN_MIG="0", CUDA_VISIBLE_DEVICES="MIG-b0b0")
    assert device(0, cuda=machine.loaded, nvml=machine.loaded).mig


def test_mps_is_what_the_driver_says_or_for_old_ones_whether_a_daemon_is_there(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipes = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    (tmp_path / "control").touch()
    for said, environ, wanted in (("1", {}, True), ("0", pipes, False), ("old", pipes, True)):
        machine.here(monkeypatch, STANDIN_MPS=said)
        assert device(0, cuda=machine.loaded, nvml=machine.loaded, environ=environ).mps is wanted
    machine.here(monkeypatch, STANDIN_MPS="old")
    (tmp_path / "control").unlink()
    assert not device(0, cuda=machine.loaded, nvml=machine.loaded, environ=pipes).mps


def test_without_nvml_the_driver_is_enough(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.here(monkeypatch, STANDIN_NO_NVML="1")
    found = device(1, cuda=machine.loaded, nvml=machine.loaded)
    assert (found.uuid, found.pci_bus_id) == (B, "0000:11:00.0")
    assert found.driver  # of /proc, or what it serves


def test_a_function_that_an_old_nvml_lacks_is_a_reason() -> None:
    class Old:
        """A library of which only the start is there."""

        def __init__(self) -> None:
            self.nvmlInit_v2 = lambda: 0

    with pytest.raises(NvmlError, match=r"nvmlDeviceGetCount_v2 is missing in libnvidia-ml\.so\.1: the NVIDIA driver is too old"):
        Nvml(Old()).gpus()


def test_a_machine_without_libraries_says_which_are_missing_and_importing_loads_no_torch() -> None:
    code = """
import ctypes, sys
from commplane_custom_ar.gpu import devices, gate, links, proof_child
assert "torch" not in sys.modules

def missing(name, *args, **kwargs):
    raise OSError(f"{name}: cannot open shared object file")

ctypes.CDLL = missing
try:
    devices.device(0)
except devices.NoDevice as error:
    print(error)
pair = links.look(["GPU-1", "GPU-2"]).pairs[0]
print(pair.nvlink, pair.reason)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "libcuda.so.1 cannot be loaded" in done.stdout
    assert "libnvidia-ml.so.1 cannot be loaded" in done.stdout
    assert "None libnvidia-ml.so.1" in done.stdout


def test_the_driver_says_what_it_serves(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.here(monkeypatch)
    driver = Driver(machine.loaded)
    assert (driver.count, driver.version(), driver.capability(1), driver.uuid(1)) == (2, "13.0", (9, 0), (B[4:], False))
