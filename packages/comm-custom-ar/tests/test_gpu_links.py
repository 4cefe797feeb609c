"""How GPUs are connected: what NVML says of each pair, and what the ranks know together."""

from __future__ import annotations

import json

import pytest
from gpu_machine import UUIDS, Machine

from commplane_custom_ar.gpu.links import Link, Links, look, merge

A, B, C = UUIDS[:3]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("gpus"))


@pytest.mark.parametrize(
    ("settings", "uuids", "nvlink", "p2p", "words"),
    [
        ({"STANDIN_LINK": "nvlink"}, [A, B], True, True, ""),
        ({"STANDIN_LINK": "pcie"}, [A, B], False, True, "NVLink: not supported"),
        ({"STANDIN_LINK": "none"}, [A, B], False, False, "P2P writes: the chipset does not support it"),
        ({"STANDIN_HIDDEN": "1"}, [A, B], None, None, f"{B} cannot be seen from here"),
        ({}, [A, "GPU-unheard-of"], None, None, "GPU-unheard-of cannot be seen from here"),
        ({"STANDIN_NO_NVML": "1"}, [A, B], None, None, "Driver Not Loaded"),
        ({}, [A, "MIG-b1b1"], False, False, "between MIG instances"),
        ({}, ["MIG-b1b1", "MIG-b1b1"], False, False, "between MIG instances"),
    ],
)
def test_a_pair_is_what_nvml_says_of_it_with_the_reason(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    uuids: list[str],
    nvlink: bool | None,
    p2p: bool | None,
    words: str,
) -> None:
    machine.here(monkeypatch, **settings)
    links = look(uuids, nvml=machine.loaded)
    (pair,) = links.pairs
    assert (pair.one, pair.other, pair.nvlink, pair.p2p, pair.shared_gpu) == (0, 1, nvlink, p2p, False)
    assert words in pair.reason
    assert bool(pair.reason) == (nvlink is not True)
    assert (links.full_mesh_nvlink, links.full_mesh_p2p) == (nvlink is True, p2p is True)
    assert Links.from_json(json.loads(json.dumps(links.to_json()))) == links


@pytest.mark.parametrize("settings", [{}, {"STANDIN_NO_NVML": "1"}])
def test_ranks_on_one_gpu_are_connected(machine: Machine, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]) -> None:
    machine.here(monkeypatch, **settings)
    links = look([A, A], nvml=machine.loaded)
    assert links.shared_gpu
    assert links.full_mesh_nvlink
    assert links.full_mesh_p2p
    assert not links.without_nvlink
    assert not links.without_p2p


def test_every_pair_of_a_group_is_looked_at(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.here(monkeypatch, STANDIN_GPUS="H200,H200,H200,H200", STANDIN_HIDDEN="3")
    links = look(UUIDS[:4], nvml=machine.loaded)
    assert [(p.one, p.other) for p in links.pairs] == [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    assert [(p.one, p.other) for p in links.without_nvlink] == [(0, 3), (1, 3), (2, 3)]
    assert not links.full_mesh_nvlink
    assert not links.without_p2p  # unknown is not impossible


def test_what_one_rank_sees_holds_for_all() -> None:
    unknown, no = Link(0, 1, None, None, reason="cannot be seen"), Link(0, 1, False, False, reason="not supported")
    pcie, yes = Link(0, 1, False, True, reason="NVLink: not supported"), Link(0, 1, True, True)
    order = [unknown, no, pcie, yes]
    for i, worse in enumerate(order):
        for better in order[i:]:
            assert merge([Links((worse,)), Links((better,))]).pairs == (better,)
            assert merge([Links((better,)), Links((worse,))]).pairs == (better,)
    assert merge([Links((unknown,)), Links((Link(0, 1, None, None, reason="no NVML"),))]).pairs == (unknown,)
