"""Ranks that are lost, differ or call on two streams, on GPUs: named errors within the deadline and a way back, never a hang."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_numbers import checksum
from gpu_ranks import Rank, Worlds, needs_gpu, sizes

from commplane import errors
from commplane.runtime import Communicator

pytestmark = needs_gpu()

SHORT_S = 1.5
"""The deadline of kernels in these tests."""


def raised(call: Callable[[], object]) -> dict[str, Any]:
    """The error of a call, as a JSON object; an empty one if it has none."""
    try:
        call()
    except errors.CommplaneError as error:
        missing = list(error.missing_ranks) if isinstance(error, errors.PeerError) else None
        return {"error": type(error).__name__, "missing": missing, "text": str(error)}
    return {}


def settled(tp: Communicator, call: Callable[[], object]) -> dict[str, Any]:
    """What comes of `call` on the device: the error of the call itself, or of the next one after the device is idle."""
    said = raised(call)
    if said:
        return said
    torch.cuda.synchronize()
    return raised(lambda: tp.all_reduce(torch.ones(4, device=tp.device)))


def calls_of(rank: Rank, tp: Communicator) -> dict[str, Callable[[], object]]:
    x = torch.ones(64, 1024, dtype=torch.bfloat16, device=rank.device)
    weight = torch.ones(1024, dtype=torch.bfloat16, device=rank.device)

    def ten_times() -> None:
        for step in range(10):
            tp.all_reduce(x[: 6 * step + 1])

    return {
        "all_reduce": lambda: tp.all_reduce(x),
        "all_reduce ten times": ten_times,
        "all_reduce large": lambda: tp.all_reduce(torch.ones(12_000_000, dtype=torch.bfloat16, device=rank.device)),
        "all_reduce_rms_norm": lambda: tp.all_reduce_rms_norm(x, x, weight),
        "all_gather": lambda: tp.all_gather(x),
        "broadcast": lambda: tp.broadcast(x, tp.world_size - 1),
        "barrier": tp.barrier,
    }


def misses_a_call(rank: Rank, culprit: int, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """The culprit stays away from one call. Afterwards all of them make a new communicator."""
    tp = rank.form("lost", **options)
    call = calls_of(rank, tp)[kind]
    call()
    tp.barrier()
    out: dict[str, Any] = {}
    if rank.rank == culprit:
        time.sleep(SHORT_S + 0.7)
        out["late"] = settled(tp, call)
    else:
        before = time.monotonic()
        out["first"] = settled(tp, call)
        out["took"] = time.monotonic() - before
        out["again"] = raised(call)
    alive = torch.ones(3, device=rank.device).sum().item()  # the context is as it was
    tp.close()
    with rank.form("back", **options) as back:
        out["total"] = back.all_reduce(torch.ones(5, device=rank.device)).tolist()
    out["alive"] = alive
    return out


KINDS = ["all_reduce", "all_reduce ten times", "all_reduce large", "all_reduce_rms_norm", "all_gather", "broadcast", "barrier"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", sizes(most=3))
def test_a_rank_that_does_not_come_is_named_and_all_can_begin_anew(worlds: Worlds, size: int, kind: str) -> None:
    check_missing(worlds, size, kind, {})


@pytest.mark.parametrize("size", sizes(most=2))
def test_a_rank_that_does_not_come_to_a_two_shot_is_named(worlds: Worlds, size: int) -> None:
    check_missing(worlds, size, "all_reduce", {"algorithm": "two_shot_push"})


def check_missing(worlds: Worlds, size: int, kind: str, options: dict[str, Any]) -> None:
    culprit = size - 1
    with worlds.short(size, SHORT_S) as world:
        said = world.run(misses_a_call, culprit, kind, options)
    for rank, one in enumerate(said):
        assert one["total"] == [float(size)] * 5 and one["alive"] == 3.0
        if rank == culprit:
            assert one["late"]["error"] == "PeerError", one
            continue
        assert one["first"]["error"] == "PeerError" and one["first"]["missing"] == [culprit], one
        assert f"[lost rank {rank}/{size} custom_ar]" in one["first"]["text"], one
        assert one["again"]["error"] == "PeerError", one
        # A large message is several kernels, each of which may wait once.
        assert one["took"] < 10 * SHORT_S, one


def is_killed(rank: Rank, culprit: int) -> dict[str, Any]:
    """The culprit kills itself with kernels queued."""
    import os

    tp = rank.form("killed")
    x = torch.ones(4096, device=rank.device)
    for _ in range(10):
        tp.all_reduce(x)
    if rank.rank == culprit:
        os.kill(os.getpid(), signal.SIGKILL)
    out: dict[str, Any] = {"first": settled(tp, lambda: tp.all_reduce(x)), "again": raised(lambda: tp.all_reduce(x))}
    tp.close()
    survivors = [r for r in range(rank.world_size) if r != culprit]
    out["alive"] = torch.ones(3, device=rank.device).sum().item()
    if len(survivors) > 1 and not rank.shared:
        with rank.form("survivors", survivors) as left:
            out["total"] = left.all_reduce(torch.ones(5, device=rank.device)).tolist()
    return out


# Under MPS a client that is killed may take the others' contexts with it: the server ends them all on a fatal fault.
@pytest.mark.parametrize("size", sizes(most=4))
def test_a_rank_that_is_killed_is_named_and_the_others_live_on(worlds: Worlds, size: int) -> None:
    if size > torch.cuda.device_count():
        pytest.skip(f"wants {size} GPUs: a client of MPS that is killed may end the others' contexts")
    culprit = size - 1
    with worlds.fresh(size, timeout=SHORT_S, startup_timeout=20.0) as world:
        *survivors, lost = world.outcomes(is_killed, culprit)
    assert lost.get("died") == -signal.SIGKILL, lost
    for one in survivors:
        assert "result" in one, one
        assert one["result"]["first"]["error"] == "PeerError" and one["result"]["first"]["missing"] == [culprit], one
        assert one["result"]["alive"] == 3.0 and one["result"].get("total", [2.0])[0] >= 2.0


def calls_something_else(rank: Rank, mine: list[str]) -> dict[str, Any]:
    tp = rank.form("differ")
    x = torch.ones(64, 1024, dtype=torch.bfloat16, device=rank.device)
    other: dict[str, Callable[[], object]] = {
        "64 Ki": lambda: tp.all_reduce(x),
        "32 Ki": lambda: tp.all_reduce(x[:32]),
        "float32": lambda: tp.all_reduce(x.float()),
        "gather": lambda: tp.all_gather(x),
        "src 0": lambda: tp.broadcast(x, 0),
        "src 1": lambda: tp.broadcast(x, 1),
        "eps 1": lambda: tp.all_reduce_rms_norm(x, x, x[0].clone(), 1e-3),
        "eps 2": lambda: tp.all_reduce_rms_norm(x, x, x[0].clone(), 1e-5),
    }
    tp.barrier()
    out: dict[str, Any] = {"first": settled(tp, other[mine[rank.rank]])}
    out["again"] = raised(lambda: tp.all_reduce(x))
    tp.close()
    with rank.form("same") as back:
        out["total"] = back.all_reduce(torch.ones(5, device=rank.device)).tolist()
    return out


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ("64 Ki", "32 Ki", ["count=65536", "count=32768"]),
        ("64 Ki", "float32", ["bfloat16", "float32"]),
        ("64 Ki", "gather", ["all_reduce", "all_gather"]),
        ("src 0", "src 1", ["src=0", "src=1"]),
        ("eps 1", "eps 2", ["all_reduce_rms_norm"]),
    ],
)
@pytest.mark.parametrize("size", sizes(most=2))
def test_ranks_that_call_differently_are_both_told_of_both_calls(
    worlds: Worlds, size: int, one: str, other: str, words: list[str]
) -> None:
    with worlds.short(size, SHORT_S) as world:
        for said in world.run(calls_something_else, [one, other]):
            assert said["first"]["error"] == "MismatchError", said
            assert all(word in said["first"]["text"] for word in words), (words, said)
            assert said["again"]["error"] == "MismatchError", said
            assert said["total"] == [float(size)] * 5


def aborts(rank: Rank) -> dict[str, Any]:
    """Rank 0 waits in a kernel, the others abort: it stops waiting long before its deadline."""
    tp = rank.form("aborted")
    tp.barrier()
    out: dict[str, Any]
    if rank.rank:
        time.sleep(0.5)
        tp.abort()
        out = {"first": raised(lambda: tp.all_reduce(torch.ones(9, device=rank.device)))}
    else:
        out = {"first": settled(tp, lambda: tp.all_reduce(torch.ones(9, device=rank.device)))}
    tp.close()
    return out


@pytest.mark.parametrize("size", sizes(most=3))
def test_an_abort_ends_the_waits_of_the_others(worlds: Worlds, size: int) -> None:
    with worlds.fresh(size, timeout=60.0) as world:
        first, *others = world.run(aborts, limit=50.0)  # below the deadline of the kernels
    assert first["first"]["error"] == "PeerError", first
    assert all(one["first"] for one in others), others


def alternates_streams(rank: Rank) -> list[int]:
    """200 calls, in turn on two streams that nothing else orders."""
    tp, n = rank.comm(), rank.world_size
    streams = [torch.cuda.Stream(rank.device), torch.cuda.Stream(rank.device)]
    torch.cuda.synchronize()
    results = []
    for step in range(200):
        with torch.cuda.stream(streams[step % 2]):
            x = torch.full((10 + 997 * (step % 7),), float(step + rank.rank), device=rank.device)
            results.append(tp.all_reduce(x))
    torch.cuda.synchronize()
    for step, total in enumerate(results):
        assert bool((total == n * step + n * (n - 1) / 2).all()), step
    return [checksum(total) for total in results[:3]]


@pytest.mark.parametrize("size", sizes())
def test_eager_calls_on_two_streams_are_put_in_order(worlds: Worlds, size: int) -> None:
    worlds.get(size).run(alternates_streams)


def replays_at_once(rank: Rank) -> dict[str, Any]:
    """Two graphs of one communicator, replayed on two streams with nothing to order them."""
    tp, n = rank.form("at_once"), rank.world_size
    tensors = [torch.ones(200_000, device=rank.device), torch.ones(200_000, device=rank.device)]
    outs, graphs = [], []
    torch.cuda.synchronize()
    for tensor in tensors:
        graph = torch.cuda.CUDAGraph()
        with rank.plane.capture(), torch.cuda.graph(graph):
            for _ in range(20):
                out = tp.all_reduce(tensor)
            outs.append(out)
        graphs.append(graph)
    streams = [torch.cuda.Stream(rank.device), torch.cuda.Stream(rank.device)]
    for _ in range(5):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    said = raised(lambda: tp.all_reduce(torch.ones(4, device=rank.device)))
    right = all(bool((out == n).all()) for out in outs)
    tp.close()
    with rank.form("after") as after:
        total = after.all_reduce(torch.ones(5, device=rank.device)).tolist()
    return {"said": said, "right": right, "total": total}


@pytest.mark.parametrize("size", sizes(most=3))
def test_two_graphs_replayed_at_once_are_right_or_an_error_and_never_a_hang(worlds: Worlds, size: int) -> None:
    with worlds.short(size, SHORT_S) as world:
        said = world.run(replays_at_once)
    for one in said:
        assert one["said"] or one["right"], one
        assert one["total"] == [float(size)] * 5, one
