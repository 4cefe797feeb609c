# SPDX-License-Identifier: Apache-2.0
"""How fast the native half is from Python: `python tests/test_native_bench.py [--binding ctypes] [--json]`.

Two processes (or --ranks), one a core, median microseconds a call over rounds in which all sizes take turns. Data is in
plain memory (staged) or in a symmetric region, in place. As a test it only checks that the bench itself still runs.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing as mp
import os
import statistics
import time
from typing import Any

SIZES = (64, 1 << 10, 8 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
STAGING = 1 << 20


def _worker(rank: int, world: int, name: str, config: dict[str, Any], results: Any) -> None:
    import ctypes

    from commplane_custom_ar import _native as n
    from commplane_custom_ar import codes

    native = n.load(config["binding"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    most = max(config["sizes"])
    where = n.layout(world, STAGING)
    segment = n.Segment.map(name, where.total, where.offsets[rank], where.part_bytes)
    comm = n.Comm(
        segment,
        rank=rank,
        world_size=world,
        staging_bytes=STAGING,
        chunk_bytes=config["chunk"],
        oversubscribed=world > len(cores),
        timeout_s=30.0,
    )
    shared = n.Segment.map(name + "-sym", most * world, rank * most, most)
    comm.register_symmetric(shared.base, most, most, 1)
    private = mmap.mmap(-1, most)
    buffers = {"staged": ctypes.addressof(ctypes.c_char.from_buffer(private)), "symmetric": shared.base + rank * most}
    for address in buffers.values():
        ctypes.memset(address, 0, most)
    table: dict[str, list[float]] = {}
    handle, call, clock = comm.handle, native.all_reduce, time.perf_counter_ns
    for round_number in range(config["rounds"] + 1):
        for path, address in buffers.items():
            for dtype, item in (("float32", 4), ("bfloat16", 2)):
                for size in config["sizes"]:
                    count, kind = size // item, codes.DTYPES[dtype]
                    repeat = max(2, min(config["repeat"], (64 << 20) // max(size, 1)))
                    n.check(n.barrier(handle))
                    begin = clock()
                    for _ in range(repeat):
                        status = call(handle, address, address, count, kind, 1)
                    taken = (clock() - begin) / repeat / 1000
                    n.check(status)
                    if round_number > 0:
                        table.setdefault(f"{path} {dtype} {size}", []).append(taken)
    begin = clock()
    for _ in range(20000):
        call(0, 0, 0, 0, 1, 1)
    noop = (clock() - begin) / 20000
    n.check(n.barrier(handle))
    comm.close()
    if rank == 0:
        medians = {key: statistics.median(values) for key, values in table.items()}
        results.put({"binding": native.binding, "isa": n.isa(), "noop_ns": noop, "us": medians})


def bench(
    binding: str = "auto",
    *,
    world: int = 2,
    sizes: tuple[int, ...] = SIZES,
    rounds: int = 7,
    repeat: int = 2000,
    chunk: int = 0,
) -> dict[str, Any]:
    """Run it and return medians in microseconds by "path dtype bytes"."""
    from commplane_custom_ar import _native as n

    name = f"commplane-bench-{os.getpid()}"
    n.Segment.create(name, n.layout(world, STAGING).total)
    n.Segment.create(name + "-sym", max(sizes) * world)
    context = mp.get_context("spawn")
    results = context.Queue()
    config = {"binding": binding, "sizes": sizes, "rounds": rounds, "repeat": repeat, "chunk": chunk}
    workers = [context.Process(target=_worker, args=(rank, world, name, config, results)) for rank in range(world)]
    try:
        for worker in workers:
            worker.start()
        answer: dict[str, Any] = results.get(timeout=300)
        for worker in workers:
            worker.join(timeout=60)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
        n.Segment.unlink(name)
        n.Segment.unlink(name + "-sym")
    return answer


def test_bench_runs() -> None:
    answer = bench(sizes=(64, 4096), rounds=1, repeat=20)
    assert answer["us"]["staged float32 64"] > 0
    assert answer["us"]["symmetric bfloat16 4096"] > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binding", default="auto", choices=["auto", "abi3", "ctypes"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--chunk", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    answer = bench(arguments.binding, world=arguments.ranks, rounds=arguments.rounds, chunk=arguments.chunk)
    if arguments.json:
        print(json.dumps(answer, indent=1))
        return
    print(f"{answer['binding']}, {answer['isa']}, a call that does nothing: {answer['noop_ns']:.0f} ns; us a call:")
    print(f"{'':20}" + "".join(f"{size:>10}" for size in SIZES))
    for path in ("staged", "symmetric"):
        for dtype in ("float32", "bfloat16"):
            row = [answer["us"][f"{path} {dtype} {size}"] for size in SIZES]
            print(f"{path + ' ' + dtype:20}" + "".join(f"{value:>10.2f}" for value in row))


if __name__ == "__main__":
    main()
