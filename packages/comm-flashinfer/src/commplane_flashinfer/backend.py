"""FlashInfer as a `CommBackend`: what it serves, when its workspaces are built, and when they go."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from commplane.api import (
    Bootstrap,
    BuildContext,
    Collective,
    CommBackend,
    QuantFormat,
    Quantization,
    Quantized,
    ReduceOp,
    Requirement,
    SizeRange,
    Workspace,
)
from commplane.errors import CommplaneError, UnsupportedOperation
from commplane_flashinfer import calls, capacity, checks, topology
from commplane_flashinfer.boundary import Boundary
from commplane_flashinfer.exchange import Exchange
from commplane_flashinfer.settings import Settings
from commplane_flashinfer.topology import Card
from commplane_flashinfer.workspace import Grown, Workspaces, itemsize

if TYPE_CHECKING:
    import torch

__all__ = ["FlashInfer"]

_FUSED = (Collective.ALL_REDUCE, Collective.ALL_REDUCE_RMS_NORM, Collective.ALL_REDUCE_RMS_NORM_QUANT)


class FlashInfer(CommBackend):
    """FlashInfer's trtllm kernels over the group of one communicator.

    Its kernels wait for their peers on the device without a deadline: a rank that is lost in a call leaves the others' GPUs
    spinning until their processes end. `close` has a deadline all the same, and says what it could not free.
    """

    boundary: ClassVar[Callable[[], Boundary]] = Boundary

    def __init__(self) -> None:
        self._workspaces: Workspaces | None = None
        self._bound: dict[Any, Callable[..., Any]] = {}

    # Life.

    def open(self, context: BuildContext) -> None:
        """Load the kernels, agree that the GPUs will do, build workspaces for what the settings declare. Collective."""
        self._context = context
        self._settings = Settings.of(context.options, context.world_size, context.who)
        exchange = Exchange(context.bootstrap, f"[{context.key.purpose} {context.backend}] opening")
        boundary, card, problem = self._arrive(context)
        cards = exchange.agree(problem, card)
        assert boundary is not None and card is not None
        linked, problem = self._links(boundary, card, cards)
        links = exchange.agree(problem, linked)
        # From what all have gathered: every rank finds the same, and leaves with it.
        exchange.agree(topology.refusal(cards, links, context.ranks, self._settings.any_topology))
        self._card = card
        self._workspaces = Workspaces(context, boundary, card.capability, context.options["max_workspace_bytes"])
        for single, elements in enumerate(self._settings.at_open):
            self._workspaces.take(bool(single), self._workspaces.build(bool(single), elements))

    def _arrive(self, context: BuildContext) -> tuple[Boundary | None, Card | None, str | None]:
        """FlashInfer, imported and with its kernels loaded, and this rank's card; or why not. Local."""
        try:
            boundary = type(self).boundary()
            boundary.load()
            return boundary, boundary.card(context.device), None
        except Exception as error:  # imports and compilers raise anything; it becomes a vote
            return None, None, f"flashinfer does not load: {_line(error)}"

    def _links(self, boundary: Boundary, card: Card, cards: Sequence[Card]) -> tuple[list[str], str | None]:
        """The cards that this one has NVLink to, or why that cannot be told. Local."""
        if self._settings.any_topology:
            return [], None
        try:
            return boundary.linked(card.uuid, [c.uuid for c in cards]), None
        except Exception as error:  # NVML raises classes of its own
            return (
                [],
                f"cannot tell whether there is NVLink between the GPUs: {_line(error)}; set flashinfer.any_topology=true to run",
            )

    def close(self) -> None:
        """Free the workspaces after what runs on the device. Local, idempotent, bounded by the deadline of a call."""
        workspaces, self._workspaces = self._workspaces, None
        self._bound.clear()
        if workspaces is not None:
            workspaces.close()

    def init_workspace(self, requirements: Sequence[Requirement]) -> list[Workspace]:
        """Larger workspaces where `requirements` need them, up to what the settings allow. Collective.

        Larger messages than the settings allow go to another backend, so nothing is built for them.
        """
        workspaces = self._open()
        needs = {False: 0, True: 0}
        for need in requirements:
            single = need.dtype == "float32"
            if need.collective in _FUSED and need.dtype in ("float32", "float16", "bfloat16"):
                elements = capacity.rounded(-(-need.max_bytes // itemsize(single)))
                needs[single] = max(needs[single], min(elements, self._settings.most[single]))
        built: list[Workspace] = []
        try:
            for single, elements in needs.items():
                if elements > workspaces.elements(single):
                    built.append(Grown(workspaces, single, workspaces.build(single, elements)))
        except BaseException:
            for one in built:
                one.close()
            raise
        self._bound.clear()
        return built

    # What it serves.

    def ranges(self, collective: Collective, dtype: str, capturing: bool = False) -> list[SizeRange]:
        """Up to the largest message of the settings. Local; from settings, so equal on all ranks."""
        single = dtype == "float32"
        return [SizeRange(0, self._settings.most[single] * itemsize(single) + 1)]

    def formats(self) -> Collection[str]:
        """Those that the GPUs have kernels for. Local."""
        return [str(f) for f in QuantFormat if checks.format_served(f, *self._card.capability) is None]

    def capture_begin(self) -> None:
        """From here on the workspaces see every call. Local."""
        self._open().capture(True)

    def capture_end(self, bootstrap: Bootstrap) -> None:
        """Nothing to exchange: the kernels are on memory that is mapped already, and what was called on in the capture stays."""
        self._open().capture(False)

    # Calls.

    def bind(
        self, collective: Collective, op: ReduceOp | None, dtype: torch.dtype | None, *, in_place: bool
    ) -> Callable[..., Any]:
        """A closure over the workspace of `dtype` (`commplane_flashinfer.calls`)."""
        return calls.bind(self._open(), self._context, collective, op, dtype, in_place=in_place)

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """Sum in place; any shape and layout."""
        return self._call(Collective.ALL_REDUCE, op, tensor.dtype, True)(tensor)  # type: ignore[no-any-return]

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """Sum out of place; any shape and layout."""
        return self._call(Collective.ALL_REDUCE, op, tensor.dtype, False)(tensor)  # type: ignore[no-any-return]

    def all_reduce_rms_norm(
        self, tensor: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum, the residual and the norm in one kernel."""
        call = self._call(Collective.ALL_REDUCE_RMS_NORM, None, tensor.dtype, False)
        return call(tensor, residual, weight, eps, weight_bias)  # type: ignore[no-any-return]

    def all_reduce_rms_norm_quant(
        self,
        tensor: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
        how: Quantization,
        keep_norm: bool,
    ) -> tuple[Quantized, torch.Tensor | None, torch.Tensor]:
        """The same with the norm quantised, in one kernel."""
        call = self._call(Collective.ALL_REDUCE_RMS_NORM_QUANT, None, tensor.dtype, False)
        return call(tensor, residual, weight, eps, weight_bias, how, keep_norm)  # type: ignore[no-any-return]

    def _call(self, collective: Collective, op: ReduceOp | None, dtype: torch.dtype, in_place: bool) -> Callable[..., Any]:
        key = (collective, op, dtype, in_place)
        if key not in self._bound:
            self._bound[key] = self.bind(collective, op, dtype, in_place=in_place)
        return self._bound[key]

    def _open(self) -> Workspaces:
        if self._workspaces is None:
            raise UnsupportedOperation(f"{type(self).__name__} wanted to be open, found closed: create the communicator again")
        return self._workspaces


def _line(error: Exception) -> str:
    return str(error) if isinstance(error, CommplaneError) else f"{type(error).__name__}: {' '.join(str(error).split())}"
