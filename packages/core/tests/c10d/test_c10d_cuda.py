"""Process groups on GPUs, one rank a GPU: collectives, streams, graphs, and what stands on them, against NCCL."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from c10d_layers import Mlp, batches, steps
from c10d_world import World, oracle
from test_c10d_collectives import FLOATS, INTEGERS, LAYOUTS, MOVED, OPS, data, everyone, reduced, same

from commplane.c10d import communicator_of, plane_of
from commplane.errors import CommplaneError, CommunicatorError

GPUS = torch.cuda.device_count()  # through NVML: this process makes no context
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(170),
    pytest.mark.skipif(GPUS < 2, reason=f"wants 2 CUDA devices, because NCCL takes one rank on each; this machine shows {GPUS}"),
]


@pytest.fixture(scope="module")
def gpus() -> Iterator[World]:
    with World(2, seconds=40) as world:
        yield world


def here(rank: int) -> torch.device:
    """This rank's device, made the current one."""
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def check_all_reduce(rank: int) -> tuple[str, ...]:
    device = here(rank)
    for dtype in [*FLOATS, *INTEGERS]:
        for layout, make in LAYOUTS.items():
            for name, op in OPS.items():
                if name == "avg" and not dtype.is_floating_point:
                    continue
                for later in (False, True):
                    tensor = make(data(rank, dtype).to(device)).detach()
                    wanted = reduced(everyone(tensor.cpu()), name)
                    work = dist.all_reduce(tensor, op, async_op=later)
                    if later:
                        assert work.wait()
                    same(tensor, wanted, f"{dtype} {layout} {name} {later}")
    return tuple(communicator_of(device="cuda").plan.backends)


def test_all_reduce_on_gpus_is_what_the_ranks_put_in(gpus: World) -> None:
    first, second = gpus.run(check_all_reduce)
    assert first == second and first[-1] == "torch"


def check_moves(rank: int) -> None:
    device = here(rank)
    for dtype in MOVED:
        for layout in ("dense", "transposed", "scalar", "empty", "view of a larger one"):
            tensor = LAYOUTS[layout](data(rank, dtype).to(device))
            said = everyone(tensor.cpu())
            outs = [torch.zeros_like(tensor) for _ in said]
            dist.all_gather(outs, tensor)
            for out, wanted in zip(outs, said, strict=True):
                same(out, wanted, f"all_gather {dtype} {layout}")
            dist.broadcast(tensor, 1)
            same(tensor, said[1], f"broadcast {dtype} {layout}")
    for dtype in FLOATS:
        tensor = data(rank, dtype).to(device)
        out = torch.zeros(12, dtype=dtype, device=device)
        dist.reduce_scatter_tensor(out, tensor)
        same(out, reduced(everyone(tensor.cpu()), "sum").chunk(2)[rank], f"reduce_scatter {dtype}")


def test_all_gather_broadcast_and_reduce_scatter_on_gpus_keep_every_element(gpus: World) -> None:
    gpus.run(check_moves)


def check_streams(rank: int) -> None:
    """The collective waits for what its stream does before it, and whoever waits for the work for the collective."""
    device = here(rank)
    big = torch.ones(4096, 4096, device=device)
    side = torch.cuda.Stream()
    for _ in range(3):
        x = torch.zeros(1 << 20, device=device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(20):
                big = (big @ big).clamp_(max=1.0)
            x.add_(float(rank + 1))
            work = dist.all_reduce(x, async_op=True)
        work.wait()  # on the stream that is current here
        assert (x + 0).min().item() == 3 == x.max().item()
    future = dist.all_reduce(torch.full((4,), float(rank), device=device), async_op=True).get_future()
    assert future.wait()[0].tolist() == [1.0] * 4
    x = torch.zeros(4, device=device)
    torch.cuda._sleep(100_000_000)
    x.add_(1)
    dist.all_reduce(x)
    dist.barrier()  # after which the GPU has done all that was queued
    assert torch.cuda.current_stream().query() and x.tolist() == [2.0] * 4


def test_collectives_keep_the_order_of_streams(gpus: World) -> None:
    gpus.run(check_streams)


def check_graph(rank: int) -> None:
    device = here(rank)
    x = torch.full((4096,), float(rank + 1), device=device)
    y = torch.empty_like(x)
    dist.all_reduce(x.clone())  # the communicator exists before the capture
    communicator_of(device="cuda").prepare("all_reduce", dtype=torch.float32, max_bytes=x.nbytes)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with plane_of().capture(), torch.cuda.graph(graph):
        y.copy_(x)
        dist.all_reduce(y)
    for step in range(3):
        x.fill_(float(rank + step))
        graph.replay()
        torch.cuda.synchronize()
        assert y.min().item() == y.max().item() == 1 + 2 * step


def test_a_collective_is_captured_in_a_graph(gpus: World) -> None:
    gpus.run(check_graph)


_nccl: list[Any] = []


def both() -> list[Any]:
    """The default group, and NCCL's."""
    if not _nccl:
        _nccl.append(dist.new_group(backend="nccl"))
    return [dist.group.WORLD, _nccl[0]]


def check_functional(rank: int) -> None:
    device = here(rank)
    x = torch.arange(12.0, device=device).view(3, 4) * (rank + 1)
    cases: dict[str, Callable[[Any], torch.Tensor]] = {
        "all_reduce": lambda g: funcol.all_reduce(x.t(), "sum", g),
        "all_gather": lambda g: funcol.all_gather_tensor(x, 1, g),
        "reduce_scatter": lambda g: funcol.reduce_scatter_tensor(x, "sum", 1, g),
        "all_to_all": lambda g: funcol.all_to_all_single(x[:2].contiguous(), None, None, g),
    }
    for name, call in cases.items():
        found, wanted = (funcol.wait_tensor(call(g)) for g in both())
        assert torch.equal(found, wanted), (name, found, wanted)

    def layer(t: torch.Tensor, group: Any) -> torch.Tensor:
        return funcol.all_gather_tensor(funcol.all_reduce(t, "sum", group).relu(), 0, group) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, dist.group.WORLD), layer(x, both()[1]))


def test_functional_collectives_on_gpus_give_what_they_give_over_nccl(gpus: World) -> None:
    gpus.run(check_functional)


def check_training(rank: int) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    device = here(rank)
    inputs = [b.to(device) for b in batches(rank, 4)]
    outcomes = []
    for group in both():
        model = DistributedDataParallel(Mlp().to(device), process_group=group, device_ids=[rank])
        losses = steps(model, torch.optim.SGD(model.parameters(), lr=0.1), inputs)
        sharded = Mlp().to(device)
        mesh = DeviceMesh.from_group(group, "cuda", mesh_dim_names=("dp",))
        fully_shard(sharded.up, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        losses += steps(sharded, torch.optim.SGD(sharded.parameters(), lr=0.1), inputs)
        outcomes.append(losses)
    torch.testing.assert_close(outcomes[0], outcomes[1])


def test_ddp_and_fsdp_on_gpus_have_the_losses_of_nccl(gpus: World) -> None:
    gpus.run(check_training)


def check_point_to_point(rank: int) -> None:
    device = here(rank)
    x = torch.full((8,), float(rank), device=device)
    if rank == 0:
        dist.send(x, 1)
    else:
        dist.recv(x, 0)
    assert x.tolist() == [0.0] * 8
    peer = 1 - rank
    for count in (4, 1 << 24):  # both send first, which ends well in a batch alone
        mine, theirs = torch.full((count,), float(rank), device=device), torch.empty(count, device=device)
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, peer), dist.P2POp(dist.irecv, theirs, peer)]):
            work.wait()
        assert theirs.min().item() == theirs.max().item() == peer
    out = torch.empty(4, device=device)
    dist.all_to_all_single(out, torch.arange(4.0, device=device) + 10 * rank)
    assert out.tolist() == [2.0 * rank, 2.0 * rank + 1, 2.0 * rank + 10, 2.0 * rank + 11]


def test_what_a_communicator_has_not_goes_to_nccl(gpus: World) -> None:
    gpus.run(check_point_to_point)


def check_nccl_was_named(rank: int) -> None:
    device = here(rank)
    x = torch.ones(4, device=device)
    dist.all_reduce(x)
    dist.all_gather_into_tensor(out := torch.empty(8, device=device), x)
    assert x.tolist() == [2.0] * 4 and out.tolist() == [2.0] * 8
    with pytest.raises(CommunicatorError, match="found those for cpu"):
        communicator_of(device="cuda")
    y = torch.ones(4)
    dist.all_reduce(y)
    assert y.tolist() == [2.0] * 4 and communicator_of().ranks == (0, 1)


def test_cuda_goes_to_nccl_where_it_was_named_for_it() -> None:
    with World(2, backend="cpu:commplane,cuda:nccl", seconds=40) as world:
        world.run(check_nccl_was_named)


def lose_a_rank(rank: int) -> str:
    device = here(rank)
    x = torch.ones(4, device=device)
    dist.all_reduce(x)
    torch.cuda.synchronize()
    dist.barrier(group=oracle())
    if rank == 1:
        os._exit(3)
    with pytest.raises(CommplaneError) as error:
        for _ in range(4):  # what a kernel finds out is raised by the call after it
            dist.all_reduce(x)
            torch.cuda.synchronize()
    return f"{type(error.value).__name__}: {error.value}"


def test_a_rank_that_died_is_named_by_a_call_on_a_gpu() -> None:
    with World(2, seconds=10) as world:
        assert "PeerError" in world.run(lose_a_rank, but=(1,))[0]
