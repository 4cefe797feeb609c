"""One process group with an agreed plan: what engine authors call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from commplane.agree import CaptureGuard, StoreBootstrap, abort_backend, close_backend, on_device, on_device_if_possible
from commplane.api import Capability, CommBackend, GroupKey
from commplane.errors import AgreementError, CaptureError, CommplaneError, CommunicatorError, PeerError
from commplane.flight import GroupFlight
from commplane.handles import register
from commplane.notice import notice
from commplane.plugins import PluginHost
from commplane.runtime.capture import agree_on_capture, capture_all
from commplane.runtime.dispatch import DeadTable, DispatchTable, RecordingTable, tables
from commplane.runtime.joint import JointSteps
from commplane.runtime.memory import GroupMemory
from commplane.runtime.norm_calls import NormCalls
from commplane.runtime.tune import Steps, Tuner, check_outcome, subject_of
from commplane.select import Plan, Timings

if TYPE_CHECKING:
    import torch

__all__ = ["Communicator"]


class Communicator(NormCalls):
    """Collectives over one group of ranks. Made by `Plane.communicator`.

    Every method but the properties is collective: each rank of the group calls it, in the same order, with the same shape,
    dtype and op. Tensors are on the group's device, of any shape and layout unless said otherwise. Calls come from one thread
    at a time. After a `PeerError` or a `MismatchError` the ranks are at different points: the communicator is then poisoned and
    every later call raises at once.

    Attributes:
        key: identity of the group.
        rank: group rank of this process.
        device: where its tensors are, such as ``"cpu"`` or ``"cuda:0"``.
        world_size: number of ranks.
        ranks: global ranks in group order.
        plan: what runs and why; equal on every rank.
        handle: its name in this process, for `commplane.ops`.
    """

    def __init__(
        self,
        key: GroupKey,
        rank: int,
        device: str,
        plan: Plan,
        backends: Mapping[str, CommBackend],
        bootstrap: StoreBootstrap,
        attempts: Sequence[StoreBootstrap],
        host: PluginHost,
        startup_timeout: float,
        flight: GroupFlight,
        on_fault: Callable[[], None],
        on_close: Callable[[Communicator], None],
    ) -> None:
        self.key = key
        self.rank = rank
        self.device = device
        self.world_size = len(key.ranks)
        self.ranks = key.ranks
        self.plan = plan
        self.handle = register(self, key.purpose, self.world_size)
        self._named = dict(backends)
        self._attempts = dict(zip(backends, attempts, strict=True))
        self._bootstrap = bootstrap
        self._joint = JointSteps(self.who, bootstrap, attempts, startup_timeout)
        self._memory = GroupMemory(self.who, plan, self._named, device, self._joint)
        self._host = host
        self._startup_timeout = startup_timeout
        self._flight = flight
        self._on_fault = on_fault
        self._on_close = on_close
        self._bindable = flight.bindable()
        self._live, self._in_captures = tables(self.who, plan, self._bindable)
        self._table: dict[Any, Callable[..., Any]] = self._live
        self._fault: Exception | None = None
        self._closed = False
        self._capturing = False
        self._tunings = 0

    @property
    def who(self) -> str:
        """How errors begin: ``[tp rank 3/8]``."""
        return f"[{self.key.purpose} rank {self.rank}/{self.world_size}]"

    @property
    def backends(self) -> tuple[CommBackend, ...]:
        """The open backends, in the order of the plan."""
        return tuple(self._named[name] for name in self.plan.backends)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def __repr__(self) -> str:
        state = "closed" if self._closed else "poisoned" if self._fault else "+".join(self.plan.backends)
        return f"<Communicator {self.key}, rank {self.rank}: {state}>"

    # Control plane.

    def prepare(self, collective: str = "all_reduce", *, dtype: torch.dtype | str = "float32", max_bytes: int) -> None:
        """Build every workspace for messages of up to `max_bytes` bytes a rank, before they are needed. Collective.

        Call it before a capture: nothing grows inside one. Several calls add up.

        Raises:
            MismatchError: the ranks declared different things.
            CommunicatorError: some rank could not build; all ranks then close what they built in this call.
        """
        self.check_usable("prepare")
        try:
            with on_device(self.device):
                self._memory.prepare(
                    collective, dtype, max_bytes, lambda needs: self._host.init_workspace(self, needs), self.poison
                )
        finally:
            self._live.clear()  # backends are bound anew, to what they have now
            self._in_captures.clear()

    def tune(
        self,
        collective: str = "all_reduce_rms_norm",
        *,
        dtype: torch.dtype | str = "bfloat16",
        max_bytes: int = 1 << 25,
        sizes: Sequence[int] | None = None,
        hidden: int = 4096,
        op: str | None = None,
        graph: bool | None = None,
        budget_s: float = 60.0,
    ) -> None:
        """Measure every way to run a call at each size, and from now on take the fastest. Collective, outside of a capture.

        Each way is verified before it is timed; one that gives a wrong result does not run this call again, on any rank, nor what
        is composed of it. One that all ranks fail in runs from that size on no more. Where memory ends, or nothing can be run,
        sizes end, with a warning on the first rank. The plan is another one afterwards: `plan.timings` has what was measured,
        equal on every rank. Times are those of one hidden size; another one may have others.

        Args:
            collective: ``all_reduce``, ``all_reduce_rms_norm`` or ``all_reduce_rms_norm_quant``.
            dtype: of the tensor.
            max_bytes: the largest tensor; measured are powers of two from 8 KiB.
            sizes: the sizes instead, in bytes.
            hidden: last dimension of the tensor of a norm.
            op: the reduction, or the format; if unset, sum or fp8_static.
            graph: whether to time CUDA graphs; if unset, on cuda.
            budget_s: seconds after which no further size is begun.

        Raises:
            UnsupportedOperation: the call is none that can be tuned, or no backend serves it.
            MismatchError: the ranks called with different arguments.
            CaptureError: a capture is open.
            CommunicatorError: a way failed on some ranks only, and the communicator is poisoned; or nothing could be measured,
                or calls would be left with no way to run, and the plan stays.
        """
        self.check_usable("tune")
        subject = subject_of(self.who, self.device, collective, dtype, max_bytes, sizes, hidden, op, graph)
        self._joint.compare("tune", {**subject.to_json(), "budget_s": budget_s}, self.poison)
        ways = self.plan.ways(subject.collective, subject.variant, subject.dtype, capturing=subject.graph and self.captures)
        if not ways:
            raise self.plan.unsupported(self.who, subject.collective, op, subject.dtype)
        for part in sorted({subject.collective, *(r.part for routes in ways.values() for r in routes if r.part is not None)}):
            self.prepare(part, dtype=subject.dtype, max_bytes=subject.sizes[-1])
        self._tunings += 1
        seconds = 2 * self._startup_timeout  # a step may hold a vote of its own, on a capture
        tuner = Tuner(
            subject,
            ways,
            self.device,
            self.rank,
            self.world_size,
            Steps(self.who, self._bootstrap, self._tunings, self.device, seconds, self._left, lambda: self.check_usable("tune")),
            lambda routes: DispatchTable(self.who, self.plan.only(routes), self._bindable),
            lambda: capture_all(CaptureGuard(), [self]) if self.captures else nullcontext(),
            self._bootstrap.clock.now,
        )
        curves = tuner.run(budget_s)
        plan = self.plan.tuned((self.plan.timings or Timings()).merged(curves))
        check_outcome(self.who, curves, tuner.stopped, plan, self.plan)
        if tuner.stopped and self.rank == 0:
            notice(f"{self.who} tune ended before the last size at {tuner.stopped}")
        self._joint.compare("tune, the plan", {"digest": plan.digest}, self.poison)
        self.plan = plan
        self._memory.follow(plan)
        self._live, self._in_captures = tables(self.who, plan, self._bindable)
        self._table = self._live

    def _left(self, error: Exception) -> None:
        """The ranks are out of step in a tuning: a thread of it that was left to itself may be in a capture. Local."""
        self.poison(error)
        self._capture_interrupted()

    def empty(self, *shape: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An uninitialised tensor in symmetric memory: reduced without a staging copy. Collective.

        Where no backend of the plan has symmetric memory for `dtype`, an ordinary tensor; the plan is the same on every rank,
        so all ranks get the same kind. The memory goes when the tensor does.

        Args:
            shape: integers or one sequence of them, as for `torch.empty`; same on every rank.
            dtype: same on every rank; if unset, torch's default.
        """
        self.check_usable("empty")
        with on_device(self.device):
            return self._memory.empty(shape, dtype, self.poison)

    def compare(self, what: str, value: Mapping[str, Any]) -> None:
        """Raise on every rank if `value`, a JSON object, is not equal on all of them. Collective, over the control plane.

        Raises:
            MismatchError: shows what differs; nothing is out of step, so the communicator goes on.
        """
        self.check_usable(what)
        self._joint.compare(what, value, self.poison)

    def check_usable(self, what: str) -> None:
        """Raise what every call raises if this communicator is closed or poisoned, or a capture is open. Local."""
        if self._capturing:
            raise CaptureError(f"{self.who} {what} inside a capture: do it before, a capture may only hold collectives")
        if isinstance(self._table, DeadTable):
            raise self._table.error()

    # Capture, driven by the plane.

    @property
    def captures(self) -> bool:
        """Whether the plan holds anything that needs capturing; otherwise a capture passes this communicator by."""
        return any(Capability.CAPTURE in s.capabilities for s in self.plan.specs)

    def _capturing_backends(self) -> list[tuple[CommBackend, StoreBootstrap]]:
        names = [s.name for s in self.plan.specs if Capability.CAPTURE in s.capabilities]
        return [(self._named[name], self._attempts[name]) for name in names]

    def _capture_begin(self) -> None:
        self._capturing = True
        self._host.notify("commplane_capture_begin", communicator=self)
        if self.captures:
            with on_device(self.device):
                for backend, _ in self._capturing_backends():
                    backend.capture_begin()
            self._table = RecordingTable(self._in_captures)

    def _capture_end(self, error: BaseException | None) -> CaptureError | None:
        """Vote on what was captured. Collective where the plan captures. Returns what all ranks are to raise, if anything."""
        self._capturing = False
        outcome: CaptureError | None = None
        if self.captures:
            records = self._table.records if isinstance(self._table, RecordingTable) else []
            if self._fault is None:
                self._table = self._live
            with on_device_if_possible(self.device):  # the vote has to be come to
                outcome = agree_on_capture(
                    self.who,
                    self._bootstrap,
                    self._joint,
                    self._capturing_backends(),
                    self._startup_timeout,
                    records,
                    error,
                    self.poison,
                )
        self._host.notify("commplane_capture_end", communicator=self, error=error or outcome)
        return outcome

    def _capture_interrupted(self) -> None:
        """This rank does not end the capture: nothing more can be called, and peers are let go. Local."""
        self._capturing = False
        if self.captures:
            self.poison(AgreementError(f"{self.who} vote on the capture was interrupted"))

    # End of life.

    def abort(self) -> None:
        """Make peers that wait for this rank in an operation stop waiting: it will not come. Local."""
        for name, backend in self._named.items():
            abort_backend(name, [backend])

    def poison(self, error: Exception) -> None:
        """Make every later call raise at once, because the ranks are no longer at the same point. Local, idempotent.

        Peers that wait for this rank are told to stop where the backend can. The flight records of the plane are dumped; the
        file is named in the log, in later errors and, from Python 3.11, in a note of `error`.
        """
        if self._fault is not None or self._closed:
            return
        self._fault = error
        missing = error.missing_ranks if isinstance(error, PeerError) else ()
        records = ""

        def again() -> CommplaneError:
            text = f"{self.who} is poisoned by an earlier fault and must be closed: {error}{records}"
            if isinstance(error, PeerError):
                return PeerError(text, missing)
            return type(error)(text) if isinstance(error, CommplaneError) else CommunicatorError(text)

        self._table = DeadTable(again)
        self.abort()
        self._on_fault()
        file = self._flight.failed(error)
        if file is not None:
            records = f"; flight records in {file}"
        self._host.notify("commplane_fault", communicator=self, error=error)

    def close(self) -> None:
        """Release everything. Collective, idempotent.

        Waits for the other ranks, so that none is cut off in its last operation; if some do not come within the start-up
        deadline, or the communicator is poisoned, it closes all the same, with a warning in the first case.
        """
        self._close(wait=True)

    def _close(self, *, wait: bool) -> None:
        if self._closed:
            return
        if self._capturing:
            raise CaptureError(f"{self.who} close inside a capture: do it after")
        if wait and self._fault is None:
            try:
                self._bootstrap.barrier(what="close", timeout=self._startup_timeout)
            except CommplaneError as error:
                notice(f"closed without all ranks: {error}", stacklevel=3)
        elif not wait:
            self.abort()
        self._closed = True
        self._table = DeadTable(lambda: CommunicatorError(f"{self.who} is closed: create it again to go on"))
        self._flight.close()
        with on_device_if_possible(self.device):
            self._memory.close()
        for name, backend in self._named.items():
            close_backend(name, backend, self.device)
        self._on_close(self)
        self._host.notify("commplane_communicator_closed", communicator=self)

    def disown(self) -> None:
        """In a forked child: every call raises, and nothing that is shared with the parent is touched. Local."""
        self._closed = True
        self._table = DeadTable(
            lambda: CommunicatorError(f"{self.who} belongs to the parent process: a forked child must create its own")
        )

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if error is not None and self._fault is None and not self._closed:
            self.abort()  # before anything that takes time: peers may be waiting for this rank
            self._flight.failed(error)
        self._close(wait=kind is None)

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)
