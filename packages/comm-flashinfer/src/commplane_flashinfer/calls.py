"""The data plane: closures over one workspace, one for each (collective, dtype). What a shape needs is decided once.

Each is collective, queues its work on the current stream of the tensor's device and returns. Tensors of any layout are taken;
one that the kernels cannot read as it is goes through a copy. Of a row that they have no launch for they make the sum, of a
format that they do not write the norm, and core's reference does the rest. Nothing here knows whether the peers come: the kernels
wait on the device, without a deadline.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from commplane.api import Collective, QuantFormat, Quantization, Quantized, ReduceOp, add_rms_norm, quantize, refuse_overlap
from commplane.errors import UnsupportedOperation, WorkspaceTooSmall
from commplane_flashinfer import checks
from commplane_flashinfer.order import StreamOrder
from commplane_flashinfer.outputs import outputs
from commplane_flashinfer.patterns import ALL_REDUCE, NORM, QUANTISED, SWIZZLED_128X4, one_shot_limit
from commplane_flashinfer.plans import Planner, Plans

if TYPE_CHECKING:
    from commplane.api import BuildContext

__all__ = ["Built", "Workspaces", "bind"]


class Built(Protocol):
    """A workspace that every rank of the group has."""

    @property
    def raw(self) -> Any:
        """FlashInfer's own."""

    @property
    def max_elements(self) -> int:
        """Tokens x hidden that fit."""

    in_graphs: bool
    """Whether a graph may replay on it: set by calls."""


class Workspaces(Protocol):
    """What is built for a group."""

    @property
    def comm(self) -> Any:
        """The module `flashinfer.comm`."""

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability of the GPUs, one for all ranks."""

    @property
    def order(self) -> StreamOrder:
        """The order of streams that all calls keep to."""

    def get(self, dtype: torch.dtype) -> Built | None:
        """The workspace that serves a dtype."""


class _Target:
    """What the calls of one (collective, dtype) share."""

    def __init__(self, held: Workspaces, context: BuildContext, collective: Collective, dtype: torch.dtype, built: Built) -> None:
        options = context.options
        self.who = f"{context.who} {collective}"
        self.device = torch.device(context.device)
        on_gpu = self.device.type == "cuda"
        self.dtype, self.capability = dtype, held.capability
        whole = built.max_elements * dtype.itemsize
        limit = one_shot_limit(options.get("algorithm", "auto"), whole, context.world_size, held.capability[0])
        self.planner = Planner(self.who, context.world_size, dtype.itemsize, built.max_elements, limit)
        self.order, self.built = held.order, built
        # As tensors say it, and torch's shortcut to the current stream where it has one: 0.1 us, not 1.
        self.index = self.device.index if on_gpu else -1
        self.stream = _current_stream() if on_gpu else (lambda index: 0)
        self.run = partial(
            held.comm.allreduce_fusion,
            workspace=built.raw,
            launch_with_pdl=bool(options.get("pdl", True)),
            trigger_completion_at_end=True,  # False with a one-shot lets the next kernel read what is not there yet
            fp32_acc=True,
        )

    def enter(self) -> None:
        """Order the current stream behind the last call's."""
        stream = self.stream(self.index)
        if stream != self.order.fast and self.order.follow(stream):
            self.built.in_graphs = True

    def dense(self, tensor: Tensor, name: str = "tensor") -> Tensor:
        """It, where the kernels can read its memory in steps of 16 bytes, or a copy."""
        if tensor.get_device() == self.index and tensor.is_contiguous() and not tensor.is_neg() and tensor.data_ptr() % 16 == 0:
            return tensor
        reason = checks.device(name, self.device, tensor.device)
        if reason is not None:
            raise UnsupportedOperation(f"{self.who} {reason}")
        return tensor.detach().resolve_neg().clone(memory_format=torch.contiguous_format)

    # -- the sum

    def sum_into(self) -> Callable[[Tensor, Tensor], None]:
        """Sum a dense tensor into another one, which may be itself."""
        run, plans, enter = partial(self.run, pattern=ALL_REDUCE), Plans(self.planner.sum), self.enter

        def sum_into(dense: Tensor, out: Tensor) -> None:
            plan = plans[dense.shape]
            if not plan.tokens:
                return
            enter()
            if not plan.padded:
                rows = plan.rows
                run(rows(dense), output=rows(out), use_oneshot=plan.one_shot)
                return
            count = dense.numel()
            whole = torch.empty((plan.tokens, plan.hidden), dtype=dense.dtype, device=dense.device)
            flat = whole.view(-1)
            flat[:count].copy_(dense.detach().view(-1))
            flat[count:].zero_()
            run(whole, output=whole, use_oneshot=plan.one_shot)
            out.detach().view(-1).copy_(flat[:count])

        return sum_into

    def all_reduce(self) -> Callable[[Tensor], Tensor]:
        """Into a new tensor."""
        sum_into, dense_of, empty_like = self.sum_into(), self.dense, torch.empty_like

        def all_reduce(tensor: Tensor) -> Tensor:
            dense = dense_of(tensor)
            out = empty_like(dense)
            sum_into(dense, out)
            return out

        return all_reduce

    def all_reduce_(self) -> Callable[[Tensor], Tensor]:
        """In place."""
        sum_into, dense_of, who = self.sum_into(), self.dense, self.who

        def all_reduce_(tensor: Tensor) -> Tensor:
            dense = dense_of(tensor)
            if dense is tensor:
                sum_into(tensor, tensor)
                return tensor
            refuse_overlap(tensor, who)
            sum_into(dense, dense)
            tensor.detach().copy_(dense)
            return tensor

        return all_reduce_

    # -- the fused norm

    def all_reduce_rms_norm(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """The norm and the new residual, as new tensors."""
        dense_of, empty_like, fused = self.dense, torch.empty_like, self._norm_into()

        def all_reduce_rms_norm(
            tensor: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_bias: float
        ) -> tuple[Tensor, Tensor]:
            tensor, residual = dense_of(tensor), dense_of(residual, "residual")
            return fused(tensor, residual, weight, empty_like(tensor), empty_like(tensor), eps, weight_bias)

        return all_reduce_rms_norm

    def all_reduce_rms_norm_(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """The norm into the tensor, the new residual into the residual."""
        dense_of, who, fused = self.dense, self.who, self._norm_into()

        def all_reduce_rms_norm_(
            tensor: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_bias: float
        ) -> tuple[Tensor, Tensor]:
            to, total = dense_of(tensor), dense_of(residual, "residual")
            if to is not tensor:
                refuse_overlap(tensor, who)
            if total is not residual:
                refuse_overlap(residual, who)
            fused(to, total, weight, to, total, eps, weight_bias)
            if to is not tensor:
                tensor.detach().copy_(to)
            if total is not residual:
                residual.detach().copy_(total)
            return tensor, residual

        return all_reduce_rms_norm_

    def _norm_into(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """For dense tensors, into dense tensors that may be the same."""
        run, plans, enter, dense_of = partial(self.run, pattern=NORM), Plans(self.planner.norm), self.enter, self.dense
        composed = self._composed()

        def norm_into(
            tensor: Tensor, residual: Tensor, weight: Tensor, norm: Tensor, total: Tensor, eps: float, weight_bias: float
        ) -> tuple[Tensor, Tensor]:
            plan = plans[tensor.shape]
            if not plan.fused:
                found = composed(tensor, residual, weight, eps, weight_bias)
                norm.detach().copy_(found[0])
                total.detach().copy_(found[1])
                return norm, total
            if not plan.tokens:
                return norm, total
            weight = dense_of(weight, "weight")
            enter()
            rows = plan.rows
            to = rows(norm)
            run(
                rows(tensor),
                output=to,  # not written; else FlashInfer allocates one
                norm_out=to,
                residual_in=rows(residual),
                residual_out=rows(total),
                rms_gamma=weight,
                rms_eps=eps,
                weight_bias=weight_bias,
                use_oneshot=plan.one_shot,
            )
            return norm, total

        return norm_into

    def _composed(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """The sum by the kernels, the rest by core."""
        all_reduce = self.all_reduce()

        def composed(tensor: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_bias: float) -> tuple[Tensor, Tensor]:
            return add_rms_norm(all_reduce(tensor), residual, weight, eps, weight_bias)

        return composed

    # -- the fused norm, quantised

    def all_reduce_rms_norm_quant(self) -> Callable[..., tuple[Quantized, Tensor | None, Tensor]]:
        """The quantised norm, the norm if it is wanted, and the new residual, as new tensors."""
        run, enter, dense_of, norm_call = self.run, self.enter, self.dense, self.all_reduce_rms_norm()
        empty_like, device, who = torch.empty_like, self.device, self.who
        by_group: dict[int, Plans] = {}
        refused = {f: checks.format_served(f, *self.capability) for f in QuantFormat}
        # The kernels have nvfp4 of 16-bit types alone.
        apart = {QuantFormat.NVFP4} if self.dtype is torch.float32 else set()

        def all_reduce_rms_norm_quant(
            tensor: Tensor,
            residual: Tensor,
            weight: Tensor,
            eps: float,
            weight_bias: float,
            how: Quantization,
            keep_norm: bool,
        ) -> tuple[Quantized, Tensor | None, Tensor]:
            form = how.format
            reason = refused[form]
            if reason is not None:
                raise UnsupportedOperation(f"{who} {reason}")
            group = how.group if form is QuantFormat.FP8_GROUP else 0
            plans = by_group.get(group)
            if plans is None:
                plans = by_group[group] = Plans(partial(self.planner.norm, group=group))
            tensor, residual = dense_of(tensor), dense_of(residual, "residual")
            shape = tensor.shape
            plan = plans[shape]
            if not plan.fused or not plan.tokens or form in apart:
                norm, total = norm_call(tensor, residual, weight, eps, weight_bias)
                return quantize(norm, how), norm if keep_norm else None, total
            weight = dense_of(weight, "weight")
            values, scales, scale_out = outputs(how, shape, plan.tokens, device)
            total, rows = empty_like(tensor), plan.rows
            written = rows(total)
            kept = empty_like(tensor) if keep_norm else None
            pattern = QUANTISED[form]
            enter()
            run(
                rows(tensor),
                pattern=pattern.with_norm if keep_norm else pattern.alone,
                output=written,  # not written; else FlashInfer allocates one
                norm_out=kept if kept is None else rows(kept),
                quant_out=values.view(plan.tokens, -1) if plan.reshaped else values,
                scale_out=scale_out,
                scale_factor=how.scale,
                layout_code=SWIZZLED_128X4,
                block_quant_group_size=group or None,
                residual_in=rows(residual),
                residual_out=written,
                rms_gamma=weight,
                rms_eps=eps,
                weight_bias=weight_bias,
                use_oneshot=plan.one_shot,
            )
            return Quantized(form, values, scales), kept, total

        return all_reduce_rms_norm_quant


def _current_stream() -> Callable[[int], int]:
    shortcut: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return shortcut or (lambda index: int(torch.cuda.current_stream(index).cuda_stream))


def bind(
    held: Workspaces,
    context: BuildContext,
    collective: Collective,
    op: ReduceOp | None,
    dtype: torch.dtype | None,
    *,
    in_place: bool,
) -> Callable[..., Any]:
    """The callable of one (collective, dtype), as `CommBackend.bind` describes it. Local.

    What can never be served raises here; what only lacks a workspace gives a callable that says so, because a table is bound
    before `prepare()` too.

    Raises:
        UnsupportedOperation: an op, dtype or number of ranks that the kernels do not have.
    """
    who = f"{context.who} {collective}"
    name = str(dtype).removeprefix("torch.")
    reason = checks.world_size(context.world_size) or checks.dtype(name)
    if reason is None and collective is Collective.ALL_REDUCE and op is not ReduceOp.SUM:
        reason = f"wanted the op sum, found {op}: use another backend for it"
    methods: dict[tuple[Collective, bool], Callable[[_Target], Callable[..., Any]]] = {
        (Collective.ALL_REDUCE, False): _Target.all_reduce,
        (Collective.ALL_REDUCE, True): _Target.all_reduce_,
        (Collective.ALL_REDUCE_RMS_NORM, False): _Target.all_reduce_rms_norm,
        (Collective.ALL_REDUCE_RMS_NORM, True): _Target.all_reduce_rms_norm_,
        (Collective.ALL_REDUCE_RMS_NORM_QUANT, False): _Target.all_reduce_rms_norm_quant,
    }
    method = methods.get((collective, in_place))
    if reason is None and method is None:
        reason = f"{'in place ' if in_place else ''}is not served: use another backend for it"
    if reason is not None or method is None or dtype is None:
        raise UnsupportedOperation(f"{who} {reason}")
    built = held.get(dtype)
    if built is not None:
        return method(_Target(held, context, collective, dtype, built))

    def unprepared(tensor: Tensor, *rest: Any) -> Any:
        raise WorkspaceTooSmall(f"{who} wanted a workspace for {name}, found none: call prepare() before the first call")

    return unprepared
