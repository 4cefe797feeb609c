"""What ``bench engines`` compares: each case is a writer and a reader in processes of their own, with a pool each.

The bare libraries are called the way their own documentation does, with nothing of ours around them.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import mmap
import os
import random
import signal
import socket
import threading
import time
from abc import ABC, abstractmethod
from multiprocessing.connection import Connection
from typing import Any

from commplane.api import TransferContext, TransferEngine
from commplane.errors import CommplaneError
from commplane_disagg.engines.base import address_of
from commplane_disagg.engines.mooncake import load_mooncake
from commplane_disagg.engines.nixl import load_nixl
from commplane_disagg.engines.specs import SPECS

__all__ = ["CASES", "end_main"]

_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1


class Case(ABC):
    """One end of one way to move bytes. The reader is prepared first; what it returns goes to the writer."""

    pool: memoryview

    def allocate(self, nbytes: int) -> memoryview:
        """This end's pool."""
        return memoryview(mmap.mmap(-1, nbytes))

    @abstractmethod
    def read(self, name: str) -> Any:
        """Make the pool writable for a peer: what the peer has to know."""

    @abstractmethod
    def write_to(self, name: str, made: Any) -> None:
        """Connect to a reader."""

    @abstractmethod
    def move(self, offsets: list[int], page: int) -> None:
        """Move these pages to the same offsets over there, and return when they are there."""


class Memcpy(Case):
    """Inside of the writer: what no engine can beat with one thread."""

    def read(self, name: str) -> Any:
        return None

    def write_to(self, name: str, made: Any) -> None:
        self._copy = self.allocate(self.pool.nbytes)
        self._from, self._to = address_of(self.pool), address_of(self._copy)

    def move(self, offsets: list[int], page: int) -> None:
        for offset in offsets:
            ctypes.memmove(self._to + offset, self._from + offset, page)


class PlainSocket(Case):
    """One TCP stream of Python's, page after page, one byte back at the end."""

    def read(self, name: str) -> Any:
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, args=(listener,), daemon=True).start()
        return listener.getsockname()[1]

    def _serve(self, listener: socket.socket) -> None:
        stream, _ = listener.accept()
        while head := stream.recv(16, socket.MSG_WAITALL):
            count, page = int.from_bytes(head[:8], "big"), int.from_bytes(head[8:], "big")
            for index in range(count):
                view = self.pool[index * page : (index + 1) * page]
                done = 0
                while done < page:
                    done += stream.recv_into(view[done:])
            stream.sendall(b"k")

    def write_to(self, name: str, made: Any) -> None:
        self._stream = socket.create_connection(("127.0.0.1", made))
        self._stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def move(self, offsets: list[int], page: int) -> None:
        self._stream.sendall(len(offsets).to_bytes(8, "big") + page.to_bytes(8, "big"))
        for offset in offsets:
            self._stream.sendall(self.pool[offset : offset + page])
        if self._stream.recv(1) != b"k":
            raise CommplaneError("the reader of the plain socket has gone")


class Ours(Case):
    """An engine of this package, through the contract."""

    def __init__(self, engine: str, **options: Any) -> None:
        spec = next(spec for spec in SPECS if spec.name == engine)
        module, _, attribute = spec.factory.partition(":")
        self._engine: TransferEngine = getattr(importlib.import_module(module), attribute)()
        self._options = options
        self._is_open = False

    def allocate(self, nbytes: int) -> memoryview:
        self._engine.open(TransferContext(f"bench-{os.getpid()}", timeout=_SECONDS, options=self._options))
        return self._engine.allocate(nbytes)

    def read(self, name: str) -> Any:
        self._engine.register(self.pool)
        return self._engine.metadata()

    def write_to(self, name: str, made: Any) -> None:
        self._engine.register(self.pool)
        self._engine.connect("reader", made)

    def move(self, offsets: list[int], page: int) -> None:
        ticket = self._engine.submit("reader", offsets, offsets, page)
        while not (ends := self._engine.poll(_SECONDS)):
            pass
        if ends[0].ticket != ticket or ends[0].error is not None:
            raise CommplaneError(f"a transfer of the bench ended with {ends[0].error}")


class BareNixl(Case):
    """NIXL alone: lists prepared once, and the writer asks until it is done.

    The reader has NIXL's progress thread, which spins, or a thread that calls it every half millisecond: where cores are few the
    second is the faster one, so it is measured too.
    """

    def __init__(self, tls: str = "", spin: bool = True) -> None:
        self._api = load_nixl(tls)
        self._spin = spin
        self._lists: dict[int, Any] = {}

    def _agent(self, name: str, progress_thread: bool) -> Any:
        agent = self._api.nixl_agent(name, self._api.nixl_agent_config(enable_prog_thread=progress_thread, backends=["UCX"]))
        self._region = agent.register_memory([(address_of(self.pool), self.pool.nbytes, 0, "")], "DRAM")
        return agent

    def read(self, name: str) -> Any:
        self._nixl = self._agent(f"{name}-reader", self._spin)
        if not self._spin:
            threading.Thread(target=self._call, daemon=True).start()
        return self._nixl.get_agent_metadata(), address_of(self.pool)

    def _call(self) -> None:
        while True:
            self._nixl.get_new_notifs()
            time.sleep(500e-6)

    def write_to(self, name: str, made: Any) -> None:
        self._nixl = self._agent(f"{name}-writer", False)
        self._peer, self._there = self._nixl.add_remote_agent(made[0]), made[1]

    def _list(self, page: int) -> tuple[Any, Any]:
        if page not in self._lists:
            offsets = range(0, self.pool.nbytes, page)
            here = address_of(self.pool)
            mine = self._nixl.get_xfer_descs([(here + offset, page, 0) for offset in offsets], "DRAM")
            its = self._nixl.get_xfer_descs([(self._there + offset, page, 0) for offset in offsets], "DRAM")
            self._lists[page] = (
                self._nixl.prep_xfer_dlist("NIXL_INIT_AGENT", mine),
                self._nixl.prep_xfer_dlist(self._peer, its),
            )
        return self._lists[page]  # type: ignore[no-any-return]

    def move(self, offsets: list[int], page: int) -> None:
        mine, its = self._list(page)
        indices = [offset // page for offset in offsets]
        handle = self._nixl.make_prepped_xfer("WRITE", mine, indices, its, indices)
        state = self._nixl.transfer(handle)
        while state == "PROC":
            state = self._nixl.check_xfer_state(handle)
        self._nixl.release_xfer_handle(handle)
        if state != "DONE":
            raise CommplaneError(f"NIXL says {state}")


class BareMooncake(Case):
    """Mooncake alone: one blocking batch."""

    def __init__(self) -> None:
        self._native = load_mooncake().TransferEngine()

    def read(self, name: str) -> Any:
        if self._native.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
            raise CommplaneError("Mooncake cannot start; its log says why")
        self._native.register_memory(address_of(self.pool), self.pool.nbytes)
        return f"127.0.0.1:{self._native.get_rpc_port()}", address_of(self.pool)

    def write_to(self, name: str, made: Any) -> None:
        self.read(name)
        self._session, self._there = made

    def move(self, offsets: list[int], page: int) -> None:
        here = address_of(self.pool)
        code = self._native.batch_transfer_sync_write(
            self._session,
            [here + offset for offset in offsets],
            [self._there + offset for offset in offsets],
            [page] * len(offsets),
        )
        if code < 0:
            raise CommplaneError(f"Mooncake says {code}")


CASES: dict[str, Any] = {
    "memcpy": Memcpy,
    "plain socket": PlainSocket,
    "shm": lambda: Ours("shm"),
    "tcp": lambda: Ours("tcp"),
    "nixl": lambda: Ours("nixl"),
    "bare nixl": lambda: BareNixl(spin=False),
    "bare nixl, spinning": BareNixl,
    "nixl over tcp": lambda: Ours("nixl", tls="tcp"),
    "bare nixl over tcp": lambda: BareNixl("tcp"),
    "mooncake": lambda: Ours("mooncake"),
    "bare mooncake": BareMooncake,
}
"""Name -> what makes an end of it."""


def end_main(pipe: Connection, case: str, nbytes: int, made: Any) -> None:
    """A process of one end; a writer if `made` is what the reader's answered. Answers to what comes through the pipe.

    The first answer is what `Case.read` returned, or None for a writer; or an error, and then the process ends.
    """
    # Else an end that is stopped would outlive a bench that is killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        end = CASES[case]()
        end.pool = end.allocate(nbytes)
        end.pool[:] = random.Random(0 if made is None else 1).randbytes(nbytes)
        if made is None:
            pipe.send(("ready", end.read(case)))
        else:
            end.write_to(case, made[0])
            pipe.send(("ready", None))
    except CommplaneError as error:
        pipe.send(("cannot", str(error)))
        return
    while (asked := pipe.recv()) is not None:
        if asked == "digest":
            pipe.send(hashlib.blake2b(end.pool).hexdigest())
            continue
        offsets, page, times = asked
        seconds = []
        for _ in range(times):
            begun = time.perf_counter()
            end.move(offsets, page)
            seconds.append(time.perf_counter() - begun)
        pipe.send(seconds)
    # A library's destructors have nothing to add, and some of them crash.
    os._exit(0)
