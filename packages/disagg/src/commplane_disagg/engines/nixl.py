"""The engine ``nixl``: NVIDIA's NIXL over UCX, which takes RDMA, shared memory of one host or TCP, whichever there is.

Two agents an end. A thread calls the one that peers write to now and then, without which a peer's first contact and everything
that UCX emulates would wait for ever. NIXL's own thread for this never sleeps and takes a core, so it is not the default. The
other agent writes, and is called by the threads that wait.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from commplane.api import TransferContext
from commplane.errors import CommplaneError, PeerError
from commplane_disagg.engines.base import PoolEngine, address_of, option
from commplane_disagg.engines.envelope import seal, unseal
from commplane_disagg.engines.nixl_pace import Pace
from commplane_disagg.engines.pieces import Pieces
from commplane_disagg.engines.worker import PeerWorker, Piece, Stop

__all__ = ["Nixl", "NixlMetadata", "load_nixl"]

_VERSION = 1
_TARGET_PAUSE, _TARGET_SPIN = 2e-3, 50e-6
"""A target that spins for longer reads the bytes in smaller bits: the latency is the same and the throughput less."""
_WRITER_PAUSE, _WRITER_SPIN = 500e-6, 200e-6


class NixlMetadata(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What a peer has to know: the agent's name and metadata, and where its pool lies."""

    agent: str
    address: int
    nbytes: int
    made: bytes


def load_nixl(tls: str = "") -> Any:
    """The module ``nixl._api``, with the settings that UCX reads once.

    Raises:
        CommplaneError: the package is absent or cannot be loaded, or `tls` comes too late.
    """
    if tls and os.environ.setdefault("UCX_TLS", tls) != tls:
        raise CommplaneError(
            f"engine 'nixl': wanted option tls {tls!r}, found UCX_TLS={os.environ['UCX_TLS']} in the environment"
        )
    if not any(Path("/sys/class/infiniband").glob("*")):
        # Without a card, UCX's module for it does nothing but crash the process at exit (NIXL 1.5.1: libnl in its wheel).
        os.environ.setdefault("UCX_MODULES", "^ib")
    # What NIXL prints for each agent is no news.
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    os.environ.setdefault("UCX_LOG_LEVEL", "fatal")
    try:
        return importlib.import_module("nixl._api")
    except ImportError as error:
        raise CommplaneError(f"engine 'nixl' wants the package nixl: pip install 'commplane-disagg[nixl]' ({error})") from error


class Nixl(PoolEngine):
    """One end.

    Options: ``tls``, UCX's transports such as ``tcp`` (default: UCX chooses), one value for all engines of a process; ``spin``,
    to have NIXL's own progress thread, which is the fastest and takes a core.
    """

    name: ClassVar[str] = "nixl"
    options = ("tls", "spin")

    def __init__(self) -> None:
        super().__init__()
        self._api: Any = None
        self._target: Any = None
        self._made = b""
        self._writer: Any = None
        self._progress: threading.Thread | None = None
        self._closing = threading.Event()
        self._registered: list[tuple[Any, Any]] = []
        self._peers: dict[str, tuple[PeerWorker, NixlMetadata]] = {}
        self._lock = threading.Lock()
        """One thread at a time in the agent that writes: it was made without locks of its own."""

    def open(self, context: TransferContext) -> None:
        """Make both agents."""
        super().open(context)
        try:
            self._api = load_nixl(option(context, self.name, "tls", ""))
            unique = f"{context.name}#{secrets.token_hex(8)}"  # of this start: a peer may still know an earlier one
            spin = option(context, self.name, "spin", False)
            self._target = self._agent(unique, progress_thread=spin)
            self._writer = self._agent(f"{unique}/writer", progress_thread=False)
        except CommplaneError:
            self._context = self._target = self._writer = None
            raise

    def _agent(self, name: str, *, progress_thread: bool) -> Any:
        config = self._api.nixl_agent_config(enable_prog_thread=progress_thread, backends=["UCX"])
        try:
            agent = self._api.nixl_agent(name, config)
        except Exception as error:  # its exceptions share no other class
            raise CommplaneError(
                f"engine 'nixl' cannot start an agent over UCX: {error!r}; see UCX_TLS and UCX_MODULES"
            ) from error
        if "UCX" not in agent.backends:
            raise CommplaneError(f"engine 'nixl' wants NIXL's plugin UCX, found {', '.join(agent.plugin_list)}")
        return agent

    def register(self, pool: memoryview) -> None:
        """With both agents."""
        super().register(pool)
        region = [(address_of(self.pool), self.pool.nbytes, 0, "")]
        for agent in (self._target, self._writer):
            self._registered.append((agent, agent.register_memory(region, "DRAM")))
        self._made = self._target.get_agent_metadata()
        if not option(self.context, self.name, "spin", False):
            self._closing.clear()
            self._progress = threading.Thread(target=self._call_target, name=f"commplane-nixl {self.context.name}", daemon=True)
            self._progress.start()

    def _call_target(self) -> None:
        """In a thread, the only one that calls the target agent from now on."""
        pace, pause = Pace(_TARGET_PAUSE, _TARGET_SPIN), _TARGET_PAUSE
        while not self._closing.is_set():
            if pause:
                self._closing.wait(pause)
            begun = time.perf_counter()
            self._target.get_new_notifs()
            pause = pace.after(begun)

    def metadata(self) -> bytes:
        """The target agent's own, and where the pool lies."""
        address, nbytes = address_of(self.pool), self.pool.nbytes
        return seal(self.name, _VERSION, NixlMetadata(self._target.name, address, nbytes, self._made))

    def connect(self, peer: str, metadata: bytes) -> None:
        """Load the peer's metadata and make the connection."""
        _ = self.pool
        found = unseal(self.name, _VERSION, NixlMetadata, metadata, peer)
        if peer in self._peers:
            worker, known = self._peers[peer]
            if known == found and worker.why_lost is None:
                return
            self.disconnect(peer)
        try:
            with self._lock:
                name = self._writer.add_remote_agent(found.made)
                if name not in (found.agent, found.agent.encode()):
                    raise CommplaneError(f"metadata of peer {peer!r}: wanted agent {found.agent!r}, found {name!r}")
                self._writer.make_connection(found.agent)
        except CommplaneError:
            raise
        except Exception as error:  # its exceptions share no other class
            self._forget(found.agent)
            raise PeerError(f"peer {peer!r} cannot be reached through NIXL: {error!r}; is it running?") from error

        def move(pieces: Sequence[Piece], alive: Callable[[], bool]) -> None:
            self._move(peer, found, pieces, alive)

        self._peers[peer] = (PeerWorker(peer, move, self._ends, self.context.timeout), found)

    def _move(self, peer: str, target: NixlMetadata, pieces: Sequence[Piece], alive: Callable[[], bool]) -> None:
        """In the peer's thread."""
        here = address_of(self.pool)
        with self._lock:
            writer = self._writer
            try:
                local = writer.get_xfer_descs([(here + start, nbytes, 0) for start, _, nbytes in pieces], "DRAM")
                remote = writer.get_xfer_descs([(target.address + to, nbytes, 0) for _, to, nbytes in pieces], "DRAM")
                handle = writer.initialize_xfer("WRITE", local, remote, target.agent)
                state = writer.transfer(handle)
            except Exception as error:  # its exceptions share no other class
                raise Stop(f"peer {peer!r} is lost: {error!r}") from error
        pace, pause = Pace(_WRITER_PAUSE, _WRITER_SPIN), 0.0
        pace.busy()
        try:
            while state == "PROC":
                if not alive():
                    raise Stop(f"peer {peer!r} was given up")
                if pause:
                    time.sleep(pause)
                else:
                    os.sched_yield()  # a sleep of zero is one of 75 us
                with self._lock:
                    begun = time.perf_counter()
                    state = writer.check_xfer_state(handle)
                    pause = pace.after(begun)
        except Stop:
            raise
        except Exception as error:
            raise Stop(f"peer {peer!r} is lost: {error!r}") from error
        finally:
            self._release(handle)
        if state != "DONE":
            raise Stop(f"peer {peer!r} is lost: NIXL says {state}")

    def _release(self, handle: Any) -> None:
        with self._lock:
            try:
                self._writer.release_xfer_handle(handle)
            except Exception:  # its exceptions share no other class
                # One that is under way to a lost peer cannot be released yet: NIXL does so when its agent goes.
                handle._released = True
                self._writer._leaked_xfer_handles.append(handle._handle)

    def _remote_pool(self, peer: str) -> int:
        worker, found = self._peers.get(peer, (None, None))
        if worker is None or found is None:
            raise CommplaneError(f"peer {peer!r} is not connected to {self.context.name!r}: call connect first")
        if worker.why_lost is not None:
            raise CommplaneError(f"{worker.why_lost}; connect to it again")
        return found.nbytes

    def _start(self, peer: str, ticket: int, pieces: Pieces) -> None:
        self._peers[peer][0].start(ticket, pieces)

    def cancel(self, ticket: int) -> None:
        """Between two batches."""
        peer = self._ends.peer_of(ticket)
        if peer is not None and peer in self._peers:
            self._peers[peer][0].cancel(ticket)

    def disconnect(self, peer: str) -> None:
        """Of this end's writing; what the peer writes here, only the peer can end."""
        if peer not in self._peers:
            return
        worker, found = self._peers.pop(peer)
        worker.lose(f"peer {peer!r} was disconnected")
        worker.join(self.context.timeout)
        self._forget(found.agent)

    def _forget(self, agent: str) -> None:
        native = self._api.nixlBind
        # NIXL has forgotten one that it never knew well, or saw die.
        with self._lock, contextlib.suppress(native.nixlNotFoundError, native.nixlRemoteDisconnectError):
            self._writer.remove_remote_agent(agent)

    def close(self) -> None:
        """Both agents end."""
        if self._context is None:
            return
        for peer in list(self._peers):
            self.disconnect(peer)
        self._closing.set()
        if self._progress is not None:
            self._progress.join()
            self._progress = None
        for agent, region in self._registered:
            agent.deregister_memory(region)
        self._registered = []
        self._target = self._writer = self._pool = self._context = None
