"""Every collective that goes to a communicator, on every kind of tensor, against what each rank says that it put in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from c10d_world import World, oracle

pytestmark = pytest.mark.timeout(90)

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int8, torch.uint8, torch.int32, torch.int64]
MOVED = [*FLOATS, *INTEGERS, torch.bool, torch.int16, torch.complex64, torch.complex128]
"""What all_gather and broadcast take: any dtype, as bytes where the plan has no other way."""

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dense": lambda t: t,
    "transposed": lambda t: t.view(4, 6).t(),
    "every other": lambda t: t.repeat_interleave(2)[::2],
    "channels last": lambda t: t.view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    "view of a larger one": lambda t: torch.cat([t.view(4, 6), t.view(4, 6)], 1)[:, 3:9],
    "scalar": lambda t: t[5].clone(),
    "empty": lambda t: t[:0].view(0, 3).clone(),
    "odd offset": lambda t: torch.cat([t, t])[1:18],
    "requires grad": lambda t: t.clone().requires_grad_(t.is_floating_point() or t.is_complex()),
}


def data(rank: int, dtype: torch.dtype, count: int = 24) -> torch.Tensor:
    """Small whole numbers, other ones on each rank: sums are exact in every dtype."""
    numbers = (torch.arange(count) * (rank + 1) + rank) % 11
    return (numbers % 2 == 0) if dtype is torch.bool else numbers.to(dtype)


def everyone(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What each rank has, by way of Gloo and pickle."""
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, tensor.detach().clone(), group=oracle())
    return out


def same(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape, (what, found, wanted)
    assert torch.equal(found.detach().cpu(), wanted), (what, found, wanted)


def reduced(tensors: list[torch.Tensor], op: str) -> torch.Tensor:
    stacked = torch.stack(tensors)
    if op == "sum":
        return stacked.sum(0, dtype=stacked.dtype)
    if op == "avg":
        return (stacked.double().sum(0) / len(tensors)).to(stacked.dtype)
    return stacked.amin(0) if op == "min" else stacked.amax(0)


OPS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX, "avg": dist.ReduceOp.AVG}


def check_all_reduce(rank: int) -> int:
    count = 0
    for dtype in [*FLOATS, *INTEGERS]:
        for layout, make in LAYOUTS.items():
            for name, op in OPS.items():
                if name == "avg" and not dtype.is_floating_point:
                    continue
                for later in (False, True):
                    tensor = make(data(rank, dtype))
                    wanted = reduced(everyone(tensor), name)
                    stride = tensor.stride()
                    work = dist.all_reduce(tensor, op, async_op=later)
                    if later:
                        assert work.wait() and work.is_completed()
                    same(tensor, wanted, f"{dtype} {layout} {name} {later}")
                    assert tensor.stride() == stride
                    count += 1
    return count


def test_all_reduce_of_every_dtype_layout_and_op_is_what_the_ranks_put_in(pair: World) -> None:
    assert pair.run(check_all_reduce) == [504, 504]


def check_moves(rank: int) -> None:
    n = dist.get_world_size()
    for dtype in MOVED:
        for layout, make in LAYOUTS.items():
            for later in (False, True):
                what = f"{dtype} {layout} {later}"
                tensor = make(data(rank, dtype))
                said = everyone(tensor)

                outs = [torch.zeros_like(tensor, requires_grad=False) for _ in range(n)]
                work = dist.all_gather(outs, tensor, async_op=later)
                if later:
                    work.wait()
                for out, wanted in zip(outs, said, strict=True):
                    same(out, wanted, f"all_gather {what}")

                flat = torch.zeros(n * tensor.numel(), dtype=dtype)
                if tensor.is_contiguous():  # which torch asks of it
                    work = dist.all_gather_into_tensor(flat, tensor.detach(), async_op=later)
                    if later:
                        work.wait()
                    same(flat, torch.cat([s.reshape(-1) for s in said]), f"all_gather_into_tensor {what}")

                for src in range(n):
                    tensor = make(data(rank, dtype))
                    work = dist.broadcast(tensor, src, async_op=later)
                    if later:
                        work.wait()
                    same(tensor, said[src], f"broadcast {src} {what}")


def test_all_gather_and_broadcast_of_every_dtype_and_layout_keep_every_element(pair: World) -> None:
    pair.run(check_moves)


def check_reduce_scatter(rank: int) -> None:
    n = dist.get_world_size()
    for dtype in [*FLOATS, *INTEGERS]:
        for name, op in OPS.items():
            if name == "avg" and not dtype.is_floating_point:
                continue
            for later in (False, True):
                tensor = data(rank, dtype)
                wanted = reduced(everyone(tensor), name).chunk(n)[rank]
                out = torch.zeros(24 // n, dtype=dtype)
                work = dist.reduce_scatter_tensor(out, tensor, op, async_op=later)
                if later:
                    work.wait()
                same(out, wanted, f"reduce_scatter_tensor {dtype} {name}")
                pieces = [p.view(3, -1).t() for p in tensor.chunk(n)]
                out = torch.zeros(24 // n // 3, 3, dtype=dtype)
                work = dist.reduce_scatter(out, pieces, op, async_op=later)
                if later:
                    work.wait()
                same(out, wanted.view(3, -1).t(), f"reduce_scatter {dtype} {name}")


def test_reduce_scatter_of_every_dtype_and_op_is_the_part_of_this_rank(pair: World) -> None:
    pair.run(check_reduce_scatter)


def check_complex(rank: int) -> None:
    for dtype in (torch.complex64, torch.complex128):
        for name, tensor in {
            "dense": torch.complex(data(rank, torch.float64), data(rank, torch.float64) + 1).to(dtype),
            "conjugate": torch.complex(data(rank, torch.float64), data(rank, torch.float64) + 1).to(dtype).conj(),
        }.items():
            said = everyone(tensor.resolve_conj())
            if name == "dense":
                through_front = tensor.clone()
                dist.all_reduce(through_front)
                same(through_front, said[0] + said[1], name)
            straight = tensor.clone() if name == "dense" else tensor.resolve_conj().conj().conj()
            dist.group.WORLD.allreduce([straight]).wait()
            same(straight, said[0] + said[1], name)


def test_complex_tensors_are_summed_part_by_part(pair: World) -> None:
    pair.run(check_complex)


def check_complex_together(rank: int) -> None:
    """Several at once; rank 1 alone has a conjugate view, which decides nothing."""
    group = dist.group.WORLD
    parts = [torch.complex(data(r, torch.float64), data(r, torch.float64) + 1) for r in range(2)]
    numbers = [data(r, torch.float64) for r in range(2)]
    mine = parts[rank].clone() if rank == 0 else parts[rank].conj().resolve_conj().conj()
    assert mine.is_conj() == (rank == 1)
    real, cut = numbers[rank].clone(), parts[rank].repeat(2)[::2]
    group.allreduce_coalesced([mine, real, cut]).wait()
    same(mine.resolve_conj(), parts[0] + parts[1], "conjugate on one rank")
    same(real, numbers[0] + numbers[1], "real beside it")
    same(cut, (parts[0] + parts[1]).repeat(2)[::2], "every other element")
    with pytest.raises(RuntimeError):  # torch's own word for it: complex numbers have no order
        group.allreduce_coalesced([parts[rank].clone()], dist.ReduceOp.MIN).wait()


def test_complex_tensors_go_together_with_real_ones_whatever_views_a_rank_has(pair: World) -> None:
    pair.run(check_complex_together)


def check_inference(rank: int) -> None:
    with torch.inference_mode():
        dense, cut = data(rank, torch.float32), data(rank, torch.float32).view(4, 6).t()
        gathered = torch.zeros(48)
    said = everyone(data(rank, torch.float32))
    for later in (False, True):
        # Also outside of the mode, and in a thread that knows nothing of it.
        for tensor in (dense, cut):
            before = everyone(tensor.clone())
            work = dist.all_reduce(tensor, async_op=later)
            if later:
                work.get_future().wait()
            same(tensor, before[0] + before[1], f"{later}")
        work = dist.all_gather_into_tensor(gathered, data(rank, torch.float32), async_op=later)
        if later:
            work.get_future().wait()
        same(gathered, torch.cat(said), "gather")
        source = cut.clone()
        dist.broadcast(cut, 1)
        same(cut, everyone(source)[1], "broadcast")


def test_tensors_of_inference_mode_may_be_written_to(pair: World) -> None:
    pair.run(check_inference)


def check_inference_on_one_rank(rank: int) -> None:
    """As a model's output that is sent to ranks which made an empty tensor for it."""
    for modal in (0, 1):
        for cut in (False, True):
            for later in (False, True):
                for what in ("broadcast from 0", "broadcast from 1", "all_reduce", "all_gather"):
                    with torch.inference_mode(mode=rank == modal):
                        tensor, gathered = data(rank, torch.float32), torch.zeros(48)
                        tensor = tensor.view(4, 6).t() if cut else tensor
                    said = [t.clone() for t in (data(0, torch.float32), data(1, torch.float32))]
                    said = [t.view(4, 6).t() for t in said] if cut else said
                    if what == "all_reduce":
                        work = dist.all_reduce(tensor, async_op=later)
                    elif what == "all_gather":
                        work = dist.all_gather_into_tensor(gathered, tensor.contiguous(), async_op=later)
                    else:
                        work = dist.broadcast(tensor, int(what[-1]), async_op=later)
                    if later:
                        work.wait()
                    if what == "all_gather":
                        same(gathered, torch.cat([s.reshape(-1) for s in said]), what)
                    else:
                        same(
                            tensor, said[0] + said[1] if what == "all_reduce" else said[int(what[-1])], f"{what} {modal} {later}"
                        )


def test_a_tensor_of_inference_mode_on_one_rank_meets_a_plain_one_on_another(pair: World) -> None:
    pair.run(check_inference_on_one_rank)


def check_aliases(rank: int) -> None:
    n = dist.get_world_size()
    group = dist.group.WORLD
    x = data(rank, torch.float32)
    said = everyone(x)
    total = said[0] + said[1]

    twice = x.clone()
    group.allreduce_coalesced([twice, twice]).wait()  # one tensor, twice in the list: summed once
    same(twice, total, "the same tensor twice")

    whole = x.clone()
    group.allreduce_coalesced([whole[:16], whole[8:]]).wait()
    same(whole, total, "views that overlap")

    whole = x.clone()
    group.allreduce_coalesced([whole[::2], whole[1::2], torch.full((3,), rank)]).wait()
    same(whole, total, "views between each other, and an integer")

    out = torch.zeros(n * 24)
    out[rank * 24 : (rank + 1) * 24] = x
    dist.all_gather_into_tensor(out, out[rank * 24 : (rank + 1) * 24])  # in place, as torch allows
    same(out, torch.cat(said), "input is part of the output")

    outs = list(out.zero_().chunk(n))
    outs[rank].copy_(x)
    dist.all_gather(outs, outs[rank])
    same(out, torch.cat(said), "outputs are views of one storage, the input is one of them")

    one = torch.zeros(24)
    dist.all_gather([one, one], x)
    same(one, said[1], "one tensor for all ranks: the last is seen")

    full = x.clone()
    dist.reduce_scatter_tensor(full[rank * 12 : (rank + 1) * 12], full)  # in place
    same(full[rank * 12 : (rank + 1) * 12], total.chunk(n)[rank], "output is part of the input")

    # Each output is the other's input: what is read is what was there before.
    a, b = x.clone(), x.clone() * 2
    big = torch.cat([torch.zeros(24), a])
    group.allgather_into_tensor_coalesced([big, torch.zeros(48)], [big[24:], b]).wait()
    same(big, torch.cat(said), "gathered over its own input")


def test_tensors_that_share_memory_are_reduced_once_and_read_before_they_are_written(pair: World) -> None:
    pair.run(check_aliases)


def check_expanded(rank: int) -> str:
    before = torch.ones(1)
    try:
        dist.all_reduce(before.expand(4))
    except TypeError as error:
        dist.all_reduce(before)  # nothing was sent: the group goes on
        assert before.item() == 2
        return str(error)
    return "nothing"


def test_a_tensor_that_cannot_be_written_is_refused_before_anything_is_sent(pair: World) -> None:
    for said in pair.run(check_expanded):
        assert "expanded to [4]" in said


def check_wrong_sizes(rank: int) -> list[str]:
    said = []
    for call in (
        lambda: dist.all_gather_into_tensor(torch.zeros(5), torch.zeros(2)),
        lambda: dist.all_gather_into_tensor(torch.zeros(4, dtype=torch.int32), torch.zeros(2)),
        lambda: dist.reduce_scatter_tensor(torch.zeros(2), torch.zeros(5)),
    ):
        with pytest.raises(ValueError, match="wanted an output") as error:
            call()
        said.append(str(error.value))
    dist.barrier()
    return said


def test_outputs_of_another_size_or_dtype_are_refused_before_anything_is_sent(pair: World) -> None:
    sizes, dtypes, parts = pair.run(check_wrong_sizes)[0]
    assert "for 4 elements" in sizes and "torch.float32" in dtypes and "found one for 4" in parts


def check_large(rank: int) -> None:
    x = torch.full((5_000_001,), float(rank + 1))
    dist.all_reduce(x)
    assert x.min() == x.max() == 3
    out = torch.zeros(2 * len(x))
    dist.all_gather_into_tensor(out, x)
    assert out.min() == out.max() == 3


def test_a_tensor_larger_than_any_workspace_is_reduced(pair: World) -> None:
    pair.run(check_large)
