"""FlashInfer's workspaces of one communicator: built on every rank or on none, grown beside what is there, freed whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from commplane.api import BuildContext, Workspace
from commplane.errors import CaptureError, CommplaneError, CommunicatorError
from commplane_flashinfer import capacity
from commplane_flashinfer.exchange import Exchange

if TYPE_CHECKING:
    import torch

    from commplane_flashinfer.boundary import Boundary

__all__ = ["Grown", "Held", "Workspaces", "itemsize"]

_KEPT: list[Any] = []
"""Workspaces that a kernel may still be using because a rank was lost: never freed, so that nothing else gets their memory."""


def itemsize(single: bool) -> int:
    """Bytes of an element of the kind: float32, or the 16-bit types, which share a workspace."""
    return 4 if single else 2


@dataclass(eq=False)
class Held:
    """One workspace. All kernels on it have to be in one stream order, and in the same order on every rank.

    Attributes:
        raw: FlashInfer's `AllReduceFusionWorkspace`.
        max_elements: elements of the largest message it holds, tokens times hidden size.
        world_size: number of ranks it was made for.
        nbytes: device memory it takes on this rank.
        order: for what calls keep with it, such as the stream of the last one; nothing else looks at it.
    """

    raw: Any
    max_elements: int
    world_size: int
    nbytes: int
    order: Any = None


class Workspaces:
    """The workspaces of one communicator, one for the 16-bit types and one for float32.

    A communicator has its own: two over the same ranks share nothing. `build` is collective over the group, the rest is local.

    Args:
        context: the group.
        boundary: what stands between this and the device.

    Attributes:
        comm: the module ``flashinfer.comm``.
    """

    def __init__(self, context: BuildContext, boundary: Boundary) -> None:
        self.comm = boundary.comm
        self._context = context
        self._boundary = boundary
        self._held: dict[bool, Held] = {}
        self._replaced: list[Held] = []
        self._failures: dict[tuple[bool, int], str] = {}
        self.in_graphs = False
        """Whether graphs were captured that replay on what is held now."""

    def get(self, dtype: torch.dtype) -> Held | None:
        """The workspace for `dtype`; None where none was built, or the build failed."""
        return self._held.get(str(dtype) == "torch.float32")

    def elements(self, single: bool) -> int:
        """How many elements a message may have now; 0 without a workspace."""
        held = self._held.get(single)
        return 0 if held is None else held.max_elements

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
        capturing = exchange.allgather(boundary.capturing())
        if any(capturing):
            ranks = ", ".join(str(r) for r, yes in zip(context.ranks, capturing, strict=True) if yes)
            raise CaptureError(
                f"{context.who} {what} inside a CUDA graph capture of rank {ranks}: call prepare before the capture"
            )
        try:
            exchange.agree(boundary.spare(context.device, capacity.requests(context.world_size, elements, size)))
            raw, problem = self._create(exchange, single, elements)
            try:
                if exchange.ended is not None:
                    raise exchange.ended
                exchange.agree(problem)
            except BaseException:
                if raw is not None:
                    boundary.free(raw)
                raise
        except CommunicatorError as error:
            if type(error) is CommunicatorError:  # of all ranks; a lost rank is another matter
                self._failures[single, elements] = str(error)
            raise
        return Held(raw, elements, context.world_size, nbytes)

    def _create(self, exchange: Exchange, single: bool, elements: int) -> tuple[Any, str | None]:
        """FlashInfer's workspace and None, or None and why there is none. Collective through `exchange`.

        No exception leaves here but an interrupt: a traceback would keep what was half built alive in its frames.
        """
        import torch

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
        except Exception as error:  # whatever FlashInfer raises becomes a vote
            problem = (
                str(error) if isinstance(error, CommplaneError) else f"{type(error).__name__}: {' '.join(str(error).split())}"
            )
        self._boundary.free_partial(exchange)
        return None, problem

    def take(self, single: bool, held: Held) -> None:
        """Use `held` from now on; what it replaces is freed, or kept until `close` where graphs or kernels may use it. Local."""
        old = self._held.get(single)
        self._held[single] = held
        if old is None:
            return
        if self.in_graphs or not self._boundary.settle(self._context.device, self._context.timeout):
            self._replaced.append(old)
        else:
            self._boundary.free(old.raw)

    def drop(self, held: Held) -> None:
        """Free a workspace that was built and never taken into use. Local."""
        self._boundary.free(held.raw)

    def close(self) -> None:
        """Free everything after what runs on the device. Local, idempotent, waits no longer than the deadline of a call.

        Raises:
            CommunicatorError: kernels still run at the deadline, because they wait for a lost rank; nothing is freed then, the
                device may still write there.
        """
        held = [*self._held.values(), *self._replaced]
        self._held, self._replaced = {}, []
        if not held:
            return
        if not self._boundary.settle(self._context.device, self._context.timeout):
            _KEPT.extend(held)
            raise CommunicatorError(
                f"{self._context.who} wanted its kernels to end within {self._context.timeout:g} s, found them waiting for a "
                f"lost rank: {sum(h.nbytes for h in held)} bytes of device memory stay until this process ends"
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
