"""FlashInfer's workspaces of one communicator: built on every rank or on none, grown beside what is there, freed whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from commplane.api import BuildContext, Workspace
from commplane.errors import CaptureError, CommplaneError, CommunicatorError
from commplane_flashinfer import capacity
from commplane_flashinfer.exchange import Exchange
from commplane_flashinfer.order import CudaStreams, StreamOrder

if TYPE_CHECKING:
    from commplane_flashinfer.boundary import Boundary

__all__ = ["Grown", "Held", "Workspaces", "itemsize"]

_KEPT: list[Any] = []
"""Workspaces that a kernel may still be using because a rank was lost: never freed, so that nothing else gets their memory."""


def itemsize(single: bool) -> int:
    """Bytes of an element of the kind: float32, or the 16-bit types, which share a workspace."""
    return 4 if single else 2


@dataclass(eq=False)
class Held:
    """One workspace. Its kernels have to run in one order, the same on every rank.

    Attributes:
        raw: FlashInfer's `AllReduceFusionWorkspace`.
        max_elements: elements of the largest message it holds, tokens times hidden size.
        nbytes: device memory it takes on this rank.
        in_graphs: whether a call came while a capture was open: a graph may replay on it from now on.
    """

    raw: Any
    max_elements: int
    nbytes: int
    in_graphs: bool = False


class Workspaces:
    """The workspaces of one communicator, one for the 16-bit types and one for float32.

    A communicator has its own: two over the same ranks share nothing. `build` is collective over the group, the rest is local.

    Args:
        context: the group.
        boundary: what stands between this and the device.
        capability: compute capability of the GPUs, one for all ranks.
        limit: bytes of device memory that all workspaces together may take on a rank.

    Attributes:
        comm: the module ``flashinfer.comm``.
        capability: as given.
        order: the order of streams that all calls keep to.
    """

    def __init__(self, context: BuildContext, boundary: Boundary, capability: tuple[int, int], limit: int) -> None:
        self.comm = boundary.comm
        self.capability = capability
        self.order = StreamOrder(CudaStreams(torch.device(context.device)))
        self._context = context
        self._boundary = boundary
        self._limit = limit
        self._held: dict[bool, Held] = {}
        self._replaced: list[Held] = []
        self._failures: dict[tuple[bool, int], str] = {}

    def get(self, dtype: torch.dtype) -> Held | None:
        """The workspace for `dtype`; None where none was built, or the build failed."""
        return self._held.get(str(dtype) == "torch.float32")

    def elements(self, single: bool) -> int:
        """How many elements a message may have now; 0 without a workspace."""
        held = self._held.get(single)
        return 0 if held is None else held.max_elements

    def capture(self, is_open: bool) -> None:
        """A capture begins, or has ended. A workspace that is called on in between is kept until `close`."""
        self.order.capture(is_open)

    def build(self, single: bool, elements: int) -> Held:
        """A workspace for messages of `elements`, beside what is there and not yet in use. Collective.

        What failed once is not tried again: the same need raises the same error at once on every rank, without a word between
        them. Another need may try.

        Raises:
            CaptureError: on some rank a capture is open.
            CommunicatorError: some rank could not; the text is equal on all, and each has freed its part.
            PeerError: a rank is missing.
        """
        known = self._failures.get((single, elements))
        if known is not None:
            raise CommunicatorError(f"{known} (it failed before and is not tried again: prepare less, or free memory and reopen)")
        context, boundary = self._context, self._boundary
        size = itemsize(single)
        nbytes = capacity.physical(context.world_size, elements, size)
        what = f"workspace of flashinfer for {elements} elements of {'float32' if single else '16 bits'} ({nbytes} bytes a rank)"
        exchange = Exchange(context.bootstrap, f"[{context.key.purpose} {context.backend}] {what}")
        capturing = exchange.agree(None, boundary.capturing())
        if any(capturing):
            ranks = ", ".join(str(r) for r, yes in zip(context.ranks, capturing, strict=True) if yes)
            raise CaptureError(
                f"{context.who} {what} inside a CUDA graph capture of rank {ranks}: call prepare before the capture"
            )
        try:
            exchange.agree(self._over(single, nbytes) or self._spare(capacity.requests(context.world_size, elements, size)))
            raw, problem = self._create(exchange, single, elements)
            try:
                exchange.agree(problem)
            except BaseException:
                if raw is not None:
                    boundary.free(raw)
                raise
        except CommunicatorError as error:
            if type(error) is CommunicatorError:  # of all ranks; a lost rank is another matter
                self._failures[single, elements] = str(error)
            raise
        return Held(raw, elements, nbytes)

    def _over(self, single: bool, nbytes: int) -> str | None:
        """Why a workspace of `nbytes` would be more than the settings allow, with what it cannot take the place of. Local."""
        staying = [h for kind, h in self._held.items() if kind != single or h.in_graphs] + self._replaced
        needed = nbytes + sum(h.nbytes for h in staying)
        if needed <= self._limit:
            return None
        return (
            f"wanted at most {self._limit} bytes of workspaces (max_workspace_bytes), found {needed} with what captured "
            f"graphs keep: call prepare before the first capture, or raise it"
        )

    def _spare(self, sizes: Sequence[int]) -> str | None:
        """Why the device has no room for `sizes`, also after torch has given back what it only keeps; or None. Local."""
        device = self._context.device
        if self._boundary.spare(device, sizes) is None:
            return None
        self._boundary.empty_cache()
        return self._boundary.spare(device, sizes)

    def _create(self, exchange: Exchange, single: bool, elements: int) -> tuple[Any, str | None]:
        """FlashInfer's workspace and None, or None and why there is none. Collective through `exchange`.

        No exception leaves here but an interrupt: a traceback would keep what was half built alive in its frames.
        """
        tokens, hidden = capacity.shape(elements)
        context = self._context
        try:
            return self.comm.create_allreduce_fusion_workspace(
                backend="trtllm",  # "auto" and "mnnvl" use NVLink multicast, a resource of the whole host
                world_size=context.world_size,
                rank=context.rank,
                max_token_num=tokens,
                hidden_dim=hidden,
                dtype=torch.float32 if single else torch.bfloat16,
                comm_backend=exchange,
            ), None
        except BaseException as error:
            self._boundary.free_partial(exchange, error)
            if not isinstance(error, Exception):
                raise
            # Whatever FlashInfer raises becomes a vote.
            own = isinstance(error, CommplaneError)
            return None, str(error) if own else f"{type(error).__name__}: {' '.join(str(error).split())}"

    def take(self, single: bool, held: Held) -> None:
        """Use `held` from now on; what it replaces is freed, or kept until `close` where graphs or kernels may use it. Local."""
        old = self._held.get(single)
        self._held[single] = held
        if old is None:
            return
        if old.in_graphs or self._boundary.settle(self._context.device, self._context.timeout) is not None:
            self._replaced.append(old)
        else:
            self._boundary.free(old.raw)

    def drop(self, held: Held) -> None:
        """Free a workspace that was built and never taken into use. Local."""
        self._boundary.free(held.raw)

    def close(self) -> None:
        """Free everything after what runs on the device. Local, idempotent, waits no longer than the deadline of a call.

        Raises:
            CommunicatorError: kernels still run at the deadline, because they wait for a lost rank, or an earlier call was at
                fault; nothing is freed then, the device may still write there.
        """
        held = [*self._held.values(), *self._replaced]
        self._held, self._replaced = {}, []
        if not held:
            return
        reason = self._boundary.settle(self._context.device, self._context.timeout)
        if reason is not None:
            _KEPT.extend(held)
            raise CommunicatorError(
                f"{self._context.who} {reason}: {sum(h.nbytes for h in held)} bytes of device memory stay until this process ends"
            )
        for h in held:
            self._boundary.free(h.raw)


class Grown(Workspace):
    """A larger workspace, taken into use when every rank has built its part."""

    backend = "flashinfer"

    def __init__(self, workspaces: Workspaces, single: bool, held: Held) -> None:
        self.nbytes = held.nbytes
        self._workspaces = workspaces
        self._single = single
        self._held: Held | None = held

    def commit(self) -> None:
        """Take it into use. From here on the backend owns it."""
        held, self._held = self._held, None
        if held is not None:
            self._workspaces.take(self._single, held)

    def close(self) -> None:
        """Before `commit`: it was built in vain. After it: nothing, the backend frees what it uses."""
        held, self._held = self._held, None
        if held is not None:
            self._workspaces.drop(held)
