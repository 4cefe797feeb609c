"""The way to one answer for a group, on a machine with stand-ins for GPUs; and the probe."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_machine import Machine, a_device, all_of, ranks

import commplane
from commplane.agree import StoreBootstrap
from commplane.api import (
    BackendSpec,
    BuildContext,
    Capability,
    CommBackend,
    Deadline,
    Facts,
    GroupKey,
    ProbeRequest,
    RankFacts,
    ReduceOp,
    Unusable,
    Usable,
    hookimpl,
)
from commplane.errors import CommplaneWarning, CommunicatorError
from commplane.runtime import Plane
from commplane.testing import PluginHost, run_processes, run_threads
from commplane_custom_ar.gpu.devices import Device, NoDevice
from commplane_custom_ar.gpu.gate import Allowed, Sources, agree, probe
from commplane_custom_ar.gpu.links import Link, Links, look
from commplane_custom_ar.gpu.proof import Proof, prove


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("gpus"))


# The whole way, ranks as threads: the control plane is real, and so are the processes of the proof.


def context_of(bootstrap: StoreBootstrap, device: str) -> BuildContext:
    key = GroupKey(tuple(bootstrap.ranks), "cuda", "tp")
    return BuildContext("custom_ar", key, bootstrap.rank, device, bootstrap, Facts(()), Deadline(30.0), 60.0, {})


def on_machine(
    machine: Machine, folder: Path | None, *, device: Any = None, fault: str = "", runs: list[int] | None = None
) -> Sources:
    """Facts of the stand-ins; `runs` gets a rank for each proof that is not recalled."""

    def prove_here(bootstrap: StoreBootstrap, uuids: list[str], **options: Any) -> Proof:
        if runs is not None:
            runs.append(bootstrap.rank)
        spoilt = fault if bootstrap.rank == 1 else ""
        return prove(
            bootstrap, uuids, **{**options, "environ": machine.environ(STANDIN_FAULT=spoilt, STANDIN_GPUS="H200,H200,H200")}
        )

    return Sources(
        device=a_device if device is None else device,
        links=lambda uuids: look(uuids, nvml=machine.loaded),
        folder=lambda: folder,
        library=lambda: machine.library,
        prove=prove_here,
    )


def test_a_group_agrees_and_only_the_first_time_it_is_proved(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.here(monkeypatch)
    runs: list[int] = []
    # Only the first rank's folder counts: the other rank's is another.
    found = [
        all_of(ranks(2, lambda b: agree(context_of(b, f"cuda:{b.rank}"), on_machine(machine, tmp_path / str(b.rank), runs=runs))))
        for _ in range(2)
    ]
    assert [answer.kind for answers in found for answer in answers] == ["nvlink"] * 4
    assert sorted(runs) == [0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_a_refusal_of_the_proof_is_the_same_on_every_rank_and_is_recalled(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.here(monkeypatch)
    runs: list[int] = []

    def once() -> list[str]:
        sources = on_machine(machine, tmp_path, fault="poke goes wrong", runs=runs)
        found = ranks(2, lambda b: agree(context_of(b, f"cuda:{b.rank}"), sources))
        assert all(isinstance(error, CommunicatorError) for error in found)
        return [str(error) for error in found]

    first, second = once(), once()
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert first[0].startswith("[tp custom_ar] P2P between GPU")
    assert "wrong data" in first[0]
    assert second[0].startswith(first[0])
    assert "remembered until the machine restarts; remove" in second[0]
    assert sorted(runs) == [0, 1]


def test_what_the_facts_refuse_is_not_tried(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.here(monkeypatch, STANDIN_GPUS="H200,H200,H200", STANDIN_LINK="pcie")
    runs: list[int] = []
    found = ranks(3, lambda b: agree(context_of(b, f"cuda:{b.rank}"), on_machine(machine, tmp_path, runs=runs)))
    assert len({str(error) for error in found}) == 1
    assert "more than 2 ranks want NVLink" in str(found[0])
    assert not runs
    two = all_of(ranks(2, lambda b: agree(context_of(b, f"cuda:{b.rank}"), on_machine(machine, tmp_path, runs=runs))))
    assert [answer.kind for answer in two] == ["pcie", "pcie"]


def test_a_pair_is_connected_if_one_rank_sees_that_it_is(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.here(monkeypatch)

    def rank_main(bootstrap: StoreBootstrap) -> Allowed:
        plain = on_machine(machine, tmp_path)
        blind = replace(plain, links=lambda uuids: Links((Link(0, 1, None, None, reason="cannot be seen from here"),)))
        return agree(context_of(bootstrap, f"cuda:{bootstrap.rank}"), blind if bootstrap.rank == 0 else plain)

    assert [answer.kind for answer in all_of(ranks(2, rank_main))] == ["nvlink", "nvlink"]


@pytest.mark.parametrize("where", ["cuda:5", "cpu", "cuda"])
def test_a_rank_without_its_device_refuses_for_all(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    machine.here(monkeypatch)

    def missing(ordinal: int) -> Device:
        if ordinal == 5:
            raise NoDevice("cuda:5 does not exist: this process sees 2 devices")
        return a_device(ordinal)

    found = ranks(2, lambda b: agree(context_of(b, where if b.rank else "cuda:0"), on_machine(machine, tmp_path, device=missing)))
    assert str(found[0]) == str(found[1])
    assert isinstance(found[0], CommunicatorError)
    assert str(found[0]).startswith("[tp custom_ar] rank 1: ")


# In core: the backend of a group that asks the gate in its `open`, on CPU, where a plan can be formed without GPUs.

GATED: dict[str, Any] = {}


class Gated(CommBackend):
    """Asks the gate for the GPU of its rank, then adds up on rank 0's word: enough for core's canary."""

    def open(self, context: BuildContext) -> None:
        agree(replace(context, device=f"cuda:{context.rank}"), GATED["sources"])
        self._context = context
        self._calls = 0

    def close(self) -> None:
        """Nothing is held."""

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        self._calls += 1
        store, context = self._context.bootstrap.store("sum"), self._context
        store.set(f"{self._calls}/{context.rank}", json.dumps(tensor.tolist()))
        all_ranks = [json.loads(store.get(f"{self._calls}/{rank}")) for rank in range(context.world_size)]
        return tensor.copy_(sum(torch.tensor(one, dtype=tensor.dtype) for one in all_ranks))


def gated_probe(request: ProbeRequest, facts: Facts) -> Usable:
    return Usable()


@hookimpl
def commplane_register_comm_backends() -> list[BackendSpec]:
    return [
        BackendSpec(
            name="custom_ar",
            api=(1, 0),
            factory=f"{__name__}:Gated",
            probe=f"{__name__}:gated_probe",
            capabilities={Capability.ALL_REDUCE},
            dtypes={"float32"},
            device="cpu",
            priority=100,
        )
    ]


def host(_rank: int) -> PluginHost:
    out = PluginHost()
    out.register(sys.modules[__name__], "custom_ar", dist="a test", version="1")
    return out


@pytest.mark.parametrize("asked", [True, False])
def test_a_request_by_name_that_the_gate_refuses_is_one_warning_on_the_first_rank_and_a_default_is_silent(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    machine.here(monkeypatch)
    GATED["sources"] = on_machine(machine, tmp_path, device=lambda ordinal: a_device(0))  # one GPU, no MPS

    def rank_main(plane: Plane) -> list[Any]:
        tp = plane.communicator("tp", device="cpu", backends=["custom_ar"] if asked else None)
        return [list(tp.plan.backends), next(c.reason for c in tp.plan.candidates if c.name == "custom_ar")]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = all_of(run_threads(2, rank_main, plugins=host))
    assert found[0] == found[1]
    assert found[0][0] == ["torch"]
    assert found[0][1].startswith("ranks 0, 1: [tp custom_ar] all ranks are on one GPU")
    told = [str(w.message) for w in caught if issubclass(w.category, CommplaneWarning)]
    assert len(told) == (1 if asked else 0)
    assert all("'custom_ar' was asked for" in text and "do not use MPS" in text for text in told)


def test_a_group_that_the_gate_allows_runs(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.here(monkeypatch)
    GATED["sources"] = on_machine(machine, tmp_path)

    def rank_main(plane: Plane) -> list[Any]:
        tp = plane.communicator("tp", device="cpu")
        return [list(tp.plan.backends), tp.all_reduce(torch.ones(2)).tolist()]

    assert all_of(run_threads(2, rank_main, plugins=host)) == [[["custom_ar", "torch"], [2.0, 2.0]]] * 2


# With nothing replaced: processes as ranks that find the stand-ins as their libraries.


def asks_the_gate(store: Any, rank: int, world_size: int) -> dict[str, Any]:
    from commplane_custom_ar.gpu import gate

    with commplane.init(store=store, rank=rank, world_size=world_size, plugins=PluginHost()) as plane:
        request = ProbeRequest(GroupKey(tuple(range(world_size)), "cuda", "tp"), rank, {})
        verdict = gate.probe(request, plane.facts)
        assert isinstance(verdict, Usable), verdict
        context = context_of(plane._world, f"cuda:{rank}")
        try:
            answer = gate.agree(context)
            return {"probe": dict(verdict.facts), "kind": answer.kind, "facts": dict(answer.facts)}
        except CommunicatorError as error:
            return {"probe": dict(verdict.facts), "error": str(error)}


@pytest.mark.parametrize(
    ("devices", "settings", "wanted"),
    [
        (["1,0", "0"], {}, {"error": "cuda:1 does not exist: this process sees 1 devices (CUDA_VISIBLE_DEVICES is '0')"}),
        (["GPU-a1a1", "0,1"], {"STANDIN_MPS": "1"}, {"kind": "shared"}),
    ],
)
def test_processes_that_find_these_libraries_come_to_one_answer(
    machine: Machine, tmp_path: Path, devices: list[str], settings: dict[str, str], wanted: dict[str, str]
) -> None:
    def env(rank: int) -> dict[str, str]:
        return {**machine.env, "CUDA_VISIBLE_DEVICES": devices[rank], "XDG_CACHE_HOME": str(tmp_path), **settings}

    outcomes = run_processes(2, asks_the_gate, env=env, timeout=120)
    for outcome in outcomes:
        assert outcome.error is None, outcome.output
        assert outcome.result["probe"]["cuda"] == "13.0"
        if "kind" in wanted:
            assert outcome.result["kind"] == wanted["kind"], outcome.result
            assert outcome.result["facts"]["driver"] == "580.95.05"
        else:
            assert outcome.result["error"] == f"[tp custom_ar] rank 1: {wanted['error']}"
    assert len(list((tmp_path / "commplane").glob("p2p-*.json"))) == (1 if "kind" in wanted else 0)


# The probe.


def facts_of(domains: list[int | None]) -> Facts:
    plain: dict[str, Any] = {
        "host": "a",
        "pid": 1,
        "pid_start": 1,
        "pid_namespace": "p",
        "shm_free": None,
        "memory_limit": None,
        "cores": (0,),
        "devices": (),
        "machine": "x86_64",
        "python": "3",
        "torch": None,
    }
    return Facts(RankFacts(rank=rank, shm_domain=domain, **plain) for rank, domain in enumerate(domains))


def asked(size: int = 2) -> ProbeRequest:
    return ProbeRequest(GroupKey(tuple(range(size)), "cuda", "tp"), 0, {})


def test_the_probe_refuses_a_group_that_spans_hosts_before_it_touches_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_COMMPLANE_CAR_LIBRARY", "/nowhere")
    verdict = probe(asked(), facts_of([0, 1]))
    assert isinstance(verdict, Unusable)
    assert "the group spans hosts" in verdict.reason
    assert "rank 0 on a; rank 1 on a" in verdict.reason


def test_the_probe_says_what_is_missing_here(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without = tmp_path / "empty.so"
    subprocess.run(["cc", "-shared", "-o", str(without), "-x", "c", "/dev/null"], check=True, timeout=60)
    cases = [
        (without, "", "has no CUDA half"),
        (tmp_path / "missing.so", "", "the native library does not load"),
        (machine.library, "no driver", "commplane_car_cuda_check failed: no CUDA driver is loaded"),
    ]
    for library, fault, words in cases:
        machine.here(monkeypatch, STANDIN_FAULT=fault)
        monkeypatch.setenv("_COMMPLANE_CAR_LIBRARY", str(library))
        verdict = probe(asked(), facts_of([0, 0]))
        assert isinstance(verdict, Unusable)
        assert words in verdict.reason


@pytest.mark.parametrize(("there", "words"), [(False, "libcuda.so.1 cannot be loaded"), (True, "CUDA_VISIBLE_DEVICES is ''")])
def test_the_probe_wants_a_driver_and_a_device(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, there: bool, words: str
) -> None:
    real = ctypes.CDLL

    def load(name: str, *args: Any) -> ctypes.CDLL:
        if name != "libcuda.so.1":
            return real(name, *args)
        if there:
            return machine.loaded
        raise OSError(f"{name}: cannot open shared object file")

    machine.here(monkeypatch, CUDA_VISIBLE_DEVICES="", _COMMPLANE_CAR_LIBRARY=str(machine.library))
    monkeypatch.setattr("ctypes.CDLL", load)
    verdict = probe(asked(), facts_of([0, 0]))
    assert isinstance(verdict, Unusable)
    assert words in verdict.reason
