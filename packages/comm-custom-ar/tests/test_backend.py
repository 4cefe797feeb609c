"""`custom_ar` through the public API, threads as ranks: values, layouts, dtypes, symmetric memory, arguments that differ."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from commplane import errors, hookimpl
from commplane.runtime import Communicator, Plane
from commplane.testing import PluginHost, run_threads, shm_leftovers
from commplane_custom_ar import _native, plugin

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = ["sum", "min", "max", "avg"]
# Around a vector, a page and the chunk of 4 KiB that the tests set, and far beyond.
COUNTS = [0, 1, 3, 17, 1023, 1024, 1025, 2049, 50_001]
SMALL_CHUNKS = {"chunk_bytes": 4096}


def host(_rank: int = 0) -> PluginHost:
    out = PluginHost()
    out.register(plugin, "custom_ar", dist="commplane-custom-ar", version="0.1.0")
    return out


def run(world_size: int, function: Callable[[Plane], Any], **options: Any) -> list[Any]:
    settings = {"timeout": 30, "custom_ar": {**SMALL_CHUNKS, **options}}
    out = run_threads(world_size, function, plugins=host, config=lambda _rank: settings, timeout=120)
    for result in out:
        if isinstance(result, Exception):
            raise result
    return out


@pytest.fixture(autouse=True)
def shared_memory_is_left_as_it_was() -> Iterator[None]:
    before = shm_leftovers()
    yield
    assert shm_leftovers() <= before


def inputs(world_size: int, count: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(count, generator=generator) * 8).to(dtype) for _ in range(world_size)]


def reference(parts: list[torch.Tensor], op: str) -> torch.Tensor:
    """In float32, in rank order, rounded once: exactly what the backend promises."""
    out = parts[0].float()
    for part in parts[1:]:
        wide = part.float()
        out = {"min": torch.minimum, "max": torch.maximum}.get(op, torch.add)(out, wide)
    return (out / len(parts) if op == "avg" else out).to(parts[0].dtype)


def bits(tensor: torch.Tensor) -> list[int]:
    integer = torch.int32 if tensor.dtype is torch.float32 else torch.int16
    return tensor.contiguous().view(integer).flatten().tolist()  # type: ignore[no-any-return]


def layouts(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The same values as an ordinary, an unaligned, a strided and a two-dimensional transposed tensor."""
    yield "ordinary", tensor.clone()
    unaligned = torch.zeros(len(tensor) + 1, dtype=tensor.dtype)[1:]
    yield "unaligned", unaligned.copy_(tensor)
    strided = torch.zeros(2 * len(tensor), dtype=tensor.dtype)[::2]
    yield "strided", strided.copy_(tensor)
    if len(tensor) and len(tensor) % 3 == 0:
        yield "transposed", tensor.reshape(3, -1).t().contiguous().t()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_dtype_op_count_and_layout_gives_the_exact_sum_in_rank_order(world_size: int) -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        assert tp.plan.backends == ("custom_ar", "torch")
        for dtype in DTYPES:
            for op in OPS:
                for count in COUNTS:
                    parts = inputs(world_size, count, dtype, seed=count)
                    wanted = bits(reference(parts, op))
                    for name, x in layouts(parts[tp.rank]):
                        where = f"{dtype} {op} {count} {name}"
                        before = bits(x)
                        assert bits(tp.all_reduce(x, op)) == [*wanted], where
                        assert bits(x) == before, f"{where}: out of place changed its input"
                        assert tp.all_reduce_(x, op) is x
                        assert bits(x) == wanted, where

    run(world_size, rank_main)


@pytest.mark.parametrize("world_size", [2, 3])
def test_symmetric_tensors_give_the_same_bits_as_staged_ones(world_size: int) -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        for dtype in DTYPES:
            buffer = tp.empty(60_000, dtype=dtype)
            for op in OPS:
                for count, offset in [(1, 0), (1000, 0), (1025, 3), (50_001, 17)]:
                    parts = inputs(world_size, count, dtype, seed=count)
                    wanted = bits(reference(parts, op))
                    x = buffer[offset : offset + count].copy_(parts[tp.rank])
                    assert bits(tp.all_reduce(x, op)) == wanted
                    assert bits(x) == bits(parts[tp.rank])
                    assert bits(tp.all_reduce_(x, op)) == wanted

    run(world_size, rank_main)


@pytest.mark.parametrize("options", [{"binding": "ctypes"}, {"isa": "baseline"}, {"chunk_bytes": 65500}])
def test_settings_change_the_way_and_not_the_result(options: dict[str, Any]) -> None:
    def rank_main(plane: Plane) -> list[int]:
        tp = plane.communicator("tp")
        return bits(tp.all_reduce(inputs(2, 9_999, torch.bfloat16, seed=1)[tp.rank]))

    wanted = bits(reference(inputs(2, 9_999, torch.bfloat16, seed=1), "sum"))
    assert run(2, rank_main, **options) == [wanted, wanted]


def test_special_values_come_out_as_torch_gives_them() -> None:
    a = torch.tensor([float("nan"), float("inf"), float("inf"), -0.0, 1e-45, 3.4e38])
    b = torch.tensor([1.0, 1.0, -float("inf"), -0.0, 1e-45, 3.4e38])

    def rank_main(plane: Plane) -> torch.Tensor:
        tp = plane.communicator("tp")
        return tp.all_reduce(a if tp.rank == 0 else b)

    for got in run(2, rank_main):
        assert torch.equal(got.nan_to_num(nan=7), (a + b).nan_to_num(nan=7))
        assert str(got[3].item()) == "-0.0"


def test_other_dtypes_and_collectives_go_to_torch() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        assert tp.plan.explain("all_reduce", dtype="int64").chosen == "torch"
        assert tp.all_reduce(torch.tensor([tp.rank + 1])).item() == 3
        assert tp.all_gather(torch.tensor([float(tp.rank)])).tolist() == [0.0, 1.0]
        assert tp.reduce_scatter(torch.tensor([1.0, 2.0])).item() == 2.0 * (tp.rank + 1)
        assert tp.broadcast(torch.tensor([float(tp.rank)]), src=1).item() == 1.0

    run(2, rank_main)


def test_unsupported_calls_say_so_and_do_no_harm() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        with pytest.raises(errors.UnsupportedOperation, match=r"int16.*served by no backend"):
            tp.all_reduce(torch.zeros(3, dtype=torch.int16))
        with pytest.raises(errors.UnsupportedOperation, match="wanted op sum, min, max, avg, found 'mean'"):
            tp.all_reduce(torch.zeros(3), "mean")
        with pytest.raises(errors.UnsupportedOperation, match="wanted a tensor on cpu, found one on meta"):
            tp.all_reduce(torch.zeros(3, device="meta"))
        with pytest.raises(errors.UnsupportedOperation, match="group rank below 2, found 2"):
            tp.broadcast(torch.zeros(3), src=2)
        with pytest.raises(errors.UnsupportedOperation, match="2 ranks divide"):
            tp.reduce_scatter(torch.zeros(3))
        assert tp.all_reduce(torch.ones(1)).item() == 2.0

    run(2, rank_main)


@pytest.mark.parametrize("what", ["count", "dtype", "op", "symmetric"])
def test_ranks_that_differ_all_raise_mismatch_and_the_communicator_is_poisoned(what: str) -> None:
    def call(tp: Communicator) -> None:
        odd = tp.rank == 1
        x = tp.empty(8, dtype=torch.float32).zero_()
        if what == "symmetric" and odd:
            x = torch.zeros(8)
        if what == "count" and odd:
            x = torch.zeros(9)
        if what == "dtype" and odd:
            x = torch.zeros(8, dtype=torch.bfloat16)
        tp.all_reduce_(x, "max" if what == "op" and odd else "sum")

    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        with pytest.raises(errors.MismatchError, match=r"\[tp rank \d/2 custom_ar\].*rank [01] called all_reduce"):
            call(tp)
        with pytest.raises(errors.MismatchError, match="poisoned"):
            tp.all_reduce_(torch.zeros(1))

    run(2, rank_main)


def test_prepare_grows_the_staging_and_keeps_symmetric_tensors_alive() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        kept = tp.empty(5000, dtype=torch.float32).fill_(1.0)
        dropped = tp.empty(5000, dtype=torch.float32)
        if tp.rank == 0:  # released on one rank only: the numbers of regions must not run apart
            del dropped
            gc.collect()
        before = tp.all_reduce(torch.ones(100_000))
        tp.prepare("all_reduce", dtype=torch.float32, max_bytes=400_000)
        assert torch.equal(tp.all_reduce(torch.ones(100_000)), before)
        assert tp.all_reduce_(kept)[0].item() == 2.0
        late = tp.empty(5000, dtype=torch.float32).fill_(3.0)
        assert tp.all_reduce_(late)[-1].item() == 6.0

    run(2, rank_main, chunk_bytes=65536)


def test_prepare_with_different_arguments_raises_on_all_ranks_and_harms_nothing() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        with pytest.raises(errors.MismatchError, match="rank 0 has max_bytes=1000; rank 1 has max_bytes=1001"):
            tp.prepare("all_reduce", dtype=torch.float32, max_bytes=1000 + tp.rank)
        with pytest.raises(errors.MismatchError, match="arguments of empty"):
            tp.empty(4 + tp.rank)
        assert tp.all_reduce(torch.ones(1)).item() == 2.0

    run(2, rank_main)


def test_symmetric_tensors_outlive_their_communicator() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        x = tp.empty(1000, dtype=torch.float32).fill_(2.0)
        tp.all_reduce_(x)
        tp.close()
        assert x.sum().item() == 4000.0
        with pytest.raises(errors.CommunicatorError, match="is closed"):
            tp.all_reduce_(x)

    run(2, rank_main)


def test_overlapping_groups_have_segments_of_their_own() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        pairs = [plane.communicator("pair", g) for g in ([0, 1], [1, 2], [2, 0]) if plane.rank in g]
        for _ in range(20):
            assert tp.all_reduce(torch.tensor([2.0**plane.rank])).item() == 7.0
            for pair in pairs:
                wanted = sum(2.0**r for r in pair.ranks)
                assert pair.all_reduce(torch.tensor([2.0**plane.rank])).item() == wanted

    run(3, rank_main)


def test_a_group_of_one_rank_runs_on_torch() -> None:
    def rank_main(plane: Plane) -> None:
        alone = plane.communicator("alone", [plane.rank])
        assert alone.plan.backends == ("torch",)
        assert alone.all_reduce(torch.tensor([5.0])).item() == 5.0

    run(2, rank_main)


class CannotBuild:
    """A plugin of the site whose workspace fails on rank 1, after custom_ar has built its own."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    @hookimpl
    def commplane_init_workspace(self, communicator: Communicator, requirements: Any) -> list[Any]:
        if self.rank == 1:
            raise MemoryError("nothing left")
        return []


def test_a_prepare_that_is_rolled_back_leaves_everything_as_it_was() -> None:
    def plugins(rank: int) -> PluginHost:
        made = host()
        made.register(CannotBuild(rank), "zz_site")
        return made

    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        x = tp.empty(1000, dtype=torch.float32)
        for _ in range(2):
            with pytest.raises(errors.CommunicatorError, match="rolled back on all ranks: rank 1: MemoryError: nothing left"):
                tp.prepare("all_reduce", dtype=torch.float32, max_bytes=1 << 20)
            assert tp.all_reduce_(x.fill_(1.0))[0].item() == 2.0
            assert tp.all_reduce(torch.ones(9999))[-1].item() == 2.0

    out = run_threads(2, rank_main, plugins=plugins, config=lambda _rank: {"timeout": 30}, timeout=60)
    assert out == [None, None], out


def test_one_rank_that_cannot_map_fails_the_call_on_all_at_once_and_the_next_call_works(monkeypatch: pytest.MonkeyPatch) -> None:
    real = _native.Segment.map
    failed: list[str] = []

    def fails_once(*args: Any) -> Any:
        if armed and threading.current_thread().name == "rank 1" and not failed:
            failed.append("once")
            raise OSError("no more descriptors")
        return real(*args)

    armed: list[bool] = []
    monkeypatch.setattr(_native.Segment, "map", staticmethod(fails_once))

    def rank_main(plane: Plane) -> float:
        tp = plane.communicator("tp")
        tp.barrier()
        armed.append(True)
        with pytest.raises(errors.CommunicatorError, match="rank 1: OSError: no more descriptors"):
            tp.empty(100, dtype=torch.float32)
        return tp.all_reduce_(tp.empty(100, dtype=torch.float32).fill_(1.0))[0].item()

    # A deadline that the test would not survive: nobody may sit it out.
    out = run_threads(2, rank_main, plugins=lambda _rank: host(), config=lambda _rank: {"timeout": 300}, timeout=60)
    assert out == [2.0, 2.0], out


def test_impossible_shapes_are_refused_before_anybody_waits() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        for shape in [(-1,), (2.5,), ("x",)]:
            with pytest.raises(errors.UnsupportedOperation, match="empty wants"):
                tp.empty(*shape)
        assert tp.empty(torch.tensor(3), 2).shape == (3, 2)

    run(2, rank_main)


def test_layouts_that_hold_no_plain_numbers_are_refused_or_resolved() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        with pytest.raises(errors.UnsupportedOperation, match="wanted a dense tensor"):
            tp.all_reduce(torch.eye(3).to_sparse())
        for call in (tp.all_reduce_, tp.broadcast):
            with pytest.raises(errors.UnsupportedOperation, match="can be written in place, found one expanded"):
                call(torch.ones(1).expand(3))
        assert tp.all_reduce(torch.ones(1).expand(3)).tolist() == [2.0, 2.0, 2.0]
        negative = torch.tensor([3.0 + 4.0j], dtype=torch.complex64).conj().imag
        assert negative.is_neg() and tp.all_reduce(negative).item() == -8.0
        assert tp.all_reduce(torch.ones(1)).item() == 2.0

    run(2, rank_main)


def test_a_failed_capture_reaches_ranks_that_wait_in_any_communicator() -> None:
    def rank_main(plane: Plane) -> str:
        plane.communicator("a")
        b = plane.communicator("b")
        try:
            with plane.capture():
                if plane.rank == 1:
                    raise ValueError("out of luck")
                b.all_reduce(torch.ones(3))
        except (ValueError, errors.CommplaneError) as error:
            return str(error)
        return ""

    # Rank 0 waits in b while rank 1 leaves: not for the deadline, which is longer than the test.
    out = run_threads(2, rank_main, plugins=lambda _rank: host(), config=lambda _rank: {"timeout": 300}, timeout=60)
    assert out[1] == "out of luck" and "rank 1 gave up" in str(out[0]), out
