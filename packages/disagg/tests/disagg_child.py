"""One end in a process of its own, told what to do line by line: ``python disagg_child.py JSON``. For tests that kill it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from commplane.api.transfer import Moved, TransferContext, TransferEngine
from commplane_disagg.ends import Address, DecodeEnd, KvLayout, PrefillEnd, PrefillReplica
from commplane_disagg.ranks import Grid, Kv

KV = Kv(layers=2, heads=2)
LAYOUT = KvLayout.layer_major(pages=16, layers=(0, 2), heads=(0, 2), tokens=16, row=64)
ENGINES = {
    "shm": ("commplane_disagg.engines.shm:SharedMemory", ("quiet",)),
    "tcp": ("commplane_disagg.engines.tcp:Tcp", ("fenced",)),
    "nixl": ("commplane_disagg.engines.nixl:Nixl", ()),
    "mooncake": ("commplane_disagg.engines.mooncake:Mooncake", ()),
}
HURRY: dict[str, Any] = {"silence": 1.0, "lost_after": 0.5, "drain_timeout": 0.5, "beat": 0.1, "timeout": 15.0}
TOKEN = b"a token of the tests"


class Halves(TransferEngine):
    """A real engine that moves the first half of each transfer at once, and the second when `holding` ends."""

    def __init__(self, real: TransferEngine) -> None:
        self.real = real
        self.holding = True
        self.real_tickets: dict[int, tuple[int, bool]] = {}  # of the real engine -> (ours, whether it is the second half)
        self.waiting: dict[int, tuple[str, list[int], list[int], list[int]]] = {}
        self.tickets = 0
        self.ended: list[Moved] = []

    def submit(self, peer: str, local: Sequence[int], remote: Sequence[int], nbytes: int | Sequence[int]) -> int:
        sizes = [nbytes] * len(local) if isinstance(nbytes, int) else list(nbytes)
        half = len(sizes) // 2
        self.tickets += 1
        real = self.real.submit(peer, local[:half], remote[:half], sizes[:half])
        self.real_tickets[real] = self.tickets, False
        self.waiting[self.tickets] = peer, list(local[half:]), list(remote[half:]), sizes[half:]
        return self.tickets

    def poll(self, timeout: float = 0.0) -> list[Moved]:
        out, self.ended = self.ended, []
        for moved in self.real.poll(timeout):
            ticket, is_second = self.real_tickets.pop(moved.ticket)
            if is_second or moved.error is not None:
                self.waiting.pop(ticket, None)
                out.append(Moved(ticket, moved.error))
        busy = {ticket for ticket, _ in self.real_tickets.values()}
        for ticket in [t for t in self.waiting if not self.holding and t not in busy]:
            self.real_tickets[self.real.submit(*self.waiting.pop(ticket))] = ticket, True
        return out

    def cancel(self, ticket: int) -> None:
        busy = [real for real, (ours, _) in self.real_tickets.items() if ours == ticket]
        for real in busy:
            self.real.cancel(real)
        if self.waiting.pop(ticket, None) is not None and not busy:
            self.ended.append(Moved(ticket, "cancelled"))

    def disconnect(self, peer: str) -> None:
        for ticket in [t for t, (name, *_) in self.waiting.items() if name == peer]:
            self.cancel(ticket)
        self.real.disconnect(peer)

    def open(self, context: TransferContext) -> None:
        self.real.open(context)

    def allocate(self, nbytes: int) -> memoryview:
        return self.real.allocate(nbytes)

    def register(self, pool: memoryview) -> None:
        self.real.register(pool)

    def metadata(self) -> bytes:
        return self.real.metadata()

    def connect(self, peer: str, metadata: bytes) -> None:
        self.real.connect(peer, metadata)

    def close(self) -> None:
        self.real.close()


def make(side: str, engine: str, *, port: int = 0) -> tuple[Any, memoryview]:
    """An open end and its pool."""
    path, capabilities = ENGINES[engine]
    module, name = path.split(":")
    kind = PrefillEnd if side == "prefill" else DecodeEnd
    end = kind(
        name=side,
        kv=KV,
        grid=Grid(),
        rank=0,
        layout=LAYOUT,
        engine=Halves(getattr(import_module(module), name)()),
        engine_name=engine,
        capabilities=capabilities,
        token=TOKEN,
        port=port,
        connect_timeout=2.0,
        **HURRY,
    )
    return end, end.open()


def source(port: int) -> PrefillReplica:
    """The prefill end that listens there."""
    return PrefillReplica(Grid(), {0: Address("prefill", "127.0.0.1", port)})


def page(pool: memoryview, number: int) -> bytes:
    """The bytes of one page, over all layers and parts."""
    layer, part, step, _, _ = LAYOUT.strides
    starts = [i * layer + j * part + number * step for i in range(2) for j in range(2)]
    return b"".join(bytes(pool[s : s + step]) for s in starts)


def write_page(pool: memoryview, number: int, data: bytes) -> None:
    layer, part, step, _, _ = LAYOUT.strides
    for k, start in enumerate(i * layer + j * part + number * step for i in range(2) for j in range(2)):
        pool[start : start + step] = data[k * step : (k + 1) * step]


def contents(number: int) -> bytes:
    """What page `number` of a prefill pool holds."""
    return bytes((number * 31 + i * 7) % 251 for i in range(LAYOUT.page_bytes))


class Child:
    """The other process, seen from the test."""

    def __init__(self, side: str, engine: str, *, port: int = 0, peer_port: int = 0) -> None:
        job = {"side": side, "engine": engine, "port": port, "peer_port": peer_port}
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=False, bufsize=0
        )
        self.said: list[dict[str, Any]] = []
        self._rest = b""
        self.port = 0

    def tell(self, **what: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what).encode() + b"\n")

    def hear(self, timeout: float = 0.0) -> list[dict[str, Any]]:
        """All that it has said, and what it says within `timeout`."""
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        while select.select([fd], [], [], timeout)[0]:
            data = os.read(fd, 1 << 16)
            if not data:
                break
            *lines, self._rest = (self._rest + data).split(b"\n")
            self.said += [json.loads(line) for line in lines]
            timeout = 0.0
        self.port = next((s["port"] for s in self.said if "port" in s), 0)
        return self.said

    def has_said(self, **what: Any) -> bool:
        return any(what.items() <= said.items() for said in self.hear())

    def signal(self, number: int) -> None:
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)
        elif number == signal.SIGKILL:
            self.process.wait()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def wait_for(done: Callable[[], Any], step: Callable[[], Any], deadline: float = 12.0) -> None:
    until = time.monotonic() + deadline
    while not done():
        assert time.monotonic() < until
        step()


def _lines() -> Iterator[dict[str, Any]]:
    rest = b""
    while True:
        while select.select([0], [], [], 0)[0]:
            data = os.read(0, 1 << 16)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield json.loads(line)
        yield {}


def _main(job: dict[str, Any]) -> None:
    end, pool = make(job["side"], job["engine"], port=job["port"])

    def say(**what: Any) -> None:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()

    if job["side"] == "prefill":
        for number in range(LAYOUT.pages):
            write_page(pool, number, contents(number))
    say(port=end.port)
    seen: dict[int, int] = {}
    for order in _lines():
        match order.pop("do", ""):
            case "send":
                end.send(**order)
            case "open":
                end.open_room(**order)
            case "receive":
                end.receive(**order, source=source(job["peer_port"]))
            case "abort":
                end.abort(**order)
            case "let go":
                end.engine.holding = False
        report = end.step(0.002)
        for result in report.results:
            say(result=result.room, generation=result.generation, ok=result.ok, error=str(result.error))
        for back in report.released:
            say(released=back.room, generation=back.generation, sums=[zlib.crc32(page(pool, n)) for n in back.pages])
        for number, room in end.table.rooms.items():
            if seen.get(number) != room.local:
                seen[number] = room.local
                say(room=number, local=room.local.name)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _main(json.loads(sys.argv[1]))
