"""What a backend does not serve is an error before anything is sent, and never a silent no-op."""

from __future__ import annotations

from collections.abc import Callable

import torch

from commplane import errors
from commplane.api import Capability, Collective, ReduceOp
from commplane_conformance.marks import clause, needs, needs_dtype
from commplane_conformance.oracle import expect_bits
from commplane_conformance.rank import Rank
from commplane_conformance.worlds import World, Worlds

pytestmark = [needs(Capability.ALL_REDUCE)]


def refused(what: str, call: Callable[[], object]) -> str:
    """Raise unless `call` raises UnsupportedOperation; its text."""
    try:
        call()
    except errors.UnsupportedOperation as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{what} raised {error!r}, wanted UnsupportedOperation") from error
    raise AssertionError(f"{what} returned, wanted UnsupportedOperation")


def still_works(rank: Rank) -> None:
    """Nothing is out of step."""
    n = rank.world_size
    assert rank.comm.all_reduce(torch.ones(5, device=rank.device)).tolist() == [float(n)] * 5


def refusals(rank: Rank) -> None:
    """Dtype, op, device, shape."""
    device, comm = rank.device, rank.comm
    ones = torch.ones(8, device=device)
    text = refused("all_reduce of complex64", lambda: comm.all_reduce(torch.ones(8, dtype=torch.complex64, device=device)))
    assert "complex64" in text, f"the error of an unsupported dtype has to name it, found {text}"
    refused("all_reduce with op prod", lambda: comm.all_reduce(ones, "prod"))
    refused("all_reduce avg of int32", lambda: comm.all_reduce(torch.ones(8, dtype=torch.int32, device=device), "avg"))
    refused("all_reduce_ of an expanded tensor", lambda: comm.all_reduce_(torch.ones(1, device=device).expand(8)))
    refused("all_gather of a scalar", lambda: comm.all_gather(torch.tensor(1.0, device=device)))
    refused("broadcast from a rank that is not there", lambda: comm.broadcast(ones, rank.world_size))
    odd = torch.ones(rank.world_size * 3 + 1, device=device)
    refused("reduce_scatter of parts that are not even", lambda: comm.reduce_scatter(odd))
    assert bool((ones == 1).all()), "a call that was refused has changed its tensor"
    still_works(rank)


@clause("S5", "S6", "S7", "S21")
@needs_dtype("float32")
def test_what_no_backend_serves_is_refused_and_nothing_is_out_of_step(world: World) -> None:
    world.run(refusals)


def other_device(rank: Rank) -> None:
    """A tensor that is elsewhere."""
    for name in ("all_reduce_", "all_reduce", "all_gather", "broadcast"):
        x = torch.ones(8, device="meta")
        refused(f"{name} of a tensor on the device meta", lambda name=name, x=x: getattr(rank.comm, name)(x))  # type: ignore[misc]
    still_works(rank)


@clause("S9", "S21")
@needs_dtype("float32")
def test_a_tensor_on_another_device_is_refused(world: World) -> None:
    world.run(other_device)


def undeclared(rank: Rank) -> None:
    """The backend itself, asked for a dtype that it does not declare: it refuses, or it is right."""
    backend, n = rank.backend(rank.comm), rank.world_size
    for dtype in (
        torch.int16,
        torch.bool,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int8,
        torch.complex64,
    ):
        if str(dtype).removeprefix("torch.") in rank.spec.dtypes or not rank.spec.dtypes:
            continue
        x = torch.ones(8, device=rank.device).to(dtype)
        try:
            out = backend.all_reduce_(x, ReduceOp.SUM)
        except errors.UnsupportedOperation:
            continue
        wanted = torch.full((8,), n).to(dtype)
        assert torch.equal(out.cpu(), wanted), (
            f"all_reduce_ of {dtype}, which {rank.job.backend} does not declare, returned {out.tolist()} without an error: "
            f"raise UnsupportedOperation"
        )


@clause("S6", "S58")
def test_an_undeclared_dtype_is_no_silent_no_op(worlds: Worlds, size: int) -> None:
    with worlds.fresh(size) as world:
        world.run(undeclared)


def limits(rank: Rank) -> None:
    """Sizes beyond the declared limits go to another backend of the plan, and are right."""
    n, spec = rank.world_size, rank.spec
    most = spec.max_bytes
    for nbytes in {spec.min_bytes, spec.min_bytes - 4, 0, *(() if most is None else (most, most + 4))}:
        if nbytes < 0 or nbytes > 1 << 26:
            continue
        count = -(-nbytes // 4)
        x = torch.full((count,), 2.0, device=rank.device)
        chosen = rank.serves(rank.comm, Collective.ALL_REDUCE, x.nbytes, x.dtype)
        inside = x.nbytes >= spec.min_bytes and (most is None or x.nbytes <= most)
        assert chosen == inside or rank.job.backend == "torch", (
            f"{x.nbytes} bytes: chosen is {chosen}, within the limits is {inside}"
        )
        expect_bits(f"all_reduce of {x.nbytes} bytes", rank.comm.all_reduce(x), torch.full((count,), 2.0 * n))


@clause("S12")
@needs_dtype("float32")
def test_sizes_at_the_declared_limits(world: World) -> None:
    world.run(limits)
