# SPDX-License-Identifier: Apache-2.0
"""One rank of one candidate of field.py: set the library up, then time what the driver asks for. Started by field_group.py.

It talks to the driver over one socket, a JSON object a message, and is blocked on it while others have their turn: a library
whose ranks are idle takes no processor time from the one that is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import field_libraries
import torch

__all__ = ["main"]

Call = Callable[[], object]

_MESSAGE_BYTES = 1 << 16
_CHECKS = 3  # libraries with two buffers, or three states, use each of them


def main() -> int:
    """Serve the driver until it says so, or is gone."""
    parser = argparse.ArgumentParser(description="one rank of field.py, which starts it")
    parser.add_argument("library", choices=sorted(field_libraries.LIBRARIES))
    parser.add_argument("--socket", required=True)
    parser.add_argument("--max-bytes", required=True, type=int)
    options = parser.parse_args()
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel.connect(options.socket)
    _send(channel, {"pid": os.getpid()})
    try:
        library = field_libraries.LIBRARIES[options.library]()
        _send(channel, {"rank": library.rank, "about": library.about})
        _serve(channel, library, torch.zeros(options.max_bytes, dtype=torch.uint8))
        library.close()
    except Exception as error:
        traceback.print_exc()  # to the log that the driver keeps until the candidate has ended
        _send(channel, {"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def _send(channel: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the driver is gone, and nobody is left to tell
        channel.send(json.dumps(message).encode()[:_MESSAGE_BYTES])


def _serve(channel: socket.socket, library: field_libraries.Library, memory: torch.Tensor) -> None:
    """Answer until the driver closes the connection. Every request is collective over the ranks of the candidate."""
    home = os.sched_getaffinity(0)
    core = sorted(home)[library.rank % len(home)]
    calls: dict[tuple[str, int], Call] = {}
    while request := channel.recv(_MESSAGE_BYTES):
        asked = json.loads(request)
        step = (asked["dtype"], asked["bytes"])
        if asked["do"] == "prepare":
            refusal = library.refusal(step[0])
            if refusal is None:
                calls[step] = _prepare(library, memory[: step[1]].view(getattr(torch, step[0])))
            _send(channel, {"refusal": refusal})
        else:
            _place({core} if asked["pinned"] else home)
            times = take_turn(calls[step], asked["calls"])
            _send(channel, {"median_us": statistics.median(times), "mean_us": statistics.fmean(times)})


def _prepare(library: field_libraries.Library, tensor: torch.Tensor) -> Call:
    """The call for `tensor`, after it was seen to add up all ranks; the tensor is left as zeros, which stay zeros.

    The numbers are small enough that every partial sum is exact in bfloat16.

    Raises:
        RuntimeError: a sum is wrong, so there is nothing to compare with.
    """
    call, triangle = library.bind(tensor), library.ranks * (library.ranks + 1) // 2
    pattern = torch.arange(tensor.numel(), dtype=torch.int32) % (256 // triangle) + 1
    wanted = (pattern * triangle).to(tensor.dtype)
    for _ in repeat(None, _CHECKS):
        tensor.copy_(pattern * (library.rank + 1))
        call()
        if not torch.equal(tensor, wanted):
            raise RuntimeError(f"wrong sum of {tensor.numel()} elements of {tensor.dtype} over {library.ranks} ranks")
    tensor.zero_()
    return call


def take_turn(call: Call, calls: int) -> list[float]:
    """Microseconds of each of `calls` calls, after some that do not count and in which the ranks meet."""
    clock, stamps = time.perf_counter_ns, [0] * (calls + 1)
    gc.collect()
    gc.disable()
    try:
        for _ in repeat(None, max(1, calls // 10)):
            call()
        stamps[0] = clock()
        for i in range(1, calls + 1):
            call()
            stamps[i] = clock()
    finally:
        gc.enable()
    return [(b - a) / 1000 for a, b in pairwise(stamps)]


def _place(cores: Iterable[int]) -> None:
    """Keep every thread of this process on `cores`, those of the library too."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended since it was listed
            os.sched_setaffinity(int(task.name), cores)


if __name__ == "__main__":
    sys.exit(main())
