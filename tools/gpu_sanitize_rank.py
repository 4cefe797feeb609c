"""One rank of `gpu_sanitize.py`: every kernel of the native library once, without torch. Prints "all right" at the end.

python tools/gpu_sanitize_rank.py RANK FOLDER    both ranks at once, on devices 0 and 1; FOLDER holds the page of control
"""

from __future__ import annotations

import array
import ctypes
import mmap
import sys
import time
from collections.abc import Callable
from pathlib import Path

from commplane_custom_ar import _native
from commplane_custom_ar._native import check
from commplane_custom_ar.codes import DTYPES
from commplane_custom_ar.cuda.comm import CudaComm, DeviceMemory, device_info
from commplane_custom_ar.cuda.tuned import Choice

RANKS = 2
WAIT_S = 120.0
COUNTS = [1, 7, 1000, 4096, 20_003]
FLOAT32 = DTYPES["float32"]


class Driver:
    """Copies and waits, by the CUDA driver: the library has its runtime inside."""

    def __init__(self, device: int) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._check(self._cuda.cuInit(0), "cuInit")
        which, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._check(self._cuda.cuDeviceGet(ctypes.byref(which), device), "cuDeviceGet")
        self._check(self._cuda.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), which), "cuDevicePrimaryCtxRetain")

    def _check(self, status: int, what: str) -> None:
        if status:
            raise RuntimeError(f"{what}: CUDA driver error {status}")

    def _enter(self) -> None:
        self._check(self._cuda.cuCtxSetCurrent(self._context), "cuCtxSetCurrent")

    def write(self, at: int, numbers: array.array[float]) -> None:
        """Host to device."""
        self._enter()
        address, nbytes = numbers.buffer_info()[0], len(numbers) * numbers.itemsize
        done = self._cuda.cuMemcpyHtoD_v2(ctypes.c_uint64(at), ctypes.c_void_p(address), ctypes.c_size_t(nbytes))
        self._check(done, "cuMemcpyHtoD")

    def read(self, at: int, count: int) -> list[float]:
        """Device to host."""
        self._enter()
        out = array.array("f", bytes(4 * count))
        address, nbytes = out.buffer_info()[0], 4 * count
        done = self._cuda.cuMemcpyDtoH_v2(ctypes.c_void_p(address), ctypes.c_uint64(at), ctypes.c_size_t(nbytes))
        self._check(done, "cuMemcpyDtoH")
        return list(out)

    def wait(self) -> None:
        """Until the device is idle."""
        self._enter()
        self._check(self._cuda.cuCtxSynchronize(), "cuCtxSynchronize")


def exchange(folder: Path, rank: int, what: str, mine: bytes) -> list[bytes]:
    """What each rank says, through files."""
    part = folder / f"{what}-{rank}.part"
    part.write_bytes(mine)
    part.rename(folder / f"{what}-{rank}")
    deadline = time.monotonic() + WAIT_S
    paths = [folder / f"{what}-{r}" for r in range(RANKS)]
    while not all(path.exists() for path in paths):
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {rank}: {what} of the other rank did not come within {WAIT_S} s")
        time.sleep(0.01)
    return [path.read_bytes() for path in paths]


def values(rank: int, count: int) -> list[float]:
    """Small integers: sums are exact."""
    return [float(i % 31 + rank) for i in range(count)]


def main(rank: int, folder: Path) -> None:
    """Open, call, compare, close. Collective over both processes."""
    native, memory, driver = _native.load("ctypes"), DeviceMemory(_native.load("ctypes"), rank), Driver(rank)
    nbytes = 4 * RANKS * max(COUNTS) + 512
    symmetric, handle = memory.allocate(nbytes)
    out, _ = memory.allocate(nbytes)
    scratch, _ = memory.allocate(nbytes)
    multiprocessors, _ = device_info(native, rank)
    with (folder / "control").open("r+b") as file:
        page = mmap.mmap(file.fileno(), 4096)
    control = ctypes.addressof(ctypes.c_char.from_buffer(page))
    comm = CudaComm(
        native,
        device=rank,
        rank=rank,
        world_size=RANKS,
        multiprocessors=multiprocessors,
        timeout_s=WAIT_S,
        control=control,
    )
    comm.connect(exchange(folder, rank, "memory", comm.exported))
    theirs = exchange(folder, rank, "symmetric", handle)
    bases = [symmetric if r == rank else memory.open(theirs[r]) for r in range(RANKS)]
    comm.register(bases, nbytes, 1)

    def expect(what: object, at: int, wanted: list[float]) -> None:
        driver.wait()
        if comm.fault():
            raise RuntimeError(f"rank {rank}: {what}: a kernel gave up: {comm.detail()}")
        if driver.read(at, len(wanted)) != wanted:
            raise RuntimeError(f"rank {rank}: {what}: wrong result")

    def fill(at: int, count: int) -> None:
        driver.write(at, array.array("f", values(rank, count)))

    calls = 0

    def call(function: Callable[..., int], *arguments: object) -> None:
        nonlocal calls
        check(function(comm.handle, *arguments, 0))
        calls += 1

    for algorithm in ("one_shot_push", "two_shot_push", "one_shot_pull", "two_shot_pull"):
        pull = algorithm.endswith("_pull")
        comm.choose([Choice(None, algorithm)], readable=pull, capturing=False)
        for count in COUNTS:
            total = [a + b for a, b in zip(values(0, count), values(1, count), strict=True)]
            source = symmetric if pull else scratch
            if algorithm != "two_shot_pull":
                fill(source, count)
                call(native.cuda_all_reduce, source, out, count, FLOAT32)
                expect((algorithm, count, "out of place"), out, total)
            if algorithm != "one_shot_pull":
                fill(source, count)
                call(native.cuda_all_reduce, source, source, count, FLOAT32)
                expect((algorithm, count, "in place"), source, total)
            if not pull:  # not aligned to a vector
                fill(source + 4, count)
                call(native.cuda_all_reduce, source + 4, out + 4, count, FLOAT32)
                expect((algorithm, count, "misaligned"), out + 4, total)
        if pull:
            comm.choose([], readable=True, capturing=False)
    for count in COUNTS:
        rows = [values(r, count) for r in range(RANKS)]
        fill(scratch, count)
        call(native.cuda_all_gather, scratch, out, count, FLOAT32)
        expect(("all_gather", count), out, rows[0] + rows[1])
        whole = [values(r, RANKS * count) for r in range(RANKS)]
        fill(scratch, RANKS * count)
        call(native.cuda_reduce_scatter, scratch, out, count, FLOAT32)
        part = slice(rank * count, (rank + 1) * count)
        expect(("reduce_scatter", count), out, [a + b for a, b in zip(whole[0][part], whole[1][part], strict=True)])
        for root in range(RANKS):
            fill(scratch, count)
            driver.wait()
            check(native.cuda_broadcast(comm.handle, scratch, count, FLOAT32, root, 0))
            expect(("broadcast", count, root), scratch, rows[root])
    call(native.cuda_barrier)
    norm(native, comm, driver, memory, rank)
    driver.wait()
    if comm.fault():
        raise RuntimeError(f"rank {rank}: a kernel gave up: {comm.detail()}")
    comm.unregister(1)
    for r, base in enumerate(bases):
        if r != rank:
            memory.close(base)
    exchange(folder, rank, "closed", b"1")
    comm.close()
    for address in (symmetric, out, scratch):
        memory.free(address)
    print(f"rank {rank}: {calls} calls and the norm, all right", flush=True)


def norm(native: _native.Native, comm: CudaComm, driver: Driver, memory: DeviceMemory, rank: int) -> None:
    """The fused kernel, for some widths: rows of which the sums are exact."""
    rows, widest = 3, 4096
    addresses = [memory.allocate(4 * rows * widest)[0] for _ in range(5)]
    x, residual, weight, out, rest = addresses
    for hidden in (64, 100, widest):
        driver.write(x, array.array("f", [float(rank + 1)] * (rows * hidden)))
        driver.write(residual, array.array("f", [1.0] * (rows * hidden)))
        driver.write(weight, array.array("f", [2.0] * hidden))
        check(native.cuda_all_reduce_rms_norm(comm.handle, x, residual, weight, out, rest, rows, hidden, FLOAT32, 0.0, 0.0, 0))
        driver.wait()
        if comm.fault():
            raise RuntimeError(f"rank {rank}: norm of {hidden}: a kernel gave up: {comm.detail()}")
        if driver.read(rest, rows * hidden) != [4.0] * (rows * hidden):
            raise RuntimeError(f"rank {rank}: norm of {hidden}: wrong residual")
        if any(abs(value - 2.0) > 1e-5 for value in driver.read(out, rows * hidden)):
            raise RuntimeError(f"rank {rank}: norm of {hidden}: wrong norm")
    for address in addresses:
        memory.free(address)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
