"""All-reduce, residual, RMS norm and quantised output in one call: of backends that have it, and composed of what they have."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from commplane import errors
from commplane.api import Capability, Collective, Numerics, QuantFormat, Quantization
from commplane.runtime import Communicator
from commplane_conformance.comm.test_capture import captured
from commplane_conformance.marks import at_least, clause, needs, since
from commplane_conformance.oracle import expect, expect_bits, expect_norm, expect_quantized, inputs, layouts, special_rows
from commplane_conformance.rank import Rank, Skip
from commplane_conformance.worlds import World, Worlds

pytestmark = needs(Capability.ALL_REDUCE)
each_format = pytest.mark.parametrize("form", ["fp8_static", "fp8_token", "fp8_group", "nvfp4"])
whole = needs(Capability.ALL_REDUCE_RMS_NORM_QUANT)

_QUANT = Collective.ALL_REDUCE_RMS_NORM_QUANT


def hows(rank: Rank, form: str) -> list[Quantization]:
    """The format, with two scales or sizes of groups where it has some."""
    kind = QuantFormat(form)
    scales = {"fp8_static": (0.25, 0.013), "nvfp4": (16.0, 437.0)}.get(form, ())
    if scales:
        return [Quantization(kind, torch.tensor([s], device=rank.device)) for s in scales]
    return [Quantization(kind, group=g) for g in (128, 64)] if form == "fp8_group" else [Quantization(kind)]


def shapes(rank: Rank, form: str) -> list[tuple[int, ...]]:
    """One to three dimensions; no token, one, as many as ranks, one more or fewer, an odd number, more than a block of scales."""
    n = rank.world_size
    out = [(256,), (0, 128), (1, 128), (2, 5, 384), *((t, 512) for t in range(n - 1, n + 2)), (9, 4096), (131, 640)]
    return out if form in ("fp8_group", "nvfp4") else [*out, (3, 37), (5, 1)]


def reaches(rank: Rank, comm: Communicator, form: str, nbytes: int, dtype: torch.dtype) -> bool:
    """Whether the backend under test runs this call, or the part of it that is communication."""
    chosen = comm.plan.explain(str(_QUANT), nbytes=nbytes, dtype=dtype, op=form).chosen or ""
    yes = chosen == rank.job.backend or chosen.endswith(f" by {rank.job.backend} and torch")
    rank.asked, rank.served = rank.asked + 1, rank.served + yes
    return yes


def only_whole(rank: Rank, form: str) -> None:
    """Go on where the backend declares the format."""
    if form not in rank.spec.formats:
        raise Skip(f"{rank.job.backend} does not declare the format {form}")


def bits(*tensors: Tensor | None) -> str:
    """A digest of what they hold."""
    digest = hashlib.sha256()
    for t in tensors:
        if t is not None:
            dense = torch.empty(t.shape, dtype=t.dtype).copy_(t)  # one element may be contiguous with any stride
            digest.update(dense.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def values(rank: Rank, name: str, form: str) -> list[str]:
    """Every shape, both kinds of weight, with the norm and without; a digest of each result."""
    dtype, out = getattr(torch, name), []
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    for seed, shape in enumerate(shapes(rank, form)):
        parts = inputs(rank.world_size, shape, dtype, seed)
        given = [inputs(1, s, dtype, seed + more)[0] for s, more in ((shape, 100), (shape[-1:], 200))]
        mine, residual, weight = (rank.put(t) for t in (parts[rank.rank], *given))
        if not reaches(rank, rank.comm, form, mine.nbytes, dtype):
            continue
        for how, (eps, bias) in ((h, e) for h in hows(rank, form) for e in ((1e-6, 0.0), (1e-3, 1.0))):
            what = f"all_reduce_rms_norm_quant to {how.label} of {name} {list(shape)} with eps {eps} and weight_bias {bias}"
            quantized, norm, total = rank.comm.all_reduce_rms_norm_quant(mine, residual, weight, how, eps, bias, keep_norm=True)
            assert norm is not None, f"{what}: keep_norm=True has to give the norm, found None"
            expect(f"the new residual of {what}", total, [*parts, given[0]], "sum")
            if rank.spec.numerics is Numerics.RANK_ORDER:
                summed = rank.comm.all_reduce(mine)
                expect_bits(f"the new residual of {what}", total, (summed.to(wide) + residual.to(wide)).to(dtype).cpu())
            expect_norm(what, norm, total, weight, eps, bias)
            expect_quantized(what, quantized, norm, how)
            alone, none, again = rank.comm.all_reduce_rms_norm_quant(mine, residual, weight, how, eps, bias)
            assert none is None, f"{what}: keep_norm=False has to give None for the norm, found {list(none.shape)}"
            expect_quantized(f"{what}, without the norm", alone, norm, how)
            expect_bits(f"the new residual of {what}, without the norm", again, total)
            inputs_now, inputs_before = (mine, residual, weight), (parts[rank.rank], *given)
            for which, after, before in zip(("tensor", "residual", "weight"), inputs_now, inputs_before, strict=True):
                expect_bits(f"the {which} given to {what}", after, before)
            out.append(f"{what}: {bits(quantized.values, quantized.scales, norm, total, alone.values, alone.scales)}")
    return out


def equal_everywhere(results: Sequence[list[str]]) -> None:
    """Raise where a rank has other bits than rank 0."""
    for rank, result in enumerate(results):
        for first, other in zip(results[0], result, strict=True):
            assert first == other, f"rank {rank} has other bits than rank 0: {other}, wanted {first}"


@whole
@since(1, 3)
@clause("S72", "S73", "S74")
@each_format
def test_values(world: World, float_dtype: str, form: str) -> None:
    if form not in world.subject.spec.formats:
        pytest.skip(f"{world.subject.name} does not declare the format {form}")
    equal_everywhere(world.run(values, float_dtype, form))


@clause("S72", "S75")
@each_format
def test_a_format_that_is_not_declared_is_composed(world: World, float_dtype: str, form: str) -> None:
    if form in world.subject.spec.formats:
        pytest.skip(f"{world.subject.name} declares the format {form}")
    world.run(values, float_dtype, form)


def two_dimensional(rank: Rank, name: str, form: str, rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What the ranks add, with a residual and a weight, where the backend under test is in it."""
    dtype = getattr(torch, name)
    parts = inputs(rank.world_size, (rows, 256), dtype, 1)
    mine, residual = rank.put(parts[rank.rank]), rank.put(inputs(1, (rows, 256), dtype, 2)[0])
    if reaches(rank, rank.comm, form, mine.nbytes, dtype):
        yield mine, residual, rank.put(inputs(1, (256,), dtype, 3)[0])


def quantized_layouts(rank: Rank, name: str, form: str) -> None:
    """A tensor and a residual that are not contiguous."""
    for mine, residual, weight in two_dimensional(rank, name, form, 6):
        how = hows(rank, form)[0]
        wanted, _, total = rank.comm.all_reduce_rms_norm_quant(mine, residual, weight, how)
        for (layout, x), (other, rest) in ((a, b) for a in layouts(mine) for b in layouts(residual)):
            what = f"{form} of {name}, tensor {layout}, residual {other}"
            got, _, new = rank.comm.all_reduce_rms_norm_quant(x, rest, weight, how)
            expect_bits(f"values of {what}", got.values.view(torch.uint8), wanted.values.view(torch.uint8).cpu())
            expect_bits(f"scales of {what}", got.scales, wanted.scales.cpu())
            expect_bits(f"the new residual of {what}", new, total.cpu())


@clause("S72", "S7")
@each_format
def test_any_layout(world: World, float_dtype: str, form: str) -> None:
    world.run(quantized_layouts, float_dtype, form)


def extremes(rank: Rank, name: str, form: str) -> None:
    """Rows of zeros, of the least numbers, with one number far from the others, and numbers too large for the format."""
    dtype = getattr(torch, name)
    rows = special_rows(256, dtype)
    zeros = torch.zeros_like(rows)
    mine, residual = rank.put(rows if rank.rank == 0 else zeros), rank.put(zeros)
    if not reaches(rank, rank.comm, form, mine.nbytes, dtype):
        return
    for large in (1.0, 64.0):
        weight = rank.put(torch.full((256,), large, dtype=dtype))
        for how in hows(rank, form):
            what = f"all_reduce_rms_norm_quant to {how.label} of {name} rows of special values with weights of {large:g}"
            quantized, norm, total = rank.comm.all_reduce_rms_norm_quant(mine, residual, weight, how, keep_norm=True)
            assert norm is not None, f"{what}: keep_norm=True has to give the norm, found None"
            expect_norm(what, norm, total, weight, 1e-6, 0.0)
            expect_quantized(what, quantized, norm, how)


@clause("S73", "S74")
@each_format
def test_zeros_the_least_numbers_and_what_is_too_large(world: World, float_dtype: str, form: str) -> None:
    world.run(extremes, float_dtype, form)


def grow_and_shrink(rank: Rank, name: str, form: str) -> None:
    """Results of earlier calls stay as they were; those of later ones hold nothing of an earlier one."""
    dtype, kept = getattr(torch, name), []
    weight = rank.put(inputs(1, (256,), dtype, 3)[0])
    for call, rows in enumerate((3, 200, 1, 130, 3, 3)):
        mine = rank.put(inputs(rank.world_size, (rows, 256), dtype, call)[rank.rank] * 2.0 ** (call - 3))
        residual = rank.put(inputs(1, (rows, 256), dtype, call + 50)[0] * 2.0 ** (call - 3))
        if not reaches(rank, rank.comm, form, mine.nbytes, dtype):
            continue
        for how in hows(rank, form):
            weight.mul_(1.25)
            quantized, norm, total = rank.comm.all_reduce_rms_norm_quant(mine, residual, weight, how, keep_norm=True)
            assert norm is not None, "keep_norm=True has to give the norm, found None"
            what = f"call {call} of all_reduce_rms_norm_quant to {how.label}, {rows} rows of {name}"
            expect_norm(what, norm, total, weight, 1e-6, 0.0)
            expect_quantized(what, quantized, norm, how)
            kept.append((what, quantized, norm, how))
    for what, quantized, norm, how in kept:
        expect_quantized(f"after later calls, {what}", quantized, norm, how)


@clause("S72", "S74")
@each_format
def test_calls_that_follow_each_other(world: World, float_dtype: str, form: str) -> None:
    world.run(grow_and_shrink, float_dtype, form)


def who_was_added(rank: Rank, comm: Communicator, name: str, form: str) -> None:
    """Rank r adds rows of 2**r, so the residual and the scales say who was added."""
    dtype = getattr(torch, name)
    mine = torch.full((5, 256), float(1 << rank.rank), dtype=dtype, device=rank.device)
    if not reaches(rank, comm, form, mine.nbytes, dtype):
        return
    weight = torch.ones(256, dtype=dtype, device=rank.device)
    # An eps far above the squares leaves the size of the sum in the norm.
    args = mine, torch.zeros_like(mine), weight, hows(rank, form)[0], 1e8
    quantized, norm, total = comm.all_reduce_rms_norm_quant(*args, keep_norm=True)
    what = f"all_reduce_rms_norm_quant to {form} over ranks {list(comm.ranks)}, where rank r adds 2**r"
    wanted = torch.full((5, 256), float(sum(1 << r for r in comm.ranks)), dtype=dtype)
    expect_bits(f"the new residual of {what}", total, wanted)
    assert norm is not None, f"{what}: keep_norm=True has to give the norm, found None"
    expect_norm(what, norm, rank.put(wanted), weight, 1e8, 0.0)
    expect_quantized(what, quantized, norm, args[3])


def groups_at_once(rank: Rank, name: str, form: str, groups: list[list[int]]) -> None:
    """A communicator for each group that this rank is in, all open at once."""
    comms = [rank.form(f"conformance_quant_{i}", g) for i, g in enumerate(groups) if rank.rank in g]
    for _ in range(2):
        for comm in comms:
            who_was_added(rank, comm, name, form)
    for comm in comms:
        comm.close()
    who_was_added(rank, rank.comm, name, form)


def some_float(world: World) -> str:
    """A dtype that a norm is known to be fast in, else the first that is declared."""
    floats = [d for d in world.subject.dtypes if "float" in d]
    if not floats:
        pytest.skip(f"{world.subject.name} declares no floating-point dtype")
    return "bfloat16" if "bfloat16" in floats else floats[0]


@clause("S1", "S72")
@at_least(3)
@each_format
def test_a_sub_group_adds_its_own_ranks(world: World, form: str) -> None:
    world.run(groups_at_once, some_float(world), form, [[0, 1], [world.size - 2, world.size - 1]])


@clause("S1", "S12", "S72")
@at_least(4)
@each_format
def test_orthogonal_groups_of_equal_size(world: World, form: str) -> None:
    world.run(groups_at_once, some_float(world), form, [[0, 1], [2, 3], [0, 2], [1, 3]])


def refusals(rank: Rank, name: str, form: str) -> None:
    """What does not fit is refused before anything is sent: a call after it finds all ranks in step."""
    dtype, put = getattr(torch, name), rank.device
    mine, weight, how = torch.ones(2, 104, dtype=dtype, device=put), torch.ones(104, dtype=dtype, device=put), hows(rank, form)[0]
    cases = [("a residual of another shape", mine, mine[:1], weight, how), ("a weight of another", mine, mine, weight[1:], how)]
    if form in ("fp8_group", "nvfp4"):
        cases.append(("a hidden size of 104", mine, mine, weight, how))
    if how.scale is not None:
        cases.append(
            ("two scales", mine[:, :64], mine[:, :64], weight[:64], Quantization(QuantFormat(form), torch.ones(2, device=put)))
        )
    for what, x, residual, scales, asked in cases:
        try:
            rank.comm.all_reduce_rms_norm_quant(x, residual, scales, asked)
        except errors.UnsupportedOperation:
            continue
        raise AssertionError(f"all_reduce_rms_norm_quant to {form} with {what} has to raise UnsupportedOperation")
    expect_bits("the sum after what was refused", rank.comm.all_reduce(mine), torch.full((2, 104), rank.world_size, dtype=dtype))


@clause("S72", "S21")
@each_format
def test_what_does_not_fit_is_refused(world: World, form: str) -> None:
    world.run(refusals, some_float(world), form)


def replays(rank: Rank, name: str, form: str) -> None:
    """A captured call reads what its tensors hold at the replay; an eager call goes between."""
    only_whole(rank, form)
    for mine, residual, weight in two_dimensional(rank, name, form, 7):
        how, n = hows(rank, form)[0], rank.world_size
        rank.comm.prepare(str(_QUANT), dtype=mine.dtype, max_bytes=mine.nbytes)
        first = rank.comm.all_reduce_rms_norm_quant(mine, residual, weight, how, keep_norm=True)
        held = [t.clone() for t in (first[0].values, first[0].scales, mine, first[2])]

        def body(
            args: tuple[Tensor, Tensor, Tensor] = (mine, residual, weight), how: Quantization = how, held: list[Tensor] = held
        ) -> None:
            quantized, norm, total = rank.comm.all_reduce_rms_norm_quant(*args, how, keep_norm=True)
            assert norm is not None
            for slot, value in zip(held, (quantized.values, quantized.scales, norm, total), strict=True):
                slot.copy_(value)

        graph = captured(rank, body)
        for step in range(4):
            parts = inputs(n, mine.shape, mine.dtype, 20 + step)
            rest = inputs(1, mine.shape, mine.dtype, 40 + step)[0]
            mine.copy_(parts[rank.rank])
            residual.copy_(rest)
            graph()
            what = f"replay {step} of all_reduce_rms_norm_quant to {form}, with new contents of its inputs"
            expect(f"the new residual of {what}", held[3], [*parts, rest], "sum")
            expect_norm(what, held[2], held[3], weight, 1e-6, 0.0)
            expect_quantized(what, type(first[0])(how.format, held[0], held[1]), held[2], how)
            eager = rank.comm.all_reduce_rms_norm_quant(mine, residual, weight, how)
            expect_quantized(f"an eager call after {what}", eager[0], held[2], how)


@whole
@since(1, 3)
@needs(Capability.CAPTURE)
@clause("S24", "S55", "S72")
@each_format
def test_replays_see_new_contents(world: World, form: str) -> None:
    if form not in world.subject.spec.formats:
        pytest.skip(f"{world.subject.name} does not declare the format {form}")
    world.run(replays, some_float(world), form)


def differ(rank: Rank, name: str, kind: str) -> str:
    """The last rank captures another format, or another wish for the norm."""
    dtype, last = getattr(torch, name), rank.rank == rank.world_size - 1
    x, weight = torch.ones(4, 256, dtype=dtype, device=rank.device), torch.ones(256, dtype=dtype, device=rank.device)
    # Not every device has all formats of the declaration: the others are composed, and look to a capture like the norm.
    forms = [f for f in sorted(rank.spec.formats) if rank.serves(rank.comm, _QUANT, x.nbytes, dtype, f)]
    if len(forms) < (2 if kind == "format" else 1):
        raise Skip(f"{rank.job.backend} has formats {forms} of {name} here, the test wants a second one to differ in")
    how = hows(rank, forms[1 if kind == "format" and last else 0])[0]
    rank.comm.prepare(str(_QUANT), dtype=dtype, max_bytes=x.nbytes)
    try:
        with rank.plane.capture():
            rank.comm.all_reduce_rms_norm_quant(x, x.clone(), weight, how, keep_norm=kind == "keep_norm" and last)
    except (errors.CaptureError, errors.MismatchError, errors.PeerError) as error:
        return type(error).__name__
    raise AssertionError(f"ranks captured all_reduce_rms_norm_quant with another {kind}, and rank {rank.rank} was told nothing")


@whole
@since(1, 3)
@needs(Capability.CAPTURE)
@clause("S25", "S76")
@pytest.mark.parametrize("kind", ["format", "keep_norm"])
def test_ranks_that_capture_something_else(worlds: Worlds, size: int, kind: str) -> None:
    with worlds.fresh(size, config={"run_timeout": 2, "startup_timeout": 15}) as world:
        world.run(differ, some_float(world), kind, limit=60)


def in_one_graph(rank: Rank, name: str, form: str) -> None:
    """A function that calls the method, as one graph of torch.compile."""
    for mine, residual, weight in two_dimensional(rank, name, form, 5):
        how = hows(rank, form)[0]

        def layer(
            x: Tensor, rest: Tensor, weight: Tensor = weight, how: Quantization = how
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            quantized, norm, total = rank.comm.all_reduce_rms_norm_quant(x * 2, rest, weight, how, keep_norm=True)
            assert norm is not None
            return quantized.values, quantized.scales, norm, total

        torch._dynamo.reset()
        got = torch.compile(layer, fullgraph=True, backend="eager")(mine, residual)
        for which, a, b in zip(("values", "scales", "norm", "residual"), got, layer(mine, residual), strict=True):
            as_bytes = [t.view(torch.uint8) if t.itemsize == 1 else t for t in (a, b)]
            expect_bits(f"the {which} of all_reduce_rms_norm_quant to {form} in a graph", as_bytes[0], as_bytes[1].cpu())


@clause("S50", "S72")
@each_format
def test_it_may_stand_in_a_graph_of_torch_compile(world: World, form: str) -> None:
    world.run(in_one_graph, some_float(world), form)
