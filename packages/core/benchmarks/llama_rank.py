"""One rank of one way to run a model: does what the bench says over its socket, until that is closed."""

from __future__ import annotations

import os
import statistics
import sys
import time
from datetime import timedelta
from itertools import pairwise
from multiprocessing.connection import Client
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """When `generate` had each token; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Called by `generate`."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by `generate`."""


class Rank:
    """What the bench asks for, by name."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.model: Any = None

    def make(self, folder: str, shape: dict[str, int], dtype: str) -> int:
        """Write a model with random weights: its number of parameters."""
        torch.manual_seed(1)
        options: dict[str, Any] = {"num_key_value_heads": shape["num_attention_heads"], **shape}
        config = LlamaConfig(**options, pad_token_id=0)
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
        model.save_pretrained(folder)
        return sum(p.numel() for p in model.parameters())

    def load(self, folder: str, dtype: str) -> None:
        """Load it, or this rank's part."""
        how = {} if self.way == "whole" else {"distributed_config": DistributedConfig(tp_plan="auto")}
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **how)  # in eval mode

    def generate(self, prompt: int, tokens: int) -> dict[str, Any]:
        """Greedy tokens behind one prompt; how many a second came after the first, in all and by the median time of one."""
        ids = torch.arange(3, 3 + prompt).view(1, -1)
        clock = Clock()
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            streamer=clock,
        )
        took = [after - before for before, after in pairwise(clock.times[1:])]
        return {"tokens": out[0, prompt:].tolist(), "turn": len(took) / sum(took), "median": 1 / statistics.median(took)}

    def describe(self) -> dict[str, Any]:
        """The machine, and what served."""
        import transformers

        from commplane.bench import describe
        from commplane.c10d import communicator_of, plane_of

        found = describe(plane_of(), [communicator_of()], [])
        found["transformers"] = transformers.__version__
        return found


def main(way: str) -> None:
    """Serve until the socket is closed."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    end = Client(("127.0.0.1", int(os.environ["BENCH_ADDRESS"])), authkey=bytes.fromhex(os.environ["BENCH_KEY"]))
    end.send(int(os.environ["RANK"]))  # first: the bench takes one rank after the other
    if way != "whole":
        dist.init_process_group(way, timeout=timedelta(seconds=120))
    rank = Rank(way)
    while True:
        try:
            request = end.recv()
        except EOFError:
            break
        end.send(getattr(rank, request.pop("do"))(**request))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
