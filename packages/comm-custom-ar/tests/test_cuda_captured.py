# SPDX-License-Identifier: Apache-2.0
"""What captures remembered is exchanged and filled in on all ranks, or lost on all. Threads as ranks, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
from cuda_fakes import FakeComm, context
from gpu_machine import all_of, ranks

from commplane.errors import CommplaneError, MismatchError
from commplane_custom_ar._native import NativeError
from commplane_custom_ar.codes import EUNSUPPORTED
from commplane_custom_ar.cuda.captured import CapturedInputs, first_difference

pytestmark = pytest.mark.timeout(60)

PAGE = 1 << 21


class Torch:
    """Memory of a rank's allocator in blocks of `PAGE` bytes: rank r's lie at ``(r + 1) << 40``; peers map them 1 << 50 above."""

    def __init__(self, rank: int, *, expandable: bool = False) -> None:
        self.rank, self.expandable = rank, expandable
        self.opened: list[tuple[int, int]] = []
        self.closed: list[int] = []

    def handle(self, address: int) -> tuple[bytes, int]:
        if self.expandable:
            raise NativeError(EUNSUPPORTED, "no handle")
        block = address // PAGE * PAGE
        return block.to_bytes(64, "little"), address - block

    def open(self, handle: bytes) -> int:
        block = int.from_bytes(handle, "little")
        self.opened.append((self.rank, block))
        return block + (1 << 50)

    def close(self, opened: int) -> None:
        self.closed.append(opened)


def own(rank: int, offset: int) -> int:
    return ((rank + 1) << 40) + offset


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_each_rank_learns_where_the_inputs_of_all_ranks_lie_and_opens_an_allocation_once(world_size: int) -> None:
    offsets = [0, 4096, PAGE + 512, 4096, 3 * PAGE]  # two in one allocation, one of them twice

    def body(bootstrap: Any) -> tuple[dict[int, list[int]], Torch, FakeComm]:
        comm, memory = FakeComm(), Torch(bootstrap.rank)
        inputs = CapturedInputs(context(bootstrap), comm, memory)  # type: ignore[arg-type]
        for _ in range(2):  # graphs of two captures over the same memory
            comm.inputs = [(own(bootstrap.rank, at), 1024 * (i + 1)) for i, at in enumerate(offsets)]
            inputs.exchange(bootstrap)
        assert not memory.closed
        inputs.close()
        inputs.close()
        return comm.rows, memory, comm

    for rank, (rows, memory, comm) in enumerate(all_of(ranks(world_size, body))):
        for index, at in enumerate(offsets):
            assert rows[index] == [own(r, at) + (0 if r == rank else 1 << 50) for r in range(world_size)]
        assert len(memory.opened) == len(set(memory.opened)) == 3 * (world_size - 1)
        assert sorted(memory.closed) == sorted(block + (1 << 50) for _, block in memory.opened)
        assert comm.log == ["filled", "filled"]


def test_nothing_remembered_costs_one_round_and_opens_nothing() -> None:
    def body(bootstrap: Any) -> list[Any]:
        rounds: list[str] = []

        class Counted:
            rank, ranks = bootstrap.rank, bootstrap.ranks

            def all_gather(self, value: Any, *, what: str) -> Any:
                rounds.append(what)
                return bootstrap.all_gather(value, what=what)

        CapturedInputs(context(bootstrap), FakeComm(), Torch(bootstrap.rank)).exchange(Counted())  # type: ignore[arg-type]
        return rounds

    assert all_of(ranks(2, body)) == [["captured inputs: bytes"]] * 2


@pytest.mark.parametrize(
    ("of_rank_1", "text"),
    [
        ([1024], r"at input number 2: rank 0 2048 bytes; rank 1 none \(rank 0 2, rank 1 1 in all\)"),
        ([1024, 4096], r"at input number 2: rank 0 2048 bytes; rank 1 4096 bytes"),
        ([2048, 1024], r"at input number 1: rank 0 1024 bytes; rank 1 2048 bytes"),
        ([], r"at input number 1: rank 0 1024 bytes; rank 1 none"),
        ([1024, 2048, 8], r"at input number 3: rank 0 none; rank 1 8 bytes"),
    ],
)
def test_other_count_order_or_sizes_are_a_mismatch_on_all_ranks_that_names_the_first(of_rank_1: list[int], text: str) -> None:
    def body(bootstrap: Any) -> FakeComm:
        comm, memory = FakeComm(), Torch(bootstrap.rank)
        sizes = of_rank_1 if bootstrap.rank == 1 else [1024, 2048]
        comm.inputs = [(own(bootstrap.rank, 4096 * i), nbytes) for i, nbytes in enumerate(sizes)]
        with pytest.raises(MismatchError, match=text):
            CapturedInputs(context(bootstrap), comm, memory).exchange(bootstrap)  # type: ignore[arg-type]
        assert not memory.opened
        return comm

    for comm in all_of(ranks(2, body)):
        assert comm.log == ["filled"]  # those graphs are lost; the next capture begins anew
        assert not comm.rows


def test_a_rank_whose_memory_has_no_handle_fails_the_step_on_all_with_its_reason() -> None:
    def body(bootstrap: Any) -> list[str]:
        comm = FakeComm()
        comm.inputs = [(own(bootstrap.rank, 0), 64)]
        inputs = CapturedInputs(context(bootstrap), comm, Torch(bootstrap.rank, expandable=bootstrap.rank == 1))  # type: ignore[arg-type]
        with pytest.raises((NativeError, CommplaneError), match="no handle") as caught:
            inputs.exchange(bootstrap)
        if bootstrap.rank == 1:
            bootstrap.fail(str(caught.value))  # as core does for a rank that raises in a step
        return comm.log

    assert all_of(ranks(2, body, timeout=60.0, patience=20.0)) == [["filled"], ["filled"]]


def test_equal_inputs_are_no_difference() -> None:
    assert first_difference({0: [1, 2], 4: [1, 2]}) is None
    assert first_difference({0: [], 4: []}) is None
