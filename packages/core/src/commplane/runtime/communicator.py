"""One process group with an agreed plan: what engine authors call."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from commplane.agree import StoreBootstrap, close_backend, joint_verdict, setback
from commplane.agree.build import abort_backend
from commplane.api import Capability, Collective, CommBackend, GroupKey, Requirement, Workspace
from commplane.errors import (
    AgreementError,
    CaptureError,
    CommplaneError,
    CommunicatorError,
    MismatchError,
    PeerError,
    UnsupportedOperation,
)
from commplane.notice import notice
from commplane.plugins import PluginHost
from commplane.runtime.dispatch import DeadTable, DispatchTable, RecordingTable
from commplane.select import Plan, difference

if TYPE_CHECKING:
    import torch

__all__ = ["Communicator"]

T = TypeVar("T")


class Communicator:
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
        on_fault: Callable[[], None],
        on_close: Callable[[Communicator], None],
    ) -> None:
        self.key = key
        self.rank = rank
        self.device = device
        self.world_size = len(key.ranks)
        self.ranks = key.ranks
        self.plan = plan
        self._named = dict(backends)
        self._bootstrap = bootstrap
        self._attempts = tuple(attempts)
        self._steps = 0
        self._host = host
        self._startup_timeout = startup_timeout
        self._on_fault = on_fault
        self._on_close = on_close
        self._workspaces: list[Workspace] = []
        self._live = DispatchTable(self.who, plan, self._named)
        self._table: dict[Any, Callable[..., Any]] = self._live
        self._fault: Exception | None = None
        self._closed = False
        self._capturing = False

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

    # Data plane.

    def all_reduce_(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Reduce in place over the ranks with sum, min, max or avg; returns `tensor`.

        Raises:
            UnsupportedOperation: no backend of the plan serves this dtype, op or size.
            MismatchError: the ranks called with different arguments.
            PeerError: a rank is missing at the deadline.
        """
        call = self._table["all_reduce_", op, tensor.dtype]
        try:
            return call(tensor)  # type: ignore[no-any-return]
        except Exception as error:
            raise self._failed(error, tensor) from error.__cause__

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """`all_reduce_` into a new tensor; the input is left as it was."""
        call = self._table["all_reduce", op, tensor.dtype]
        try:
            return call(tensor)  # type: ignore[no-any-return]
        except Exception as error:
            raise self._failed(error, tensor) from error.__cause__

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors concatenated along dimension 0 in group order; shapes are equal on all ranks."""
        self._at_least_one_dimension("all_gather", tensor)
        call = self._table["all_gather", None, tensor.dtype]
        try:
            return call(tensor)  # type: ignore[no-any-return]
        except Exception as error:
            raise self._failed(error, tensor) from error.__cause__

    def reduce_scatter(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Part `rank` of the reduced tensor, cut evenly along dimension 0, which the world size must divide."""
        self._at_least_one_dimension("reduce_scatter", tensor)
        if tensor.shape[0] % self.world_size:
            raise UnsupportedOperation(
                f"{self.who} reduce_scatter wants a first dimension that {self.world_size} ranks divide, "
                f"found shape {list(tensor.shape)}: pad it"
            )
        call = self._table["reduce_scatter", op, tensor.dtype]
        try:
            return call(tensor)  # type: ignore[no-any-return]
        except Exception as error:
            raise self._failed(error, tensor) from error.__cause__

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Fill `tensor` in place from group rank `src`; returns `tensor`."""
        if not 0 <= src < self.world_size:
            raise UnsupportedOperation(f"{self.who} broadcast wants src as a group rank below {self.world_size}, found {src}")
        call = self._table["broadcast", None, tensor.dtype]
        try:
            return call(tensor, src)  # type: ignore[no-any-return]
        except Exception as error:
            raise self._failed(error, tensor) from error.__cause__

    def barrier(self) -> None:
        """Return when every rank has come here."""
        call = self._table["barrier", None, None]
        try:
            call()
        except Exception as error:
            raise self._failed(error) from error.__cause__

    def all_reduce_rms_norm(
        self, tensor: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum `tensor` over the ranks, add `residual`, normalise: what stands between two halves of a transformer layer.

        Args:
            tensor: this rank's partial sums, ``[..., hidden]``.
            residual: same shape and dtype, equal on all ranks.
            weight: ``[hidden]``, of the same dtype.
            eps: added to the mean square.

        Returns:
            The norm and the new residual, both new tensors: the sum is rounded to the dtype, then the new residual; the norm
            is computed in float32 from the rounded residual and rounded once (float64 stays float64).
        """
        import torch

        total = self.all_reduce(tensor)
        with torch.no_grad():
            total.add_(residual)
            wide = total.to(torch.promote_types(total.dtype, torch.float32))
            norm = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
            return norm.to(total.dtype), total

    def _at_least_one_dimension(self, what: str, tensor: torch.Tensor) -> None:
        if tensor.dim() == 0:
            raise UnsupportedOperation(f"{self.who} {what} wants a tensor with a first dimension, found a scalar")

    def _failed(self, error: Exception, tensor: torch.Tensor | None = None) -> Exception:
        """What to raise for `error` of a collective: poisons, unless nothing was sent."""
        if tensor is not None and str(tensor.layout) != "torch.strided":
            return UnsupportedOperation(f"{self.who} wanted a dense tensor, found layout {tensor.layout}: use to_dense()")
        if not isinstance(error, UnsupportedOperation):
            self.poison(error)
        return error

    # Control plane.

    def prepare(self, collective: str = "all_reduce", *, dtype: torch.dtype | str = "float32", max_bytes: int) -> None:
        """Build every workspace for messages of up to `max_bytes` bytes a rank, before they are needed. Collective.

        Call it before a capture: nothing grows inside one. Several calls add up.

        Raises:
            MismatchError: the ranks declared different things.
            CommunicatorError: some rank could not build; all ranks then close what they built in this call.
        """
        if collective not in Collective._value2member_map_:
            raise UnsupportedOperation(f"{self.who} prepare wants one of {', '.join(Collective)}, found {collective!r}")
        need = Requirement(Collective(collective), str(dtype).removeprefix("torch."), int(max_bytes))
        if need.max_bytes < 0:
            raise UnsupportedOperation(f"{self.who} prepare wants max_bytes of 0 or more, found {max_bytes}")

        def build() -> list[Workspace]:
            return self._host.init_workspace(self, [need])

        def undo(built: Iterable[Workspace]) -> None:
            for workspace in built:
                workspace.close()

        value = {"collective": str(need.collective), "dtype": need.dtype, "max_bytes": need.max_bytes}
        try:
            built = self._joint("prepare", value, build, undo)
            for workspace in built:
                workspace.commit()
            self._workspaces.extend(built)
        finally:
            self._live.clear()  # backends are bound anew, to what they have now

    def empty(self, *shape: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An uninitialised tensor in symmetric memory: reduced without a staging copy. Collective.

        Where no backend of the plan has symmetric memory for `dtype`, an ordinary tensor; the plan is the same on every rank,
        so all ranks get the same kind. The memory goes when the tensor does.

        Args:
            shape: integers or one sequence of them, as for `torch.empty`; same on every rank.
            dtype: same on every rank; if unset, torch's default.
        """
        import torch

        kind = torch.get_default_dtype() if dtype is None else dtype
        name = str(kind).removeprefix("torch.")
        given = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        try:
            sizes = tuple(operator.index(n) for n in given)
        except TypeError:
            raise UnsupportedOperation(f"{self.who} empty wants integers, found {given}") from None
        if any(n < 0 for n in sizes):
            raise UnsupportedOperation(f"{self.who} empty wants sizes of 0 or more, found {list(sizes)}")
        backend = next(
            (
                self._named[s.name]
                for s in self.plan.specs
                if Capability.SYMMETRIC_MEMORY in s.capabilities and (not s.dtypes or name in s.dtypes)
            ),
            None,
        )

        def allocate() -> torch.Tensor:
            if backend is None:
                return torch.empty(sizes, dtype=kind, device=self.device)
            return backend.empty(sizes, kind)

        return self._joint("empty", {"shape": list(sizes), "dtype": name}, allocate, lambda _tensor: None)

    def _joint(self, what: str, value: Mapping[str, Any], act: Callable[[], T], undo: Callable[[T], None]) -> T:
        """Compare `value` over the ranks, act, vote. On every rank or on none. Collective."""
        self.compare(what, value)
        self._steps += 1
        for attempt in self._attempts:
            attempt.begin(f"{what}/{self._steps}")
        problem, result = None, None
        try:
            try:
                result = act()
            except Exception as error:  # whatever a plugin raises becomes a vote
                problem = setback(error)
                if not problem.derived:
                    for attempt in self._attempts:
                        attempt.fail(problem.text)
            reasons = joint_verdict(self._bootstrap, what, problem, 2 * self._startup_timeout)
        except BaseException as error:  # a rank is lost, or this one was interrupted: the ranks are no longer in step
            for attempt in self._attempts:
                attempt.fail(f"{type(error).__name__} in {what}")
            self.poison(error if isinstance(error, Exception) else AgreementError(f"{self.who} {what} was interrupted"))
            raise
        if reasons is not None:
            if problem is None:
                undo(result)  # type: ignore[arg-type]
            raise CommunicatorError(f"{self.who} {what} failed and was rolled back on all ranks: {reasons}")
        return result  # type: ignore[return-value]

    def compare(self, what: str, value: Mapping[str, Any]) -> None:
        """Raise on every rank if `value`, a JSON object, is not equal on all of them. Collective, over the control plane.

        Raises:
            MismatchError: shows what differs; nothing is out of step, so the communicator goes on.
        """
        self.check_usable(what)
        try:
            values = self._bootstrap.all_gather(value, what=what, timeout=self._startup_timeout)
        except (PeerError, AgreementError) as error:
            self.poison(error)
            raise
        text = difference(f"the arguments of {what}", dict(zip(self.ranks, values, strict=True)))
        if text is not None:
            raise MismatchError(f"{self.who} {text}")

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

    def _capturing_backends(self) -> list[CommBackend]:
        return [self._named[s.name] for s in self.plan.specs if Capability.CAPTURE in s.capabilities]

    def _capture_begin(self) -> None:
        self._capturing = True
        self._host.notify("commplane_capture_begin", communicator=self)
        if self.captures:
            for backend in self._capturing_backends():
                backend.capture_begin()
            self._table = RecordingTable(self._live)

    def _capture_end(self, error: BaseException | None) -> CaptureError | None:
        """Vote on what was captured. Collective where the plan captures. Returns what all ranks are to raise, if anything."""
        self._capturing = False
        outcome: CaptureError | None = None
        if self.captures:
            records = self._table.records if isinstance(self._table, RecordingTable) else []
            if self._fault is None:
                self._table = self._live
            outcome = self._agree_on_capture(records, error)
        self._host.notify("commplane_capture_end", communicator=self, error=error or outcome)
        return outcome

    def _agree_on_capture(self, records: list[str], error: BaseException | None) -> CaptureError | None:
        failed = None if error is None else setback(error)
        mine = {"problem": failed and failed.text, "derived": failed is not None and failed.derived, "records": records}
        try:
            votes = self._bootstrap.all_gather(mine, what="vote on capture", timeout=2 * self._startup_timeout)
            problems = [(r, v) for r, v in zip(self.ranks, votes, strict=True) if v["problem"] is not None]
            if problems:
                causes = [(r, v) for r, v in problems if not v["derived"]] or problems
                text = "; ".join(f"rank {r} failed inside the capture: {v['problem']}" for r, v in causes)
                out = CaptureError(f"{self.who} {text}")
                # Ranks may have stopped at different operations: what one sends next, another would take for an earlier one.
                self.poison(out)
                return out
            text = _first_difference({r: v["records"] for r, v in zip(self.ranks, votes, strict=True)}) or ""
            if text:
                out = CaptureError(f"{self.who} {text}")
                self.poison(out)
                return out
            problem = None
            try:
                for backend in self._capturing_backends():
                    backend.capture_end(self._bootstrap)
            except Exception as caught:  # whatever a plugin raises becomes a vote
                problem = setback(caught)
            reasons = joint_verdict(self._bootstrap, "registration after capture", problem, 2 * self._startup_timeout)
            return None if reasons is None else CaptureError(f"{self.who} registration after the capture failed: {reasons}")
        except CommplaneError as lost:
            self.poison(lost)
            return CaptureError(f"{self.who} vote on the capture failed: {lost}")

    # End of life.

    def abort(self) -> None:
        """Make peers that wait for this rank in an operation stop waiting: it will not come. Local."""
        for name, backend in self._named.items():
            abort_backend(name, [backend])

    def poison(self, error: Exception) -> None:
        """Make every later call raise at once, because the ranks are no longer at the same point. Local, idempotent.

        Peers that wait for this rank are told to stop where the backend can.
        """
        if self._fault is not None or self._closed:
            return
        self._fault = error
        missing = error.missing_ranks if isinstance(error, PeerError) else ()

        def again() -> CommplaneError:
            text = f"{self.who} is poisoned by an earlier fault and must be closed: {error}"
            if isinstance(error, PeerError):
                return PeerError(text, missing)
            return type(error)(text) if isinstance(error, CommplaneError) else CommunicatorError(text)

        self._table = DeadTable(again)
        self.abort()
        self._on_fault()
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
        for workspace in self._workspaces:
            try:
                workspace.close()
            except Exception as error:  # the rest has to go all the same
                notice(f"close of a workspace of backend {workspace.backend!r} raised {error!r}")
        for name, backend in self._named.items():
            close_backend(name, backend)
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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close(wait=kind is None)

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)


def _first_difference(records: Mapping[int, Sequence[str]]) -> str | None:
    """How the ranks' captured operations differ, or None. Pure."""
    if len({tuple(r) for r in records.values()}) == 1:
        return None
    longest = max(map(len, records.values()))

    def at(i: int) -> Iterable[tuple[int, str]]:
        return ((rank, r[i] if i < len(r) else "nothing") for rank, r in records.items())

    index = next(i for i in range(longest) if len({text for _, text in at(i)}) > 1)
    counts = ", ".join(f"rank {rank} {len(r)}" for rank, r in records.items())
    shown = "; ".join(f"rank {rank} has {text}" for rank, text in at(index))
    return f"ranks captured different operations ({counts} in all), first at number {index + 1}: {shown}"
