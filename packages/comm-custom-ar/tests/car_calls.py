"""One call of every kind that `custom_ar` has, for tests that lose a rank in it. Functions for rank processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from car_oracle import same_bits
from car_threads import host

import commplane
from commplane import errors
from commplane.runtime import Communicator

# Bytes of the one size that goes by single copy, see `start`.
SINGLE_COPY_BYTES = 1_200_000
# Elements, float32: some chunks of 64 KiB, so that a rank can be lost between two of them.
COUNT = 120_000
HIDDEN = 400

Call = Callable[[], torch.Tensor | None]


def start(store: Any, rank: int, world_size: int, **config: Any) -> commplane.Plane:
    """A plane with this wheel's plugin and core's own alone."""
    settings = {"custom_ar": {"single_copy": f"{SINGLE_COPY_BYTES}:{SINGLE_COPY_BYTES}"}, **config}
    return commplane.init(store=store, rank=rank, world_size=world_size, plugins=host(), config=settings)


def value(tp: Communicator, count: int, *, symmetric: bool, rank: int | None = None) -> torch.Tensor:
    """What rank `rank`, or this one, contributes: small integers, whose sums are exact."""
    x = tp.empty(count, dtype=torch.float32) if symmetric else torch.empty(count)
    return x.copy_(torch.arange(count) % 31 + (tp.rank if rank is None else rank))


def prepared(tp: Communicator, kind: str) -> tuple[Call, torch.Tensor | None]:
    """The call of that kind, which may be made again and again, and its result. Collective: it may allocate."""
    name, _, how = kind.partition(" ")
    if name == "barrier":
        return tp.barrier, None
    count = SINGLE_COPY_BYTES // 4 if how == "single copy" else COUNT
    n, x = tp.world_size, value(tp, count, symmetric=how.startswith("symmetric"))
    parts = [value(tp, count, symmetric=False, rank=r) for r in range(n)]
    total = torch.stack(parts).sum(0)
    if name == "all_reduce":
        return lambda: tp.all_reduce(x), total
    if name == "all_reduce_":
        mine = x.clone()
        return lambda: tp.all_reduce_(x.copy_(mine)), total
    if name == "all_gather":
        return lambda: tp.all_gather(x), torch.cat(parts)
    if name == "reduce_scatter":
        return lambda: tp.reduce_scatter(x), total.chunk(n)[tp.rank]
    if name == "broadcast":
        mine = x.clone()
        return lambda: tp.broadcast(x.copy_(mine), src=n - 1), parts[n - 1]
    weight = torch.ones(HIDDEN)
    rows = x.reshape(-1, HIDDEN)
    residual, wanted = torch.ones(count // HIDDEN, HIDDEN), total.reshape(-1, HIDDEN) + 1
    if name == "all_reduce_rms_norm":
        return lambda: tp.all_reduce_rms_norm(rows, residual, weight)[1], wanted
    mine = rows.clone()
    return lambda: tp.all_reduce_rms_norm_(rows.copy_(mine), residual.fill_(1.0), weight)[1], wanted


KINDS = [
    "all_reduce",
    "all_reduce_",
    "all_reduce single copy",
    "all_reduce symmetric",
    "all_reduce_ symmetric",
    "all_gather",
    "all_gather symmetric",
    "reduce_scatter",
    "reduce_scatter symmetric",
    "broadcast",
    "broadcast symmetric",
    "all_reduce_rms_norm",
    "all_reduce_rms_norm symmetric",
    "all_reduce_rms_norm_",
    "all_reduce_rms_norm_ symmetric",
    "barrier",
]


def right(got: torch.Tensor | None, wanted: torch.Tensor | None) -> bool:
    """Whether a result is the one that `prepared` gave, bit for bit."""
    return (got is None and wanted is None) or (got is not None and wanted is not None and same_bits(got, wanted))


def outcome(call: Callable[[], object]) -> dict[str, Any]:
    """What the call raises, as JSON, and what a second one raises."""
    first, second = raised(call), raised(call)
    return {**first, "again": second}


def raised(call: Callable[[], object]) -> dict[str, Any]:
    """The error of a call as JSON; an empty object if it has none."""
    try:
        call()
    except errors.CommplaneError as error:
        missing = list(error.missing_ranks) if isinstance(error, errors.PeerError) else None
        return {"error": type(error).__name__, "missing": missing, "text": str(error)}
    return {}


def at_once(calls: dict[str, Call]) -> dict[str, dict[str, Any]]:
    """`outcome` of each, all of them at the same time, in a thread each: they are of different communicators."""
    out: dict[str, dict[str, Any]] = {}

    def run(kind: str) -> None:
        out[kind] = outcome(calls[kind])

    threads = [threading.Thread(target=run, args=(kind,)) for kind in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def check(said: dict[str, Any], kind: str, culprit: int, *words: str) -> None:
    """A survivor raised `PeerError` that names `culprit` alone, the operation and its number, and raised again at once."""
    assert said and said["error"] == "PeerError", (kind, said)
    assert said["missing"] == [culprit], (kind, said)
    name = kind.partition(" ")[0].removesuffix("_")
    assert f"custom_ar] {name}" in said["text"] and " number " in said["text"], (kind, said)
    assert all(word in said["text"] for word in words), (kind, said)
    assert said["again"]["error"] == "PeerError" and said["again"]["missing"] == [culprit], (kind, said)
    assert "poisoned" in said["again"]["text"], (kind, said)
