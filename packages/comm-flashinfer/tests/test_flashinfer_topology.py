"""Which GPUs will do is one pure answer from what all ranks say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from commplane_flashinfer.topology import Card, refusal

pytestmark = pytest.mark.timeout(30)
H200 = [Card(f"GPU-{i}", "H200", (9, 0), False) for i in range(4)]
ALL = [[c.uuid for c in H200 if c != me] for me in H200]


def test_a_full_mesh_of_nvlink_will_do() -> None:
    assert refusal(H200, ALL, (4, 5, 6, 7), False) is None


def test_ranks_that_share_one_gpu_need_no_link() -> None:
    assert refusal([H200[0]] * 2, [[], []], (0, 1), False) is None


def test_a_pair_without_nvlink_is_named_by_its_global_ranks_and_may_be_forced() -> None:
    linked = [list(row) for row in ALL]
    linked[1].remove("GPU-3")
    reason = refusal(H200, linked, (4, 5, 6, 7), False)
    assert reason is not None
    assert "found none between ranks 5 and 7:" in reason
    assert "flashinfer.any_topology=true" in reason
    assert refusal(H200, linked, (4, 5, 6, 7), True) is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"confidential": True}, "wanted machines without confidential computing, found it on rank 6"),
        ({"capability": (8, 9), "name": "L4"}, "wanted GPUs of compute capability 9, 10 or 12, found L4 with 8.9 on rank 6"),
        ({"capability": (10, 0)}, "wanted GPUs of one compute capability, found rank 4: 9.0; rank 5: 9.0; rank 6: 10.0"),
    ],
)
def test_a_card_that_will_not_do_is_named_even_where_the_topology_is_forced(changes: dict[str, object], text: str) -> None:
    cards = [*H200[:2], replace(H200[2], **changes), H200[3]]  # type: ignore[arg-type]
    reason = refusal(cards, ALL, (4, 5, 6, 7), True)
    assert reason is not None
    assert reason.startswith(text)
