"""On real GPUs: what the gate finds is what torch finds, without a CUDA context, and memory goes from process to process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import commplane
from commplane.api import BuildContext, Deadline, Facts, GroupKey, ProbeRequest, Usable
from commplane.errors import CommunicatorError
from commplane.testing import PluginHost, run_processes
from commplane_custom_ar.gpu.devices import device

GPUS = torch.cuda.device_count()  # through NVML: this process makes no context
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="wants a CUDA device, this machine shows none")]

# Looks at every device and link, then asks the driver whether any device has a context in this process.
WITHOUT_CONTEXT = """
import ctypes, json
from commplane_custom_ar.gpu.devices import device
from commplane_custom_ar.gpu.driver import Driver
from commplane_custom_ar.gpu.links import look

found = [device(ordinal) for ordinal in range(Driver().count)]
links = look([d.uuid for d in found])
cuda = ctypes.CDLL("libcuda.so.1")
active = []
for ordinal in range(len(found)):
    flags, on = ctypes.c_uint(), ctypes.c_int(-1)
    assert cuda.cuDevicePrimaryCtxGetState(ordinal, ctypes.byref(flags), ctypes.byref(on)) == 0
    active.append(on.value)
print(json.dumps({"devices": [d.to_json() for d in found], "links": links.to_json(), "active": active}))
"""


def test_devices_are_those_of_torch_and_no_context_is_made() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_CONTEXT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["active"] == [0] * GPUS
    assert len(said["devices"]) == GPUS
    code = "import json, torch; print(json.dumps([[str(p.uuid), p.name, p.major, p.minor] for p in map("
    code += "torch.cuda.get_device_properties, range(torch.cuda.device_count()))]))"
    torchs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    for found, (uuid, name, major, minor) in zip(said["devices"], json.loads(torchs.stdout), strict=True):
        assert found["uuid"] in (f"GPU-{uuid}", f"MIG-{uuid}")
        assert (found["name"], found["capability"]) == (name, [major, minor])
        assert found["driver"][0].isdigit()
    assert len(said["links"]) == GPUS * (GPUS - 1) // 2
    assert all(pair["reason"] or pair["nvlink"] for pair in said["links"])


def asks_the_gate(store: Any, rank: int, world_size: int, ordinals: list[int]) -> dict[str, Any]:
    from commplane_custom_ar.gpu import gate

    with commplane.init(store=store, rank=rank, world_size=world_size, plugins=PluginHost()) as plane:
        key = GroupKey(tuple(range(world_size)), "cuda", "tp")
        verdict = gate.probe(ProbeRequest(key, rank, {}), plane.facts)
        assert isinstance(verdict, Usable), verdict
        context = BuildContext(
            "custom_ar", key, rank, f"cuda:{ordinals[rank]}", plane._world, Facts(()), Deadline(30.0), 60.0, {}
        )
        try:
            answer = gate.agree(context)
        except CommunicatorError as error:
            return {"error": str(error)}
        return {"kind": answer.kind, "facts": dict(answer.facts)}


def one_answer(env: Any, ordinals: list[int]) -> dict[str, Any]:
    outcomes = run_processes(2, asks_the_gate, ordinals, env=env, timeout=170)
    for outcome in outcomes:
        assert outcome.error is None and outcome.returncode == 0, outcome.output
    assert outcomes[0].result == outcomes[1].result
    return outcomes[0].result  # type: ignore[no-any-return]


@pytest.mark.skipif(GPUS < 2, reason="wants 2 GPUs")
@pytest.mark.parametrize("shown", ["all", "own", "beginning"])
def test_two_gpus_are_allowed_after_their_memory_was_written_and_read(tmp_path: Path, shown: str) -> None:
    uuids = [device(ordinal).uuid for ordinal in range(2)]
    length = {"own": None, "beginning": 16}.get(shown)

    def env(rank: int) -> dict[str, str]:
        seen = {} if shown == "all" else {"CUDA_VISIBLE_DEVICES": uuids[rank][:length]}
        return {"XDG_CACHE_HOME": str(tmp_path), **seen}

    ordinals = [0, 1] if shown == "all" else [0, 0]
    first, second = one_answer(env, ordinals), one_answer(env, ordinals)
    assert first["kind"] in ("nvlink", "pcie")
    assert "just now" in first["facts"]["proof"]
    assert "remembered until the machine restarts" in second["facts"]["proof"]


def test_one_gpu_for_both_ranks_is_allowed_under_mps_and_refused_without(tmp_path: Path) -> None:
    found = one_answer(lambda _rank: {"XDG_CACHE_HOME": str(tmp_path)}, [0, 0])
    if device(0).mps:
        assert found["kind"] == "shared"
        assert "just now" in found["facts"]["proof"]
    else:
        assert found["error"].startswith("[tp custom_ar] all ranks are on one GPU")
        assert "group ranks 0, 1 do not use MPS" in found["error"]
        assert not os.listdir(tmp_path)
