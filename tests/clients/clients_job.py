"""What the ranks of one torchrun job do: each part whole in one process, then all parts over Gloo, then all over commplane.

Started as ``python -m torch.distributed.run clients_job.py FOLDER PART...``; a part is a name of `_PARTS` and the architecture it
is for, ``asked:llama``. Each rank leaves ``FOLDER/RANK.pt``: {part: {"whole" | "gloo" | "commplane": answers, "calls": counts}},
and under "plan" the backends that served.

Under torchrun a process has one default group of Gloo in its life: another one would find the first one's addresses in the store.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60


@contextmanager
def group(backend: str) -> Iterator[None]:
    """A default group, as torchrun's environment says."""
    dist.init_process_group(backend, timeout=timedelta(seconds=SECONDS))
    try:
        assert dist.get_backend() == backend
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def counted(calls: dict[str, int]) -> Iterator[None]:
    """Count in `calls` what reaches communicators."""
    from commplane.runtime import Communicator

    names = ("all_reduce", "all_reduce_", "all_gather", "reduce_scatter", "broadcast")
    originals = {name: getattr(Communicator, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(self: Communicator, *args: Any, **named: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return originals[name](self, *args, **named)

        return call

    for name in names:
        setattr(Communicator, name, counting(name))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(Communicator, name, function)


def of_model(what: str, dtype: torch.dtype = torch.float32) -> Callable[[Path, str, bool], dict[str, Any]]:
    """A part that puts `what`, a function of clients_models, to a model, split over the ranks or not."""

    def part(folder: Path, architecture: str, split: bool) -> dict[str, Any]:
        import clients_models

        saved = folder / f"rank {os.environ['RANK']}" / architecture  # each rank writes its own: the seed is the same
        if not saved.exists():
            clients_models.save(architecture, saved)
        question: Callable[[Any], dict[str, Any]] = getattr(clients_models, what)
        return question(clients_models.load(saved, split=split, dtype=dtype))

    return part


def accelerated(_folder: Path, _architecture: str, split: bool) -> dict[str, Any]:
    """Losses and weights of training with accelerate."""
    import clients_training

    return clients_training.train() if split else {}


_PARTS: dict[str, Callable[[Path, str, bool], dict[str, Any]]] = {
    "asked": of_model("ask"),
    "bfloat16": of_model("ask", torch.bfloat16),
    "trained": of_model("trained"),
    "compiled": of_model("compiled"),
    "accelerated": accelerated,
}


def main(folder: Path, parts: list[str]) -> None:
    torch.set_num_threads(1)

    def run(part: str, split: bool) -> dict[str, Any]:
        name, _, architecture = part.partition(":")
        return _PARTS[name](folder, architecture, split)

    results: dict[str, Any] = {part: {"whole": run(part, split=False), "calls": {}} for part in parts}
    with group("gloo"):
        for part in parts:
            results[part]["gloo"] = run(part, split=True)
    with group("commplane"):
        from commplane.c10d import communicator_of

        results["plan"] = list(communicator_of().plan.backends)
        for part in parts:
            with counted(results[part]["calls"]):
                results[part]["commplane"] = run(part, split=True)
    torch.save(results, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
