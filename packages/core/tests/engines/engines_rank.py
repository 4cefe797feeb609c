"""One rank of a made-up engine: groups over Gloo that have what an adapter reads, and nothing else. Run by `run_processes`."""

from __future__ import annotations

import gc
import logging
import os
from typing import Any

import torch
import torch.distributed as dist

from commplane.engines import Engine, Groups
from commplane.errors import CommplaneError

ENGINE = Engine("torch", "commplane", ">=2", (), "start without it", "MADEUP_REPEATABLE")


class Group:
    """What an engine makes on each rank; its own sums are Gloo's."""

    def __init__(self, name: str, ranks: list[int]) -> None:
        self.unique_name, self.ranks, self.world_size, self.device = f"{name}:0", ranks, len(ranks), torch.device("cpu")


def begin(store: Any, rank: int, world_size: int, name: str) -> None:
    dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=world_size)


def adapter() -> Groups:
    return Groups(ENGINE, frozenset({"tp", "ep"}), logging.getLogger("engines"))


def tensors(rank: int) -> dict[str, torch.Tensor]:
    """Of each kind that an engine may sum, by a name; the values are small and whole."""

    def base() -> torch.Tensor:
        return torch.arange(24.0).reshape(4, 6) + rank  # of its own for each, because they are summed in place

    out = {
        "plain": base(),
        "transposed": base().t(),
        "channels last": base().reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "every other column": base().repeat(1, 2)[:, ::2],
        "nothing": base()[:0],
        "one number": base()[0, 0],
        "offset": base().flatten()[1:],
    }
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64):
        out[str(dtype)] = base().to(dtype)
    return out


def sums(groups: Groups, group: Group, rank: int) -> dict[str, str]:
    """By kind of tensor: "ours" where the sum was ours and right, "theirs" where it is the engine's, else what is wrong."""
    out = {}
    everyone = [tensors(r) for r in group.ranks]
    for kind, x in tensors(rank).items():
        wanted = sum(of[kind] for of in everyone)
        before = x.clone()
        call, in_place = groups.all_reduce(group, x), groups.all_reduce_(group, x)
        if call is None or in_place is None:
            out[kind] = "theirs" if call is in_place else "one is ours and the other is not"
            continue
        y = call(x)
        wrong = []
        if not torch.equal(y, wanted):
            wrong.append(f"wanted {wanted}, found {y}")
        if y.stride() != torch.empty_like(x).stride():
            wrong.append(f"strides {y.stride()} of what has {x.stride()}")
        if not torch.equal(x, before) or (x.numel() and y.data_ptr() == x.data_ptr()):
            wrong.append("the input is not what it was")
        if in_place(x) is not x or not torch.equal(x, wanted):
            wrong.append(f"in place wanted {wanted}, found {x}")
        out[kind] = "; ".join(wrong) or "ours"
    return out


def lives(store: Any, rank: int, world_size: int) -> dict[str, Any]:
    """What engines do with groups over several lives of a process."""
    begin(store, rank, world_size, "first")
    groups = adapter()
    everyone = list(range(world_size))
    world, tp, alone = Group("world", everyone), Group("tp", everyone), Group("tp", [rank])
    out: dict[str, Any] = {"served": [groups.attach(g) is not None for g in (world, tp, alone)]}
    out["sums"] = sums(groups, tp, rank)
    with torch.inference_mode():
        x = torch.ones(3)
        call = groups.all_reduce_(tp, x)
        out["inference"] = None if call is None else call(x).tolist()

    # One rank drops a group without a word and its garbage is collected, the other keeps it: the next ones are made all the same.
    kept = tp
    del tp
    if rank == 0:
        del kept
        gc.collect()
    ep = Group("ep", everyone)
    out["after a drop"] = [groups.attach(ep) is not None, total(groups, ep)]

    # The first group goes, and with it the plane; one that is left has the engine's own sums.
    plane = groups.plane
    groups.detach(world)
    out["without the first"] = [groups.plane is None, total(groups, ep), groups.served == (), is_closed(plane)]
    groups.detach(ep)
    groups.detach(world)

    # Another vote in the same default group, and one in another default group while nothing was destroyed.
    again, tp = Group("world", everyone), Group("tp", everyone)
    out["again"] = [groups.attach(again) is None, groups.attach(tp) is not None, total(groups, tp)]
    plane = groups.plane
    begin_anew(store, rank, world_size)
    after = Group("tp", everyone)
    out["a new default group"] = [groups.attach(after) is not None, total(groups, after), total(groups, tp), is_closed(plane)]
    groups.detach(after)
    dist.destroy_process_group()
    return out


def begin_anew(store: Any, rank: int, world_size: int) -> None:
    dist.destroy_process_group()
    begin(store, rank, world_size, "second")


def is_closed(plane: Any) -> bool:
    try:
        plane.communicator("again")
    except CommplaneError as error:
        return "closed" in str(error)
    return False


def total(groups: Groups, group: Group) -> float | None:
    """The sum of ones over `group`; None where it is the engine's."""
    x = torch.ones(2)
    call = groups.all_reduce(group, x)
    return None if call is None else call(x)[0].item()


def mishaps(store: Any, rank: int, world_size: int) -> dict[str, Any]:
    """Ranks that do not do the same: the text that each gets, and none waits forever."""
    out: dict[str, Any] = {}
    everyone = list(range(world_size))
    begin(store, rank, world_size, "order")
    groups = adapter()
    groups.attach(Group("world", everyone))
    for name in ("tp", "ep")[:: 1 if rank == 0 else -1]:
        try:
            groups.attach(Group(name, everyone))
        except CommplaneError as error:
            out["another order"] = f"{type(error).__name__}: {error}"
            break
    dist.destroy_process_group()

    begin(store, rank, world_size, "capture")
    groups = adapter()
    world, tp = Group("world", everyone), Group("tp", everyone)
    for group in (world, tp):
        groups.attach(group)
    try:
        with groups.capture():
            if rank == 1:
                raise ZeroDivisionError("of rank 1")
            total(groups, tp)
    except (ZeroDivisionError, CommplaneError) as error:
        out["failed in a capture"] = type(error).__name__
    out["capturing"] = groups.capturing
    try:
        out["after it"] = total(groups, tp)
    except CommplaneError as error:
        out["after it"] = type(error).__name__
    for group in (tp, world):
        groups.detach(group)
    out["plane"] = groups.plane is None
    dist.destroy_process_group()
    return out


def lost(store: Any, rank: int, world_size: int) -> Any:
    """Rank 1 is gone without a word, in the middle of everything; rank 0 sums, is told, and destroys its groups."""
    everyone = list(range(world_size))
    begin(store, rank, world_size, "lost")
    groups = adapter()
    world, tp = Group("world", everyone), Group("tp", everyone)
    for group in (world, tp):
        groups.attach(group)
    if rank == 1:
        os.kill(os.getpid(), 9)
    try:
        total(groups, tp)
    except CommplaneError as error:
        out = type(error).__name__
    for group in (tp, world):
        groups.detach(group)
    return [out, groups.plane is None, groups.served == ()]
