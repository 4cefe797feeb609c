# SPDX-License-Identifier: Apache-2.0
"""The process that touches GPUs for `proof`: one a rank, started fresh, killed if it hangs.

It does what its parent says, one line of JSON at a time over a socket, and answers with one. Before it touches a peer's memory it
says whose, so that the parent of one that hangs knows where. It ends with its parent, and makes no decision.
"""

from __future__ import annotations

import ctypes
import json
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from commplane_custom_ar.gpu.driver import Driver, DriverError
from commplane_custom_ar.gpu.memory import GpuMemory, GpuMemoryError

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


class _Rank:
    """What one rank's child holds. A place is the part of every rank's memory that one rank writes to."""

    def __init__(self, channel: Any, job: Mapping[str, Any]) -> None:
        self._channel = channel
        self._rank: int = job["rank"]
        self._words: int = job["words"]
        self._size: int = job["world_size"]
        _same_gpu(job["ordinal"], job["uuid"])
        self._memory = GpuMemory(job["library"], job["ordinal"])
        self._own = 0
        self._at: dict[int, int] = {}

    def _say(self, what: Mapping[str, Any]) -> None:
        self._channel.write(json.dumps(what) + "\n")
        self._channel.flush()

    def _place(self, memory: int, writer: int) -> int:
        return memory + writer * self._words * 4

    def allocate(self) -> dict[str, Any]:
        """Own memory, with a place for each rank."""
        self._own, handle = self._memory.allocate(self._size * self._words * 4)
        self._at[self._rank] = self._own
        return {"handle": handle.hex()}

    def open(self, handles: Sequence[str]) -> dict[str, Any]:
        """Every peer's memory; a peer that cannot be opened is named, and the others are opened all the same."""
        refused: dict[int, str] = {}
        for peer, handle in enumerate(handles):
            if peer == self._rank:
                continue
            self._say({"at": peer})
            try:
                self._at[peer] = self._memory.open(bytes.fromhex(handle))
            except GpuMemoryError as error:
                refused[peer] = str(error)
        return {"refused": refused}

    def write(self, value: int) -> dict[str, Any]:
        """`value` and what follows it into this rank's place everywhere."""
        for peer, memory in sorted(self._at.items()):
            self._say({"at": peer})
            self._memory.poke(self._place(memory, self._rank), self._words, value)
        return {}

    def verify(self, values: Sequence[int]) -> dict[str, Any]:
        """Words that are wrong: in own memory by who wrote them, and in peers' memory by whose it is, as read from here."""
        written = {w: self._memory.peek(self._place(self._own, w), self._words, value) for w, value in enumerate(values)}
        read: dict[int, int] = {}
        for peer, memory in sorted(self._at.items()):
            if peer != self._rank:
                self._say({"at": peer})
                read[peer] = self._memory.peek(self._place(memory, peer), self._words, values[peer])
        return {"written": {w: n for w, n in written.items() if n}, "read": {p: n for p, n in read.items() if n}}

    def close(self) -> dict[str, Any]:
        """Peers' memory is given back; own memory may still be open elsewhere and goes with the process."""
        for peer, memory in sorted(self._at.items()):
            if peer != self._rank:
                self._memory.close(memory)
        self._at.clear()
        return {}

    def free(self) -> dict[str, Any]:
        """Own memory is given back; every peer has closed it."""
        self._memory.free(self._own)
        return {}

    def serve(self, commands: Any) -> None:
        """Until the parent says no more."""
        self._say({"answer": {}})
        for line in commands:
            order = json.loads(line)
            try:
                answer = getattr(self, order["do"])(*order["with"])
            except GpuMemoryError as error:
                self._say({"failed": str(error)})
            else:
                self._say({"answer": answer})


def _same_gpu(ordinal: int, uuid: str) -> None:
    """The ordinal is the same GPU here as in the parent, which may have started CUDA under another environment."""
    driver = Driver()
    found = f"GPU-{driver.uuid(ordinal)[0]}" if ordinal < driver.count else "nothing"
    if found != uuid:
        raise DriverError(
            f"cuda:{ordinal} is {uuid} in the rank and {found} in its child process: set CUDA_VISIBLE_DEVICES before CUDA is used"
        )


def main(argv: Sequence[str]) -> int:
    """``proof_child FD JOB``: the number of the socket, and the job as JSON."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with socket.socket(fileno=int(argv[0])) as link, link.makefile("rw", encoding="utf-8") as channel:
        try:
            rank = _Rank(channel, json.loads(argv[1]))
        except (DriverError, GpuMemoryError) as error:
            channel.write(json.dumps({"failed": str(error)}) + "\n")
            return 1
        rank.serve(channel)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
