"""What of torch stands on process groups: the same numbers over commplane, bit for bit, as over Gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from c10d_layers import Mlp, batches, steps
from c10d_world import World, oracle
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from commplane.runtime import Communicator

pytestmark = pytest.mark.timeout(120)

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
wants_2_5 = pytest.mark.skipif(
    VERSION < (2, 5),
    reason="wants torch 2.5 or newer: in older ones these parts of torch have other names, or know only torch's groups",
)


def both() -> list[Any]:
    """The default group, and Gloo's."""
    return [dist.group.WORLD, oracle()]


def check_functional(rank: int) -> None:
    x = torch.arange(12.0).view(3, 4) * (rank + 1)
    cases = {
        "all_reduce": lambda g: funcol.all_reduce(x, "sum", g),
        "of a transposed one": lambda g: funcol.all_reduce(x.t(), "sum", g),
        "of a slice": lambda g: funcol.all_reduce(x[:, ::2], "max", g),
        "of an expanded one": lambda g: funcol.all_reduce(x[:, :1].expand(3, 4), "sum", g),
        "of a scalar": lambda g: funcol.all_reduce(x.sum(), "sum", g),
        "of integers": lambda g: funcol.all_reduce(x.long(), "min", g),
        "all_gather_tensor": lambda g: funcol.all_gather_tensor(x, 0, g),
        "along 1": lambda g: funcol.all_gather_tensor(x, 1, g),
        "of a transposed one along 1": lambda g: funcol.all_gather_tensor(x.t().contiguous(), 1, g),
        "of flags": lambda g: funcol.all_gather_tensor(x > 3, 0, g),
        "reduce_scatter_tensor": lambda g: funcol.reduce_scatter_tensor(x[:2], "sum", 0, g),
        "reduce_scatter along 1": lambda g: funcol.reduce_scatter_tensor(x, "sum", 1, g),
        "broadcast": lambda g: funcol.broadcast(x, 1, g),
        "all_to_all_single": lambda g: funcol.all_to_all_single(x[:2].contiguous(), None, None, g),
    }
    coalesced = {
        "all_reduce_coalesced": lambda g: funcol.all_reduce_coalesced([x, x, x.t()], "sum", g),
        "all_gather_coalesced": lambda g: funcol.all_gather_into_tensor_coalesced([x, x], g),
        "reduce_scatter_coalesced": lambda g: funcol.reduce_scatter_tensor_coalesced([x[:2], x[:2]], "sum", [0, 0], g),
    }
    before = x.clone()
    for name, call in cases.items():
        found, wanted = (funcol.wait_tensor(call(g)) for g in both())
        assert torch.equal(found, wanted) and found.shape == wanted.shape, (name, found, wanted)
        assert torch.equal(x, before), name  # functional: the input is as it was
    for name, many in coalesced.items():
        found, wanted = ([funcol.wait_tensor(t) for t in many(g)] for g in both())
        assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True)), (name, found, wanted)
        assert torch.equal(x, before), name


def test_functional_collectives_give_what_they_give_over_gloo(pair: World) -> None:
    pair.run(check_functional)


def check_chained(rank: int) -> None:
    """Results are used, dropped and overwritten while others are on their way."""
    for group in both():
        x = torch.full((1000,), float(rank + 1))
        pending = [funcol.all_reduce(x * k, "sum", group) for k in range(8)]
        x.zero_()  # each had an input of its own
        del pending[3]
        reused = [torch.full((1000,), float(k)) for k in range(50)]  # takes the memory of what was dropped
        assert [p[0].item() for p in pending] == [3.0 * k for k in range(8) if k != 3]
        assert [r[0].item() for r in reused] == list(range(50))
        y = torch.full((4,), float(rank + 1))
        for _ in range(3):
            y = funcol.all_reduce(y + funcol.all_gather_tensor(y, 0, group)[:4], "sum", group)
        assert y.tolist() == [80.0] * 4, y


def test_functional_results_survive_reuse_of_what_went_in(pair: World) -> None:
    pair.run(check_chained)


def check_compiled(rank: int) -> None:
    def layer(x: torch.Tensor, w: torch.Tensor, group: Any) -> torch.Tensor:
        h = funcol.all_reduce(x @ w, "sum", group)
        both_ = funcol.all_gather_tensor(h.relu(), 0, group)
        part = funcol.reduce_scatter_tensor(both_ * 2, "sum", 0, group)
        out = part + h
        dist.all_reduce(out, group=group)
        return out - h

    x, w = torch.arange(16.0).view(4, 4) * (rank + 1), torch.eye(4) * (rank + 2)
    wanted = layer(x, w, oracle())
    for mode in (True, False):
        torch._dynamo.reset()
        found = torch.compile(layer, fullgraph=True, backend="aot_eager" if mode else "inductor")(x, w, dist.group.WORLD)
        assert torch.equal(found, wanted), (mode, found, wanted)


@wants_2_5
@pytest.mark.long
def test_a_compiled_graph_with_collectives_gives_what_eager_code_gives(pair: World) -> None:
    pair.run(check_compiled)


def check_traced(rank: int) -> None:
    def layer(x: torch.Tensor, group: Any) -> torch.Tensor:
        h = funcol.all_reduce(x, "sum", group)
        dist.all_reduce(h, group=group)
        return funcol.all_gather_tensor(h, 0, group)

    x = torch.arange(8.0) * (rank + 1)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, dist.group.WORLD)
    assert torch.equal(found, layer(x, oracle()))


@wants_2_5
def test_collectives_are_traced_into_one_graph(pair: World) -> None:
    pair.run(check_traced)


def meshes() -> list[DeviceMesh]:
    return [DeviceMesh.from_group(g, "cpu", mesh_dim_names=("tp",)) for g in both()]


def check_dtensor(rank: int) -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    full = torch.arange(60.0).view(6, 10)
    for mesh in meshes():
        rows, columns = distribute_tensor(full, mesh, [Shard(0)]), distribute_tensor(full, mesh, [Shard(1)])
        assert torch.equal(rows.full_tensor(), full) and torch.equal(columns.full_tensor(), full)
        assert torch.equal(rows.redistribute(placements=[Shard(1)]).to_local(), full.chunk(2, 1)[rank])
        partial = DTensor.from_local(full * (rank + 1), mesh, [Partial()])
        assert torch.equal(partial.full_tensor(), full * 3)
        assert torch.equal(partial.redistribute(placements=[Shard(0)]).to_local(), (full * 3).chunk(2)[rank])
        assert torch.equal(partial.redistribute(placements=[Shard(1)]).to_local(), (full * 3).chunk(2, 1)[rank])
        odd = distribute_tensor(torch.arange(7.0), mesh, [Shard(0)])  # padded on the way
        assert torch.equal(odd.full_tensor(), torch.arange(7.0))
        product = columns @ distribute_tensor(full.t().contiguous(), mesh, [Shard(0)])
        assert torch.equal(product.full_tensor(), full @ full.t())
        assert torch.equal(rows.t().redistribute(placements=[Replicate()]).to_local(), full.t())
        assert rows.sum().full_tensor() == full.sum()


@wants_2_5
def test_dtensors_are_redistributed_as_over_gloo(pair: World) -> None:
    pair.run(check_dtensor)


def check_tensor_parallel(rank: int) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    x = batches(0, 1)[0]  # the same on both ranks
    whole = Mlp()
    wanted = whole(x)
    wanted.square().sum().backward()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "up2": ColwiseParallel(), "down2": RowwiseParallel()}
    results = []
    for mesh in meshes():
        model = parallelize_module(Mlp(), mesh, plan)
        out = model(x)
        out.square().sum().backward()
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(model.up.weight.grad.full_tensor(), whole.up.weight.grad)
        results.append((out.detach(), model.up.weight.grad.full_tensor(), model.down2.bias.grad.full_tensor()))
    found, also = results
    assert all(torch.equal(f, a) for f, a in zip(found, also, strict=True))


@wants_2_5
def test_a_parallelized_module_and_its_gradients_are_those_over_gloo(pair: World) -> None:
    pair.run(check_tensor_parallel)


def check_the_way(rank: int) -> dict[str, int]:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.nn.parallel import DistributedDataParallel

    counts: dict[str, int] = {}
    names = ("all_reduce_", "all_gather", "reduce_scatter", "broadcast")
    originals = {name: getattr(Communicator, name) for name in names}

    def counted(name: str) -> Any:
        def call(self: Communicator, *args: Any, **named: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return originals[name](self, *args, **named)

        return call

    for name in names:
        setattr(Communicator, name, counted(name))
    try:
        mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu", mesh_dim_names=("tp",))
        parallelize_module(Mlp(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})(batches(0, 1)[0]).sum().backward()
        said = {"tensor parallel": sum(counts.values())}
        for what, wrap in {"ddp": DistributedDataParallel, "fsdp": lambda m: fully_shard(m, mesh=mesh)}.items():
            before = sum(counts.values())
            wrap(Mlp())(batches(rank, 1)[0]).sum().backward()
            said[what] = sum(counts.values()) - before
    finally:
        for name, function in originals.items():
            setattr(Communicator, name, function)
    return {**said, **{n: counts.get(n, 0) for n in names}}


@wants_2_5
def test_what_layers_call_goes_to_the_communicator(pair: World) -> None:
    for said in pair.run(check_the_way):
        assert all(said.values()), said


def check_ddp(rank: int) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.nn.parallel import DistributedDataParallel

    seen = []
    for options in ({}, {"bucket_cap_mb": 0.0001}, {"static_graph": True}, {"gradient_as_bucket_view": True}, {"hook": True}):
        options = dict(options)
        hook = options.pop("hook", False)
        outcome = []
        for group in both():
            model = DistributedDataParallel(Mlp(), process_group=group, **options)
            if hook:
                model.register_comm_hook(group, default_hooks.fp16_compress_hook)
            losses = steps(model, torch.optim.SGD(model.parameters(), lr=0.1), batches(rank, 4))
            outcome.append((losses, [p.detach().clone() for p in model.parameters()]))
        (found, weights), (wanted, also) = outcome
        assert found == wanted, options
        assert all(torch.equal(a, b) for a, b in zip(weights, also, strict=True)), options
        seen.append(found[-1])
    alone = Mlp()
    losses = steps(alone, torch.optim.SGD(alone.parameters(), lr=0.1), batches(rank, 4))
    assert losses[-1] != losses[0] and seen[0] != losses[-1]  # it learns, and by the other rank's gradients too


def test_ddp_trains_to_the_weights_that_it_has_over_gloo(pair: World) -> None:
    pair.run(check_ddp)


def check_ddp_unused(rank: int) -> None:
    """Ranks use different parameters, and one has no more batches: DDP finds out by all_reduce of its own."""
    from torch.distributed.algorithms.join import Join
    from torch.nn.parallel import DistributedDataParallel

    class Sometimes(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + (self.down(self.up(x)) if rank == 0 else self.down2(self.up2(x)))

    outcome = []
    for group in both():
        model = DistributedDataParallel(Sometimes(), process_group=group, find_unused_parameters=True)
        losses = steps(model, torch.optim.SGD(model.parameters(), lr=0.1), batches(rank, 3))
        uneven = DistributedDataParallel(Mlp(), process_group=group)
        with Join([uneven]):
            losses += steps(uneven, torch.optim.SGD(uneven.parameters(), lr=0.1), batches(rank, 2 + rank))
        outcome.append((losses, [p.detach().clone() for p in [*model.parameters(), *uneven.parameters()]]))
    (found, weights), (wanted, also) = outcome
    assert found == wanted and all(torch.equal(a, b) for a, b in zip(weights, also, strict=True))


def test_ddp_with_unused_parameters_and_uneven_inputs_trains_as_over_gloo(pair: World) -> None:
    pair.run(check_ddp_unused)


def check_fsdp(rank: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)):
        outcome = []
        for mesh in meshes():
            model = Mlp()
            for layer in (model.up, model.down):
                fully_shard(layer, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            losses = steps(model, torch.optim.AdamW(model.parameters(), lr=0.01), batches(rank, 4))
            outcome.append((losses, [p.full_tensor() for p in model.parameters()]))
        (found, weights), (wanted, also) = outcome
        assert found == wanted
        assert all(torch.equal(a, b) for a, b in zip(weights, also, strict=True))


@wants_2_5
def test_fully_sharded_training_has_the_losses_and_weights_of_gloo(pair: World) -> None:
    pair.run(check_fsdp)


def check_checkpoint(rank: int, folder: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    full = torch.arange(40.0).view(10, 4)
    state = {"model": {"weight": distribute_tensor(full, mesh, [Shard(0)]), "bias": torch.ones(3)}, "step": 7}
    dcp.save(state, checkpoint_id=folder)
    dist.barrier()
    empty = {"model": {"weight": distribute_tensor(torch.zeros(10, 4), mesh, [Shard(1)]), "bias": torch.zeros(3)}, "step": 0}
    dcp.load(empty, checkpoint_id=folder)
    assert torch.equal(empty["model"]["weight"].full_tensor(), full)  # type: ignore[index]
    assert empty["step"] == 7 and empty["model"]["bias"].tolist() == [1.0] * 3  # type: ignore[index]


@wants_2_5
def test_a_distributed_checkpoint_is_saved_and_loaded_in_another_cut(pair: World, tmp_path: Path) -> None:
    pair.run(check_checkpoint, str(tmp_path / "checkpoint"))


def check_mesh(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    assert [dist.get_backend(mesh.get_group(d)) for d in ("dp", "tp")] == ["commplane"] * 2
    x = torch.tensor([float(rank)])
    assert funcol.all_reduce(x, "sum", (mesh, 1)).item() == (1 if rank < 2 else 5)
    assert funcol.all_reduce(x, "sum", (mesh, 0)).item() == (2 if rank % 2 == 0 else 4)
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    full = torch.arange(64.0).view(8, 8)
    sharded = distribute_tensor(full, mesh, [Shard(0), Shard(1)])
    assert torch.equal(sharded.redistribute(placements=[Replicate(), Replicate()]).to_local(), full)


@wants_2_5
def test_a_mesh_of_two_dimensions_has_a_group_of_ours_for_each(four: World) -> None:
    four.run(check_mesh)
