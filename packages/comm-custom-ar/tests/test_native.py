# SPDX-License-Identifier: Apache-2.0
"""The native half through `_native.py`, with real processes as ranks and both bindings. Uses no torch."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing as mp
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from commplane_custom_ar import _native, codes

STAGING = 16384
CHUNK = 4096
REGION = 1 << 16
BINDINGS = ("ctypes", "abi3")
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
_numbers = itertools.count()


def _abi3_or_skip(binding: str) -> str:
    if binding == "abi3":
        try:
            _native.load("abi3")
        except _native.NativeLibraryError as error:
            pytest.skip(f"this build has no abi3 binding: {error}")
    return binding


@pytest.fixture(params=BINDINGS)
def binding(request: pytest.FixtureRequest) -> str:
    return _abi3_or_skip(request.param)


def _names() -> set[str]:
    return set(os.listdir("/dev/shm"))


@pytest.fixture(autouse=True)
def shared_memory_as_before() -> Iterator[None]:
    before = {name for name in _names() if f"-{os.getpid()}-" in name}
    yield
    left = {name for name in _names() if f"-{os.getpid()}-" in name} - before
    assert not left, f"left in /dev/shm: {left}"


# --- ranks as processes ------------------------------------------------------------------------------------------------


class Rank:
    """One process's end: segment, communicator, and a registered symmetric region."""

    def __init__(self, rank: int, world: int, name: str, binding: str, timeout_s: float) -> None:
        from commplane_custom_ar import _native as native

        self.hot = native.load(binding)
        assert self.hot.binding == binding
        self.n, self.rank, self.world = native, rank, world
        where = native.layout(world, STAGING)
        self.segment = native.Segment.map(name, where.total, where.offsets[rank], where.part_bytes)
        self.region = native.Segment.map(name + "-sym", REGION * world, rank * REGION, REGION)
        self.comm = native.Comm(
            self.segment,
            rank=rank,
            world_size=world,
            staging_bytes=STAGING,
            chunk_bytes=CHUNK,
            oversubscribed=world > len(os.sched_getaffinity(0)),
            timeout_s=timeout_s,
        )
        self.comm.register_symmetric(self.region.base, REGION, REGION, 1)
        self.own = self.region.base + rank * REGION

    def reduce(self, source: int, target: int, count: int, dtype: str = "float32", op: str = "sum") -> int:
        return self.hot.all_reduce(self.comm.handle, source, target, count, codes.DTYPES[dtype], codes.OPS[op])

    def close(self) -> None:
        self.comm.close()
        self.comm.close()
        self.region.close()
        self.segment.close()


def _process(body: Callable[[Rank], Any], rank: int, world: int, name: str, binding: str, timeout_s: float, results: Any) -> None:
    try:
        self = Rank(rank, world, name, binding, timeout_s)
        answer = body(self)
        self.close()
        results.put((rank, answer, None))
    except BaseException as error:
        results.put((rank, None, f"{type(error).__name__}: {error}"))
        raise


def run(
    body: Callable[[Rank], Any], binding: str, world: int = 2, timeout_s: float = 30.0, dead: tuple[int, ...] = ()
) -> list[Any]:
    """Run `body` on `world` processes and return its answers by rank; ranks in `dead` answer nothing."""
    name = f"commplane-native-{os.getpid()}-{next(_numbers)}"
    _native.Segment.create(name, _native.layout(world, STAGING).total)
    _native.Segment.create(name + "-sym", REGION * world)
    context = mp.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=_process, args=(body, rank, world, name, binding, timeout_s, results)) for rank in range(world)
    ]
    answers: dict[int, Any] = {}
    try:
        for worker in workers:
            worker.start()
        for _ in range(world - len(dead)):
            rank, answer, error = results.get(timeout=120)
            assert error is None, f"rank {rank}: {error}"
            answers[rank] = answer
        for worker in workers:
            worker.join(timeout=60)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
                worker.join()
        _native.Segment.unlink(name)
        _native.Segment.unlink(name + "-sym")
    return [answers.get(rank) for rank in range(world)]


# --- numbers, by Python alone --------------------------------------------------------------------------------------------


def _f32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _encode(values: list[float], dtype: str) -> bytes:
    if dtype == "bfloat16":  # exact inputs only
        return b"".join(struct.pack("<f", value)[2:] for value in values)
    return struct.pack(f"<{len(values)}{'f' if dtype == 'float32' else 'e'}", *values)


def _round_bf16(value: float) -> bytes:
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    low, rest = bits & 0xFFFF, bits >> 16
    if low > 0x8000 or (low == 0x8000 and rest & 1):
        rest += 1
    return struct.pack("<H", rest)


def _wanted(rows: list[list[float]], dtype: str, op: str) -> bytes:
    results = []
    for column in zip(*rows, strict=True):
        value = column[0]
        for other in column[1:]:
            value = min(value, other) if op == "min" else max(value, other) if op == "max" else _f32(value + other)
        results.append(_f32(value / len(column)) if op == "avg" else value)
    return b"".join(_round_bf16(value) for value in results) if dtype == "bfloat16" else _encode(results, dtype)


def _inputs(rank: int, count: int) -> list[float]:
    return [((i * 37 + rank * 11) % 251 - 120) / 4.0 for i in range(count)]


# --- tests ---------------------------------------------------------------------------------------------------------------


def _correct_body(self: Rank) -> str:
    """Every dtype, op, path and a few counts; the digest of all results has to be equal on all ranks."""
    import hashlib

    digest = hashlib.sha256()
    for dtype, item in (("float32", 4), ("float16", 2), ("bfloat16", 2)):
        chunk = CHUNK // item
        for op, count in itertools.product(("sum", "min", "max", "avg"), (0, 1, 7, chunk, chunk + 1, 3 * chunk + 3)):
            rows = [_inputs(rank, count) for rank in range(self.world)]
            wanted, mine = _wanted(rows, dtype, op), _encode(rows[self.rank], dtype)
            for symmetric, in_place in itertools.product((False, True), (False, True)):
                private = ctypes.create_string_buffer(max(1, len(mine)) + 8)
                result = ctypes.create_string_buffer(max(1, len(mine)) + 8)
                source = self.own + 64 if symmetric else ctypes.addressof(private)
                target = source if in_place else ctypes.addressof(result)
                ctypes.memmove(source, mine, len(mine))
                self.n.check(self.reduce(source, target, count, dtype, op))
                got = ctypes.string_at(target, len(mine))
                assert got == wanted, (dtype, op, count, symmetric, in_place)
                digest.update(got)
    return digest.hexdigest()


@pytest.mark.parametrize("world", [2, 3])
def test_results_on_processes(binding: str, world: int) -> None:
    assert len(set(run(_correct_body, binding, world))) == 1


def _others_body(self: Rank) -> list[Any]:
    """The other collectives, staged and symmetric, over more than a chunk; each answer is what every rank is to see."""
    count, item, handle, world = 3 * CHUNK // 4 + 5, 4, self.comm.handle, self.world
    code, mine = codes.DTYPES["int32"], [1000 * self.rank + i for i in range(world * count)]
    wide = world * count * item
    private, result = ctypes.create_string_buffer(wide), ctypes.create_string_buffer(wide)
    target = ctypes.addressof(result)
    answers: list[Any] = []
    for source in (ctypes.addressof(private), self.own):
        ctypes.memmove(source, struct.pack(f"<{len(mine)}i", *mine), wide)
        self.n.check(self.hot.all_gather(handle, source, target, count, code))
        gathered = struct.unpack(f"<{len(mine)}i", result.raw)
        assert gathered == tuple(1000 * r + i for r in range(world) for i in range(count))
        self.n.check(self.hot.reduce_scatter(handle, source, target, count, code, codes.OPS["max"]))
        scattered = struct.unpack_from(f"<{count}i", result.raw)
        assert scattered == tuple(1000 * (world - 1) + self.rank * count + i for i in range(count))
        self.n.check(self.hot.broadcast(handle, source, count, code, world - 1))
        answers += [gathered, struct.unpack(f"<{count}i", ctypes.string_at(source, count * item))]
        assert answers[-1] == tuple(1000 * (world - 1) + i for i in range(count))
    return answers


def _norm_body(self: Rank) -> bytes:
    """Rows of 1 and 7 in turn, made up of the ranks' parts and the residual; their mean square is 25, so the norm is known."""
    hidden, rows = 64, 40  # more than a chunk
    new = [1.0, 7.0] * (hidden // 2) * rows
    mine = struct.pack(f"<{len(new)}f", *([2.0 + self.rank] * len(new)))
    summed = sum(2.0 + r for r in range(self.world))
    residual = struct.pack(f"<{len(new)}f", *(v - summed for v in new))
    weight = struct.pack(f"<{hidden}f", *([5.0] * hidden))
    buffers = [ctypes.create_string_buffer(data, len(data)) for data in (residual, weight)]
    outs = [ctypes.create_string_buffer(len(mine)) for _ in range(2)]
    private = ctypes.create_string_buffer(mine, len(mine))
    ctypes.memmove(self.own, mine, len(mine))
    answers = set()
    for source in (ctypes.addressof(private), self.own):
        pointers = [ctypes.addressof(b) for b in (*buffers, *outs)]
        code = codes.DTYPES["float32"]
        status = self.hot.all_reduce_rms_norm(self.comm.handle, source, *pointers, rows, hidden, code, 0.0, 5.0)
        self.n.check(status)
        assert struct.unpack(f"<{len(new)}f", outs[1].raw) == tuple(new)
        norm = struct.unpack(f"<{len(new)}f", outs[0].raw)
        assert all(abs(got - v * 2.0) <= abs(v) * 1e-6 for got, v in zip(norm, new, strict=True))
        answers.add(outs[0].raw)
    assert len(answers) == 1
    return answers.pop()


@pytest.mark.parametrize("world", [2, 3])
def test_the_other_collectives_on_processes(binding: str, world: int) -> None:
    first, *rest = run(_others_body, binding, world)
    assert all(answer == first for answer in rest)
    assert len(set(run(_norm_body, binding, world))) == 1


def _isa_body(self: Rank) -> dict[str, bytes]:
    """Random bits, each vector code in turn, staged and symmetric."""
    import random

    count = 5000
    found: dict[str, bytes] = {}
    data = random.Random(self.rank).randbytes(count * 4)
    for isa in ISAS:
        try:
            self.n.set_isa(isa)
        except self.n.NativeError:
            continue
        assert self.n.isa() == isa
        for dtype, item in (("float32", 4), ("float16", 2), ("bfloat16", 2)):
            for op in codes.OPS:
                private = ctypes.create_string_buffer(data[: count * item], count * item)
                ctypes.memmove(self.own, data, count * item)
                self.n.check(self.reduce(ctypes.addressof(private), ctypes.addressof(private), count, dtype, op))
                self.n.check(self.reduce(self.own, self.own, count, dtype, op))
                assert private.raw == ctypes.string_at(self.own, count * item), (isa, dtype, op)
                key = f"{dtype} {op}"
                assert found.setdefault(key, private.raw) == private.raw, (isa, key)
    return found


def test_bits_do_not_depend_on_the_vector_code(binding: str) -> None:
    first, second = run(_isa_body, binding)
    assert first == second


def _mismatch_body(self: Rank) -> Any:
    buffer = ctypes.create_string_buffer(4096)
    address = ctypes.addressof(buffer)
    self.n.check(self.hot.barrier(self.comm.handle))
    status = self.reduce(address, address, 100 + self.rank, op="max")
    after = self.reduce(address, address, 1)
    return status, after, self.comm.detail(), self.n.last_error()


def test_mismatch_names_the_other_call(binding: str) -> None:
    for rank, (status, after, detail, text) in enumerate(run(_mismatch_body, binding)):
        assert (status, after) == (codes.EMISMATCH, codes.EPOISONED)
        assert detail.seq == 2
        assert detail.operation == f"all_reduce(max, float32, count={100 + rank})"
        assert detail.mismatched == {1 - rank: f"all_reduce(max, float32, count={101 - rank})"}
        assert "poisoned by EMISMATCH" in text


def _killed_body(self: Rank) -> Any:
    self.n.check(self.hot.barrier(self.comm.handle))
    if self.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    status = self.hot.barrier(self.comm.handle)
    return status, time.monotonic() - begin, self.comm.detail()


def test_killed_rank_is_named_long_before_the_deadline(binding: str) -> None:
    answers = run(_killed_body, binding, world=3, dead=(2,))
    for status, seconds, detail in answers[:2]:
        assert status in (codes.EPEERDEAD, codes.EABORTED)
        assert seconds < 20
        assert detail.missing == (2,)
        assert detail.dead == (2,)
        assert detail.operation == "barrier"
        assert detail.seq == 2
    assert any(status == codes.EPEERDEAD for status, _, _ in answers[:2])


def _abort_body(self: Rank) -> Any:
    if self.rank == 1:
        time.sleep(0.1)
        self.comm.abort()
    return self.hot.barrier(self.comm.handle), self.comm.detail().aborted


def test_abort_reaches_a_waiting_rank(binding: str) -> None:
    assert run(_abort_body, binding) == [(codes.EABORTED, (1,))] * 2


def _threads_body(self: Rank) -> float:
    """The GIL is free while a rank waits: another thread of it keeps running."""
    import threading

    ticks = 0
    stop = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    if self.rank == 1:
        time.sleep(0.5)
    before = ticks
    self.n.check(self.hot.barrier(self.comm.handle))
    during = ticks - before
    stop.set()
    thread.join()
    return during


def test_a_waiting_rank_releases_the_gil(binding: str) -> None:
    assert run(_threads_body, binding)[0] > 5


def test_closed_handles_are_errors_not_crashes(binding: str) -> None:
    native = _native.load(binding)
    where = _native.layout(2, STAGING)
    name = f"commplane-native-{os.getpid()}-{next(_numbers)}"
    _native.Segment.create(name, where.total)
    try:
        with pytest.raises(_native.NativeError, match="EEXIST"):
            _native.Segment.create(name, where.total)
        with pytest.raises(_native.NativeError, match="ESIZE"):
            _native.Segment.map(name, where.total + 4096)
        segment = _native.Segment.map(name, where.total, where.offsets[0], where.part_bytes)
    finally:
        _native.Segment.unlink(name)
    comm = _native.Comm(segment, rank=0, world_size=2, staging_bytes=STAGING, timeout_s=0.05)
    assert comm.chunk_bytes == STAGING // 4
    with pytest.raises(_native.NativeError, match="EBUSY"):
        segment.close()
    assert native.barrier(comm.handle) == codes.ETIMEDOUT
    assert comm.detail().missing == (1,)
    assert "rank 1 did not arrive" in (native.library.commplane_car_last_error() or b"").decode() or binding == "abi3"
    comm.close()
    assert native.barrier(comm.handle) == codes.ECLOSED
    assert native.all_reduce(comm.handle, 0, 0, 0, 1, 1) == codes.ECLOSED
    assert native.all_reduce(0, 0, 0, 0, 1, 1) == codes.EINVAL
    segment.close()
    segment.close()
    assert segment.base == 0
