"""Which groups may use custom_ar on CUDA: the decision alone, from what was gathered."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
from gpu_machine import UUIDS, a_device
from hypothesis import given, settings
from hypothesis import strategies as st

from commplane_custom_ar.gpu.devices import Device
from commplane_custom_ar.gpu.gate import Allowed, Refused, decide
from commplane_custom_ar.gpu.links import Link, Links
from commplane_custom_ar.gpu.proof import Proof

HOLDS = Proof((), True, 15.0)
FAILS = Proof(("P2P between GPU a and b hangs",), True, 15.0, "found on Monday")


def mesh(size: int, nvlink: bool | None = True, p2p: bool | None = True, reason: str = "NVLink: not supported") -> Links:
    why = "" if nvlink else reason
    return Links(tuple(Link(i, j, nvlink, p2p, reason=why) for j in range(size) for i in range(j)))


def shared(size: int) -> Links:
    return Links(tuple(Link(i, j, None, None, shared_gpu=True) for j in range(size) for i in range(j)))


def each(size: int, **changes: Any) -> list[Device]:
    return [a_device(gpu, **changes) for gpu in range(size)]


def one_gpu(size: int, mps: list[bool]) -> list[Device]:
    return [a_device(0, mps=mps[rank]) for rank in range(size)]


def but(links: Links, *pairs: Link) -> Links:
    """The same with other `pairs`."""
    new = {(pair.one, pair.other): pair for pair in pairs}
    return Links(tuple(new.get((pair.one, pair.other), pair) for pair in links.pairs))


@pytest.mark.parametrize("size", range(2, 9))
def test_full_nvlink_is_allowed_for_2_to_8_ranks(size: int) -> None:
    answer = decide(size, each(size), mesh(size), HOLDS)
    assert isinstance(answer, Allowed)
    assert answer.kind == "nvlink"
    assert answer.facts["gpus"] == "H200"
    assert "read back" in answer.facts["proof"]


@pytest.mark.parametrize("links", [mesh(2, False, True), mesh(2, None, None, "cannot be seen from here")])
def test_two_gpus_that_are_not_known_to_have_nvlink_get_what_suits_pcie(links: Links) -> None:
    answer = decide(2, each(2), links, HOLDS)
    assert isinstance(answer, Allowed)
    assert answer.kind == "pcie"
    assert answer.facts["not nvlink"] == links.pairs[0].reason


@pytest.mark.parametrize("size", range(2, 9))
def test_one_gpu_for_all_is_allowed_under_mps(size: int) -> None:
    answer = decide(size, one_gpu(size, [True] * size), shared(size), HOLDS)
    assert isinstance(answer, Allowed)
    assert answer.kind == "shared"


REFUSALS = {
    "one rank": (1, each(1), mesh(1), HOLDS, ["serves groups of 2 to 8 ranks on CUDA, this one has 1"]),
    "nine ranks": (9, each(8) + each(1), mesh(9), HOLDS, ["this one has 9"]),
    "a MIG instance": (
        2,
        [a_device(0), a_device(1, mig=True, uuid="MIG-1")],
        mesh(2, False, False),
        HOLDS,
        ["group rank 1 has a MIG"],
    ),
    "two architectures": (
        2,
        [a_device(0), a_device(1, capability=(8, 9))],
        mesh(2),
        HOLDS,
        ["different compute capabilities", "group rank 0: 9.0; group rank 1: 8.9"],
    ),
    "two drivers": (2, [a_device(0), a_device(1, driver="570.1")], mesh(2), HOLDS, ["driver versions", "group rank 1: 570.1"]),
    "one pair of three without NVLink": (
        3,
        each(3),
        but(mesh(3), Link(1, 2, False, True, reason="NVLink: not supported")),
        HOLDS,
        ["more than 2 ranks want NVLink", f"{UUIDS[1]} and {UUIDS[2]} (group ranks 1 and 2): NVLink: not supported"],
    ),
    "a pair of three that nobody sees": (
        3,
        each(3),
        but(mesh(3), Link(0, 2, None, None, reason="cannot be seen from here")),
        HOLDS,
        ["it is not there, or cannot be seen", "(group ranks 0 and 2): cannot be seen from here"],
    ),
    "no P2P": (2, each(2), mesh(2, False, False, "P2P reads: the chipset"), HOLDS, ["cannot be shared between", "P2P reads"]),
    "one GPU without MPS": (
        3,
        one_gpu(3, [True, False, False]),
        shared(3),
        HOLDS,
        ["all ranks are on one GPU", "group ranks 1, 2 do not use MPS", "nvidia-cuda-mps-control -d", "take turns"],
    ),
    "two ranks on one GPU, one on another": (
        3,
        [a_device(0, mps=True), a_device(0, mps=True), a_device(1, mps=True)],
        but(mesh(3), Link(0, 1, None, None, shared_gpu=True)),
        HOLDS,
        ["some ranks share a GPU", "wanted one GPU a rank"],
    ),
    "a proof that failed": (2, each(2), mesh(2), FAILS, ["P2P between GPU a and b hangs (found on Monday)"]),
    "a proof that failed on one GPU": (2, one_gpu(2, [True] * 2), shared(2), replace(FAILS, recalled=""), ["GPU a and b hangs"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_everything_else_is_refused_with_what_was_found(case: str) -> None:
    size, devices, links, proof, words = REFUSALS[case]
    answer = decide(size, devices, links, proof)
    assert isinstance(answer, Refused)
    assert all(word in answer.reason for word in words), answer.reason


def test_products_of_one_architecture_may_differ() -> None:
    answer = decide(2, [a_device(0), a_device(1, name="H100")], mesh(2), HOLDS)
    assert isinstance(answer, Allowed)
    assert answer.facts["gpus"] == "group rank 0: H200; group rank 1: H100"


SOME_DEVICE = st.builds(
    a_device,
    st.integers(0, 3),
    capability=st.sampled_from([(9, 0), (8, 9)]),
    mig=st.sampled_from([False, False, False, True]),
    mps=st.booleans(),
    driver=st.sampled_from(["580.1", "580.1", "570.1"]),
)
SOME_LINK = st.tuples(st.sampled_from([True, False, None]), st.sampled_from([True, False, None]))


@st.composite
def gathered(draw: st.DrawFn) -> tuple[list[Device], Links]:
    size = draw(st.integers(2, 4))
    devices = [draw(SOME_DEVICE) for _ in range(size)]
    pairs = []
    for j in range(size):
        for i in range(j):
            nvlink, p2p = draw(SOME_LINK)
            same = devices[i].uuid == devices[j].uuid
            pairs.append(Link(i, j, nvlink, True if nvlink else p2p, same, "" if nvlink else "said so"))
    return devices, Links(tuple(pairs))


@given(gathered(), st.sampled_from([None, HOLDS, FAILS]))
@settings(deadline=None, max_examples=150)
def test_the_decision_depends_on_what_was_gathered_alone(facts: tuple[list[Device], Links], proof: Proof | None) -> None:
    devices, links = facts
    size = len(devices)
    answer = decide(size, devices, links, proof)
    # As another rank has it: over the wire.
    sent = [Device.from_json(json.loads(json.dumps(d.to_json()))) for d in devices]
    assert decide(size, sent, Links.from_json(json.loads(json.dumps(links.to_json()))), proof) == answer
    # Numbers of devices are a rank's own affair, and so is the rank's place in the group.
    assert decide(size, [replace(d, ordinal=7 - d.ordinal) for d in devices], links, proof) == answer
    known = {frozenset((pair.one, pair.other)): pair for pair in links.pairs}
    for order in list(permutations(range(size)))[:6]:
        moved = []
        for j in range(size):
            for i in range(j):
                moved.append(replace(known[frozenset((order[i], order[j]))], one=i, other=j))
        again = decide(size, [devices[rank] for rank in order], Links(tuple(moved)), proof)
        assert type(again) is type(answer)
        assert getattr(again, "kind", None) == getattr(answer, "kind", None)
    # A proof takes away, and never gives.
    if isinstance(answer, Allowed):
        assert proof is None or proof.holds
        assert isinstance(decide(size, devices, links, None), Allowed)
        assert isinstance(decide(size, devices, links, FAILS), Refused)
