"""Where a batch of sends and receives begins and ends, for a backend that has to be told, as NCCL has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from c10d_world import World

pytestmark = pytest.mark.timeout(60)


class Told:
    """In the place of NCCL: writes down what it is asked, and sends nothing."""

    supports_coalescing = True

    def __init__(self) -> None:
        self.said: list[str] = []

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        if tag == 13:
            raise RuntimeError("no such tag")
        self.said.append(f"send {peer}")

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> str:
        self.said.append(f"recv {peer}")
        return "its work"

    def _start_coalescing(self) -> None:
        self.said.append("begin")

    def _end_coalescing(self) -> str:
        self.said.append("end")
        return "work of all"


def check_batches(rank: int) -> None:
    group: Any = dist.group.WORLD
    told = Told()
    group._torch = lambda _tensor: told
    x, peer = torch.zeros(1), 1 - rank
    try:
        both = [dist.P2POp(dist.isend, x, peer), dist.P2POp(dist.irecv, x, peer)]
        for _ in range(2):
            assert dist.batch_isend_irecv(both) == ["work of all"]
        assert dist.batch_isend_irecv(both[:1]) == ["work of all"]
        assert dist.irecv(x, peer) == "its work"
        assert told.said == [
            *["begin", f"send {peer}", f"recv {peer}", "end"] * 2,
            *["begin", f"send {peer}", "end"],
            f"recv {peer}",
        ]
        told.said.clear()
        with pytest.raises(RuntimeError, match="no such tag"):
            dist.batch_isend_irecv([both[1], dist.P2POp(dist.isend, x, peer, tag=13), both[1]])
        assert dist.irecv(x, peer) == "its work"
        assert told.said == ["begin", f"recv {peer}", "end", f"recv {peer}"]
    finally:
        del group._torch


def test_a_batch_of_sends_and_receives_is_one_for_torchs_backend(pair: World) -> None:
    pair.run(check_batches)
