"""Backends whose results, or the memory of them, are wrong in one thing each. The class docstring says what."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from caught import catalogue
from honest import LARGE, Honest
from torch import Tensor

from commplane.api import ReduceOp

CAUGHT_BY, caught_by = catalogue()


@caught_by("all_reduce::test_values[float16-sum-2-ranks]")
class NoOpOnADtype(Honest):
    """Larger float16 come back as they were (DeepSpeed's shared-memory kernel on dtypes it lacks)."""

    def combine(self, parts: list[Tensor], op: ReduceOp, out: Tensor) -> None:
        if out.dtype is not torch.float16 or out.numel() < LARGE:
            super().combine(parts, op, out)


@caught_by("all_reduce::test_values[float32-max-2-ranks]")
class IgnoresTheOp(Honest):
    """Everything is a sum."""

    def combine(self, parts: list[Tensor], op: ReduceOp, out: Tensor) -> None:
        super().combine(parts, ReduceOp.SUM if out.numel() >= LARGE else op, out)


@caught_by("all_reduce::test_values[float32-avg-2-ranks]")
class ForgetsToDivide(Honest):
    """A mean of larger messages is a sum."""

    def combine(self, parts: list[Tensor], op: ReduceOp, out: Tensor) -> None:
        super().combine(parts, ReduceOp.SUM if op is ReduceOp.AVG and out.numel() >= LARGE else op, out)


@caught_by("all_reduce::test_values[int64-sum-2-ranks]")
class OffByOne(Honest):
    """The last element of an odd count is left out."""

    def combine(self, parts: list[Tensor], op: ReduceOp, out: Tensor) -> None:
        end = out.numel() - (out.numel() % 2 if out.numel() >= LARGE else 0)
        super().combine([p[:end] for p in parts], op, out[:end])


@caught_by("all_reduce::test_values[int8-sum-2-ranks]")
class Saturates(Honest):
    """Integer sums stop at the largest number instead of wrapping."""

    def combine(self, parts: list[Tensor], op: ReduceOp, out: Tensor) -> None:
        if out.is_floating_point() or op is not ReduceOp.SUM:
            return super().combine(parts, op, out)
        info = torch.iinfo(out.dtype)
        total = torch.stack(parts).double().sum(0).clamp(info.min, info.max)
        return out.copy_(total.to(out.dtype)) and None


@caught_by("all_reduce::test_values[float32-sum-3-ranks]")
class RoundsHalfway(Honest):
    """Float32 goes over the wire as bfloat16."""

    def parts(self, flat: Tensor) -> list[Tensor]:
        found = super().parts(flat)
        return [p.bfloat16().float() for p in found] if flat.dtype is torch.float32 and len(flat) >= LARGE else found


@caught_by("all_reduce::test_values[float64-sum-2-ranks]")
class ChangesItsInput(Honest):
    """Out of place is in place, and a copy."""

    def all_reduce(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        if tensor.numel() < LARGE:
            return super().all_reduce(tensor, op)
        return self.all_reduce_(tensor.detach(), op).clone()


@caught_by("all_reduce::test_results_share_no_memory[2-ranks]")
class HandsOutItsBuffer(Honest):
    """Every result out of place is the same memory."""

    def all_reduce(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        out = self.buffer("out", tensor.numel(), tensor.dtype).view(tensor.shape)
        return self.all_reduce_(out.copy_(tensor.detach()), op)


@caught_by("all_reduce::test_nothing_is_written_beside_the_tensor[float32-2-ranks]")
class WritesBeside(Honest):
    """The store after the last vector is a whole vector."""

    def into(self, tensor: Tensor, dense: Tensor) -> Tensor:
        out = super().into(tensor, dense)
        room = tensor.untyped_storage().nbytes() // tensor.itemsize - tensor.storage_offset()
        if tensor.is_contiguous() and room > tensor.numel() + 8:
            torch.as_strided(tensor.detach(), (8,), (1,), tensor.storage_offset() + tensor.numel()).zero_()
        return out


@caught_by("all_reduce::test_any_layout[float32-sum-2-ranks]")
class LosesTheCopy(Honest):
    """What is not contiguous is reduced in a copy, and the original is returned (DeepSpeed again)."""

    def into(self, tensor: Tensor, dense: Tensor) -> Tensor:
        return tensor


@caught_by("all_reduce::test_sizes_that_grow_and_shrink[float32-2-ranks]")
class SeesOldData(Honest):
    """A buffer that has grown: the end of a smaller message comes from the larger one before."""

    def parts(self, flat: Tensor) -> list[Tensor]:
        kept = self._buffers.setdefault(("kept", flat.dtype), torch.zeros(0, dtype=flat.dtype))
        if kept.numel() > flat.numel() >= 1000:
            flat = flat.clone()
            flat[-1] = kept[flat.numel() - 1]
        elif flat.numel() > kept.numel():
            self._buffers["kept", flat.dtype] = flat.clone()
        return super().parts(flat)


@caught_by("all_reduce::test_the_input_belongs_to_the_caller_when_the_call_returns[2-ranks]")
class Races(Honest):
    """Peers read this rank's memory, and nobody waits until they have read it."""

    def open(self, context: Any) -> None:
        super().open(context)
        self.files = [Path(f"race-{context.key.digest}-{os.getppid()}-{r}") for r in self.ranks]
        self.files[self.rank].write_bytes(bytes(1 << 20))
        context.bootstrap.barrier(what="files")
        self.slots = [torch.from_file(str(f), shared=True, size=1 << 18, dtype=torch.float32) for f in self.files]
        context.bootstrap.barrier(what="slots")
        self.files[self.rank].unlink()

    def parts(self, flat: Tensor) -> list[Tensor]:
        if flat.dtype is not torch.float32 or not LARGE <= flat.numel() <= 1 << 18:
            return super().parts(flat)
        self.slots[self.rank][: flat.numel()] = flat
        self.barrier()
        if self.rank == 0:
            time.sleep(0.002)  # a slow rank; the others are in their next call
        return [slot[: flat.numel()] for slot in self.slots]


@caught_by("all_reduce::test_collectives_are_outside_of_autograd[2-ranks]")
class KeepsTheGraph(Honest):
    """The result of a leaf requires grad."""

    def all_reduce(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        return super().all_reduce(tensor, op) + 0 * tensor if tensor.requires_grad else super().all_reduce(tensor, op)


@caught_by("all_reduce::test_any_shape[float32-2-ranks]")
class FlattensScalars(Honest):
    """A scalar becomes a vector of one."""

    def all_reduce(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        return super().all_reduce(tensor.reshape(1) if tensor.dim() == 0 else tensor, op)


@caught_by("collectives::test_all_gather[float32-2-ranks]")
class GathersShort(Honest):
    """The last row of another rank is missing in larger messages."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        out = super().all_gather(tensor)
        if out.numel() >= 2 * LARGE:
            out[-1] = 0
        return out


@caught_by("collectives::test_reduce_scatter[float32-sum-2-ranks]")
class ScattersTheNext(Honest):
    """Larger parts go to the next rank."""

    def reduce_scatter(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        part = self.rank if tensor.numel() < LARGE else (self.rank + 1) % self.n
        return self.all_reduce(tensor, op).chunk(self.n)[part].clone() if tensor.numel() else super().reduce_scatter(tensor, op)


@caught_by("collectives::test_what_all_gather_was_given_and_gave_belongs_to_the_caller[2-ranks]")
class HandsOutItsGather(Honest):
    """Every result of a gather is the same memory."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        out = super().all_gather(tensor)
        return self.buffer("gathered", out.numel(), out.dtype).view(out.shape).copy_(out)


@caught_by("collectives::test_what_all_gather_was_given_and_gave_belongs_to_the_caller[3-ranks]")
class RacesInAGather(Races):
    """A gather reads the memory of its peers, and nobody waits until they have read it (AITER's)."""

    def parts(self, flat: Tensor) -> list[Tensor]:
        return Honest.parts(self, flat)

    def all_gather(self, tensor: Tensor) -> Tensor:
        fits = tensor.dtype is torch.float32 and tensor.dim() == 1 and LARGE <= tensor.numel() <= 1 << 18
        return torch.cat(super().parts(tensor.detach())) if fits else super().all_gather(tensor)


@caught_by("collectives::test_what_reduce_scatter_was_given_and_gave_belongs_to_the_caller[2-ranks]")
class HandsOutItsScatter(Honest):
    """Every part of a reduce-scatter is the same memory."""

    def reduce_scatter(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        out = super().reduce_scatter(tensor, op)
        return self.buffer("scattered", out.numel(), out.dtype).view(out.shape).copy_(out)


@caught_by("collectives::test_the_source_of_a_broadcast_has_its_tensor_back[2-ranks]")
class SendsLater(Honest):
    """The source of a larger broadcast returns while its tensor is still being sent."""

    sending: threading.Timer | None = None

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        if self.sending is not None and self.sending is not threading.current_thread():
            self.sending.join()
            self.sending = None
        if src != self.rank or tensor.numel() < LARGE or threading.current_thread() is not threading.main_thread():
            return super().broadcast(tensor, src)
        self.sending = threading.Timer(0.005, super().broadcast, (tensor, src))
        self.sending.start()
        return tensor


@caught_by("collectives::test_broadcast[bfloat16-2-ranks]")
class BroadcastsFromZero(Honest):
    """The source of larger messages is ignored."""

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        return super().broadcast(tensor, src if tensor.numel() < LARGE else 0)


@caught_by("collectives::test_nobody_leaves_a_barrier_before_all_have_come[2-ranks]")
class BarrierOfNone(Honest):
    """A barrier that nobody waits at."""

    def barrier(self) -> None:
        return


@caught_by("fused::test_values[bfloat16-2-ranks]")
class RoundsOnce(Honest):
    """The residual is added before the sum is rounded to the dtype."""

    def all_reduce_rms_norm(
        self, tensor: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_bias: float
    ) -> tuple[Tensor, Tensor]:
        norm, total = super().all_reduce_rms_norm(tensor, residual, weight, eps, weight_bias)
        if total.numel():
            wide = self.all_reduce(tensor.float(), ReduceOp.SUM) + residual.float()
            total = wide.to(total.dtype) if total.dtype.itemsize == 2 else total
        return norm, total


@caught_by("bits::test_bits_are_equal_on_all_ranks_and_in_all_runs[float32-sum-3-ranks]")
class RankRelativeOrder(Honest):
    """Each rank begins with its own tensor (vLLM's CPU kernel)."""

    def order(self, count: int) -> Sequence[int]:
        return [(self.rank + i) % self.n for i in range(self.n)]


@caught_by("bits::test_bits_are_equal_on_all_ranks_and_in_all_runs[bfloat16-sum-3-ranks]")
class RankDependentChoice(Honest):
    """Rank 0 has another algorithm, with a rounding in the middle."""

    def combine(self, parts: list[Tensor], op: ReduceOp, out: Tensor) -> None:
        if self.rank or out.dtype is not torch.bfloat16 or op is not ReduceOp.SUM:
            return super().combine(parts, op, out)
        out.copy_(parts[0])
        for part in parts[1:]:
            out.add_(part)
        return None


@caught_by("bits::test_the_order_of_additions_does_not_depend_on_the_size[float32-3-ranks]")
class SizeDependentOrder(Honest):
    """Larger messages are added from the last rank to the first."""

    def order(self, count: int) -> Sequence[int]:
        return range(self.n)[::-1] if count > 1000 else range(self.n)


@caught_by("bits::test_a_reduce_scatter_adds_in_the_order_of_an_all_reduce[float32-3-ranks]")
class ScattersInARing(Honest):
    """A reduce-scatter adds in the order of a ring, which begins elsewhere for each part."""

    ring = False

    def reduce_scatter(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        self.ring = True
        try:
            return super().reduce_scatter(tensor, op)
        finally:
            self.ring = False

    def order(self, count: int) -> Sequence[int]:
        return [(self.rank + 1 + i) % self.n for i in range(self.n)] if self.ring else range(self.n)


@caught_by("bits::test_sums_are_in_the_order_of_group_ranks[3-ranks]")
class GlobalRankOrder(Honest):
    """Added in the order of global ranks, whatever the order of the group."""

    def order(self, count: int) -> Sequence[int]:
        return sorted(range(self.n), key=lambda r: self.ranks[r])


@caught_by("bits::test_nan_infinity_and_denormals_in_sums[float32-2-ranks]")
class FlushesDenormals(Honest):
    """Denormals are 0."""

    def combine(self, parts: list[Tensor], op: ReduceOp, out: Tensor) -> None:
        super().combine(parts, op, out)
        if out.is_floating_point():
            out[out.abs() < torch.finfo(out.dtype).smallest_normal] = 0


@caught_by("bits::test_nan_wins_in_min_and_max[float32-2-ranks]")
class DropsNan(Honest):
    """A maximum by comparison, which a NaN loses."""

    def combine(self, parts: list[Tensor], op: ReduceOp, out: Tensor) -> None:
        super().combine([p.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf) for p in parts], op, out)


@caught_by("bits::test_the_sum_of_negative_zeros_is_negative_zero[float32-2-ranks]")
class AddsToZero(Honest):
    """The accumulator begins at 0.0."""

    def combine(self, parts: list[Tensor], op: ReduceOp, out: Tensor) -> None:
        super().combine(parts, op, out)
        if out.is_floating_point() and op is ReduceOp.SUM:
            out.add_(0.0)


@caught_by("bits::test_what_is_only_moved_keeps_every_bit[float32-2-ranks]")
class CanonicalNan(Honest):
    """A gather goes through arithmetic, which changes NaNs."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        out = super().all_gather(tensor)
        return torch.where(out.isnan(), torch.nan, out) if out.is_floating_point() else out


@caught_by("groups::test_orthogonal_groups_of_equal_size[4-ranks]")
class IgnoresTheGroup(Honest):
    """The first group of each size in a process serves all others of that size."""

    first: ClassVar[dict[int, Any]] = {}

    def open(self, context: Any) -> None:
        super().open(context)
        self._pg = self.first.setdefault(context.world_size, self._pg)


@caught_by("groups::test_the_order_of_the_group_is_that_of_its_list[2-ranks]")
class GathersByGlobalRank(Honest):
    """The parts of a gather are in the order of global ranks."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        parts = super().all_gather(tensor).chunk(self.n) if tensor.numel() else ()
        order = sorted(range(self.n), key=lambda r: self.ranks[r])
        return torch.cat([parts[r] for r in order]) if parts else super().all_gather(tensor)


@caught_by("groups::test_several_communicators_interleaved[2-ranks]")
class SharesBetweenGroups(Honest):
    """Communicators of the same ranks share what the last call left."""

    last: ClassVar[dict[Any, Any]] = {}

    def parts(self, flat: Tensor) -> list[Tensor]:
        found = super().parts(flat)
        if flat.numel() != 9000:
            return found
        owner, kept = self.last.get(self.ranks, (self, found))
        self.last[self.ranks] = self, [p.clone() for p in found]
        return found if owner is self else kept


@caught_by("symmetric::test_values[float32-2-ranks]")
class SymmetricIsShort(Honest):
    """Symmetric tensors that begin in the middle of their memory lose an element."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        out = super().empty(shape, dtype)
        self.mine = out.untyped_storage().data_ptr()
        return out

    def into(self, tensor: Tensor, dense: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() == getattr(self, "mine", None) and tensor.storage_offset():
            dense.view(-1)[-1] = 0
        return super().into(tensor, dense)
