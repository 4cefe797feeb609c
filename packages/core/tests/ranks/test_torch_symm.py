"""torch's symmetric memory as a backend: what it decides without a GPU, and what it adds up on several."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from commplane.api import Capability, Collective, Facts, GroupKey, Numerics, ProbeRequest, Requirement, Unusable
from commplane.api.facts import RankFacts
from commplane.backends import symm_probe
from commplane.backends.builtin import commplane_register_comm_backends
from commplane.backends.symm_memory import conflict, group_name, out_of_step
from commplane.backends.torch_symm import (
    VECTOR,
    StagingWorkspace,
    TorchSymmetricMemory,
    _Reducer,
    one_shot_limit,
    padded,
    parse,
    pieces,
    size_ranges,
    staging_bytes,
)
from commplane.errors import CommunicatorError, ConfigError, UnsupportedOperation
from commplane.testing import run_processes

GPUS = torch.cuda.device_count()
gpu = pytest.mark.gpu
two_gpus = pytest.mark.skipif(GPUS < 2, reason=f"wants 2 GPUs, torch sees {GPUS}")


def facts(*domains: int) -> Facts:
    """Ranks that share memory where their domains are equal."""
    return Facts(
        RankFacts(
            rank=r,
            host=f"host{d}",
            pid=r,
            pid_start=0,
            pid_namespace="",
            shm_domain=d,
            shm_free=None,
            memory_limit=None,
            cores=(r,),
            devices=(),
            machine="x86_64",
            python="3.11",
            torch=None,
        )
        for r, d in enumerate(domains)
    )


def probe(*domains: int) -> Any:
    key = GroupKey(tuple(range(len(domains))), "cuda", "tp")
    return symm_probe.probe(ProbeRequest(key, 0, {}), facts(*domains))


def test_a_group_that_spans_hosts_is_refused_with_the_hosts() -> None:
    verdict = probe(0, 1)
    assert isinstance(verdict, Unusable) and "rank 0 on host0; rank 1 on host1" in verdict.reason


@pytest.mark.parametrize("ranks", [3, 5, 6, 7])
def test_a_number_of_ranks_that_torch_has_no_kernel_for_is_refused(ranks: int) -> None:
    verdict = probe(*[0] * ranks)
    assert isinstance(verdict, Unusable) and f"serves groups of 2, 4, 8 ranks, this one has {ranks}" in verdict.reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_probe_says_what_is_missing() -> None:
    verdict = probe(0, 0)
    assert isinstance(verdict, Unusable) and ("CUDA build of torch" in verdict.reason or "CUDA device" in verdict.reason)


@pytest.mark.parametrize(
    ("version", "cuda", "missing", "words"),
    [
        ("2.7.1+cu128", "12.8", [], "wanted torch 2.8 or newer, found 2.7.1"),
        ("2.13.0+cpu", None, [], "wanted a CUDA build of torch, found 2.13.0+cpu"),
        ("2.9.0", "13.0", ["two_shot_all_reduce_"], "wanted torch.ops.symm_mem with two_shot_all_reduce_, torch 2.9.0 has no"),
        ("2.11.0+cu130", "13.0", [], None),
        ("3.0.0a0+git1234", "13.0", [], None),
    ],
)
def test_a_torch_that_is_of_no_use_is_refused_with_what_was_wanted(
    version: str, cuda: str | None, missing: list[str], words: str | None
) -> None:
    reason = symm_probe.refusal(version, cuda, missing)
    assert reason is None if words is None else reason is not None and reason.startswith(words)


def test_this_torch_has_every_operator_that_is_called() -> None:
    assert [n for n in symm_probe.OPERATORS if not hasattr(torch.ops.symm_mem, n)] == []
    assert not [n for n in symm_probe.OPERATORS if "multimem" in n]


def test_the_spec_promises_no_more_than_torch_does_and_is_used_only_by_name() -> None:
    spec = next(s for s in commplane_register_comm_backends() if s.name == "torch_symm")
    assert spec.numerics is Numerics.UNORDERED and spec.priority < 0 and spec.device == "cuda"
    assert spec.collectives() == [Collective.ALL_REDUCE] and spec.ops == {"sum"}
    assert spec.dtypes == {"float32", "bfloat16"}
    assert {Capability.SYMMETRIC_MEMORY, Capability.CAPTURE} <= set(spec.capabilities)
    assert parse("[tp]", spec.options) == ("auto", spec.options["max_bytes"])


@pytest.mark.parametrize(
    ("options", "name"),
    [({"algorithm": "ring"}, "algorithm"), ({"max_bytes": 100}, "max_bytes"), ({"max_bytes": -1}, "max_bytes")],
)
def test_a_setting_that_is_none_is_an_error_that_names_it(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^\[tp\] setting {name}: wanted .*, found "):
        parse("[tp]", {"algorithm": "auto", "max_bytes": 1 << 20} | options)


def test_sizes_are_padded_to_whole_vectors() -> None:
    assert [padded(n) for n in (0, 1, 15, 16, 17, 4096)] == [0, 16, 16, 16, 32, 4096]
    assert parse("[tp]", {"algorithm": "one_shot", "max_bytes": 4097}) == ("one_shot", 4112)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("staging", [4096, 4112])
@pytest.mark.parametrize("count", [1, 7, 1024, 1028, 2048, 2056, 2057, 10_000])
def test_pieces_cover_a_message_once_in_whole_vectors_that_fit(count: int, staging: int, itemsize: int) -> None:
    cut = list(pieces(count, itemsize, staging))
    assert [i for start, stop in cut for i in range(start, stop)] == list(range(count))
    assert all(padded((stop - start) * itemsize) <= staging for start, stop in cut)
    assert all((stop - start) * itemsize % VECTOR == 0 for start, stop in cut[:-1])


def test_staging_doubles_until_a_message_fits_and_no_further_than_the_setting() -> None:
    assert staging_bytes(1 << 20, 1000, 1 << 24) == 1 << 20
    assert staging_bytes(1 << 20, (1 << 20) + 1, 1 << 24) == 1 << 21
    assert staging_bytes(1 << 20, 1 << 30, 48 << 20) == 48 << 20


def test_one_shot_is_for_small_messages_and_the_smaller_the_more_ranks_there_are() -> None:
    limits = [one_shot_limit("auto", n) for n in symm_probe.WORLD_SIZES]
    assert limits[0] == 64 << 10 and limits == sorted(limits, reverse=True) and limits[-1] > 0
    assert one_shot_limit("two_shot", 2) == 0 and one_shot_limit("one_shot", 8) > 1 << 40


def test_the_plan_is_told_where_the_algorithm_changes() -> None:
    def shown(algorithm: str) -> list[tuple[int, int | None, str]]:
        return [(r.low, r.high, r.algorithm) for r in size_ranges(one_shot_limit(algorithm, 2))]

    assert shown("auto") == [(0, 65537, "one_shot"), (65537, None, "two_shot")]
    assert shown("one_shot") == [(0, None, "one_shot")] and shown("two_shot") == [(0, None, "two_shot")]


def test_group_names_differ_between_communicators_of_one_purpose() -> None:
    assert len({group_name(purpose, token) for purpose in ("tp", "dp") for token in ("a", "b")}) == 4


def test_devices_that_cannot_be_one_group_are_named_with_their_global_ranks() -> None:
    new = (9, 0)
    assert conflict([("u0", 0, new), ("u1", 1, new)], (4, 6)) is None
    shared = conflict([("u0", 0, new), ("u1", 1, new), ("u0", 0, new)], (4, 6, 8))
    assert shared is not None and "ranks 4 and 8 share u0" in shared
    hidden = conflict([("u0", 0, new), ("u1", 0, new)], (4, 6))
    assert hidden is not None and "ranks 4 and 6 both call theirs cuda:0" in hidden
    old = conflict([("u0", 0, new), ("u1", 1, (7, 5))], (4, 6))
    assert old is not None and "8.0 or newer, rank 6 has one of 7.5" in old


def test_ranks_that_exchanged_handles_unequally_are_named_before_torch_waits_for_ever() -> None:
    assert out_of_step([[2, None], [2, None]], (4, 6)) is None
    uneven = out_of_step([[2, None], [1, None]], (4, 6))
    assert uneven is not None and "found rank 4 2, rank 6 1" in uneven
    failed = out_of_step([[2, None], [2, "no memory"]], (4, 6))
    assert failed is not None and "one failed on rank 6: no memory" in failed


def test_staging_goes_over_to_the_backend_when_it_is_committed_and_nowhere_before() -> None:
    taken: list[torch.Tensor] = []
    built, dropped = (StagingWorkspace(taken.append, torch.zeros(n, dtype=torch.uint8)) for n in (64, 32))
    assert built.nbytes == 64
    dropped.close()
    dropped.commit()
    built.commit()
    built.close()
    assert [t.numel() for t in taken] == [64]


def test_a_backend_that_was_never_opened_can_be_closed_twice() -> None:
    backend = TorchSymmetricMemory()
    backend.close()
    backend.close()


class Operators:
    """Stand-ins on CPU for torch's operators in a group of two ranks that hold the same: they double, and check as torch does."""

    def __init__(self, reducer: Any) -> None:
        self.calls: list[str] = []
        for name in ("one_shot_out", "one_shot_copy_out", "two_shot_", "two_shot_out"):
            setattr(reducer, f"_{name}", getattr(self, name))

    def note(self, name: str, *tensors: torch.Tensor) -> None:
        self.calls.append(name)
        assert len({t.shape for t in tensors}) == 1
        for t in tensors:
            assert t.is_contiguous() and t.nbytes % VECTOR == 0 and t.storage_offset() * t.element_size() % VECTOR == 0

    def one_shot_out(self, tensor: torch.Tensor, op: str, group: str, out: torch.Tensor) -> None:
        self.note("one_shot", tensor, out)
        assert (op, group) == ("sum", "g") and out.data_ptr() != tensor.data_ptr()
        out.copy_(tensor * 2)

    def one_shot_copy_out(self, stage: torch.Tensor, tensor: torch.Tensor, op: str, group: str, out: torch.Tensor) -> None:
        self.note("one_shot", stage, tensor, out)
        assert (op, group) == ("sum", "g")
        stage.copy_(tensor)
        out.copy_(stage * 2)

    def two_shot_(self, tensor: torch.Tensor, op: str, group: str) -> None:
        self.note("two_shot_", tensor)
        tensor.mul_(2)

    def two_shot_out(self, tensor: torch.Tensor, op: str, group: str, out: torch.Tensor) -> None:
        self.note("two_shot", tensor, out)
        assert (op, group) == ("sum", "g") and out.data_ptr() != tensor.data_ptr()
        out.copy_(tensor.mul_(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 5, 8, 64, 1000, 1024, 2049, 9000])
@pytest.mark.parametrize("offset", [0, 1])
def test_whichever_way_a_message_goes_it_is_reduced_once_by_operators_that_its_size_alone_decides(
    dtype: torch.dtype, count: int, offset: int
) -> None:
    def ways(shift: int) -> list[list[str]]:
        reducer = _Reducer(torch.zeros(4096 // dtype.itemsize, dtype=dtype), "g", 1024)
        operators = Operators(reducer)
        values = (torch.arange(count) % 9 - 4).to(dtype)
        tensor = torch.empty(count + shift, dtype=dtype)[shift:].copy_(values)
        out = torch.empty_like(values)
        reducer.staged(tensor, out)
        assert torch.equal(out, values * 2) and torch.equal(tensor, values)
        there = len(operators.calls)
        reducer.staged(tensor, tensor)
        assert torch.equal(tensor, values * 2)
        return [operators.calls[:there], operators.calls[there:]]

    assert ways(offset) == ways(0)
    assert ways(0)[0] == ways(0)[1]


@pytest.mark.parametrize("count", [8, 256, 264, 5000])
def test_a_symmetric_tensor_is_reduced_where_it_is_and_kept_by_calls_out_of_place(count: int) -> None:
    reducer = _Reducer(torch.zeros(1024), "g", 1024)
    operators = Operators(reducer)
    values = (torch.arange(count) % 9 - 4).float()
    tensor, out = values.clone().view(-1, 4), torch.empty(count).view(-1, 4)
    reducer.symmetric(tensor, out)
    assert torch.equal(out.view(-1), values * 2) and torch.equal(tensor.view(-1), values)
    del operators.calls[:]
    reducer.symmetric_(tensor)
    assert torch.equal(tensor.view(-1), values * 2)
    assert operators.calls == ["one_shot" if count * 4 <= 1024 else "two_shot_"]


# On GPUs: each function below is one rank, in a process of its own.


def plane_of(store: Any, rank: int, world_size: int, **own: Any) -> Any:
    import commplane

    config = {"backends": ["torch_symm"], "device": "cuda", "timeout": 60, "torch_symm": own}
    torch.cuda.set_device(rank)
    return commplane.init(store=store, rank=rank, world_size=world_size, config=config)


def parts(world_size: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Row r is rank r's; small integers, exact in every dtype."""
    rows = [(torch.arange(count) * (r + 2) + r) % 7 - 3 for r in range(world_size)]
    return torch.stack(rows).to(dtype).cuda()


def sums_rank(store: Any, rank: int, world_size: int, algorithm: str) -> list[str]:
    with plane_of(store, rank, world_size, algorithm=algorithm, max_bytes=1 << 20) as plane:
        tp = plane.communicator("tp", device=f"cuda:{rank}")
        assert tp.plan.backends == ("torch_symm", "torch"), str(tp.plan)
        for dtype in (torch.float32, torch.bfloat16):
            for count in (1, 2, 3, 8, 9, 1000, 4096, 32769, 65536, 600_001, 1 << 20):
                rows = parts(world_size, count, dtype)
                mine, wanted = rows[rank].clone(), rows.double().sum(0)
                for _ in range(3):
                    assert torch.equal(tp.all_reduce(mine).double(), wanted), (dtype, count)
                    assert torch.equal(mine, rows[rank]), "out of place changed its input"
                offset = torch.empty(count + 1, dtype=dtype, device=mine.device)[1:].copy_(mine)
                assert torch.equal(tp.all_reduce_(offset).double(), wanted), ("offset", dtype, count)
                assert tp.all_reduce_(mine) is mine and torch.equal(mine.double(), wanted), (dtype, count)
                shared = tp.empty(count, dtype=dtype).copy_(rows[rank])
                assert torch.equal(tp.all_reduce(shared).double(), wanted), ("symmetric", dtype, count)
                assert torch.equal(shared, rows[rank]), "out of place changed its symmetric input"
                assert torch.equal(tp.all_reduce_(shared).double(), wanted), ("symmetric", dtype, count)
                if count > 8:
                    shared.copy_(rows[rank])
                    assert torch.equal(tp.all_reduce_(shared[8:]).double(), wanted[8:]), ("symmetric slice", dtype, count)
        square = parts(world_size, 64, torch.float32)[rank].view(8, 8)
        assert torch.equal(tp.all_reduce_(square.clone().t()), tp.all_reduce(square).t())
        assert tp.all_reduce(torch.empty(0, device=square.device)).numel() == 0
        other = plane.communicator("other", device=f"cuda:{rank}")  # a name of its own: nothing is shared with the first
        assert torch.equal(other.all_reduce(square), tp.all_reduce(square))
        negative = tp.all_reduce(torch.full((64,), -0.0, device=square.device))
        assert bool(torch.signbit(negative).all())
        try:
            tp.all_reduce(torch.ones(4))
        except UnsupportedOperation as error:
            return [type(error).__name__]
    return []


def captured_rank(store: Any, rank: int, world_size: int) -> None:
    with plane_of(store, rank, world_size) as plane:
        tp = plane.communicator("tp", device=f"cuda:{rank}")
        tp.prepare("all_reduce", dtype=torch.bfloat16, max_bytes=4 << 20)
        for count in (64, 1 << 20):
            x = torch.zeros(count, dtype=torch.bfloat16, device=f"cuda:{rank}")
            y = tp.empty(count, dtype=torch.bfloat16)
            tp.all_reduce(x), tp.all_reduce_(y)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with plane.capture(), torch.cuda.graph(graph):
                z = tp.all_reduce(x)
                tp.all_reduce_(y)
            tp.prepare("all_reduce", dtype=torch.bfloat16, max_bytes=8 << 20)  # the graph keeps the staging that it was made with
            for step in range(5):
                rows = parts(world_size, count, torch.bfloat16) + step
                x.copy_(rows[rank]), y.copy_(rows[rank])
                graph.replay()
                assert torch.equal(z.double(), rows.double().sum(0)), (count, step)
                assert torch.equal(y.double(), rows.double().sum(0)), (count, step)
                assert torch.equal(tp.all_reduce(x), z), "an eager call between replays"
            torch.cuda.synchronize()


def multicast_rank(store: Any, rank: int, world_size: int) -> list[bool]:
    import os

    from torch._C._autograd import DeviceType
    from torch._C._distributed_c10d import _SymmetricMemory

    with plane_of(store, rank, world_size) as plane:
        plane.communicator("tp", device=f"cuda:{rank}")
        return [
            os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1",
            _SymmetricMemory.has_multicast_support(DeviceType.CUDA, rank),
        ]


def results(function: Any, *args: Any, timeout: float = 150, world_size: int = 2) -> list[Any]:
    outcomes = run_processes(world_size, function, *args, timeout=timeout)
    for o in outcomes:
        assert o.returncode == 0, o.output
    return [o.result for o in outcomes]


@gpu
@two_gpus
@pytest.mark.parametrize("algorithm", ["auto", "one_shot", "two_shot"])
def test_every_dtype_size_and_kind_of_tensor_is_summed(algorithm: str) -> None:
    assert results(sums_rank, algorithm) == [["UnsupportedOperation"]] * 2


@gpu
@two_gpus
def test_a_replayed_graph_reads_what_its_inputs_hold_then_also_after_the_staging_grew() -> None:
    results(captured_rank)


@gpu
@two_gpus
def test_multicast_is_off_before_anything_is_allocated() -> None:
    assert results(multicast_rank) == [[True, False]] * 2


@gpu
@pytest.mark.skipif(GPUS < 4, reason=f"wants 4 GPUs, torch sees {GPUS}")
def test_four_ranks_are_summed() -> None:
    assert results(sums_rank, "auto", world_size=4) == [["UnsupportedOperation"]] * 4


def test_a_closed_backend_says_so_and_builds_nothing() -> None:
    backend = TorchSymmetricMemory()
    backend._context = type("Context", (), {"who": "[tp rank 0/2 torch_symm]"})()
    with pytest.raises(CommunicatorError, match="is closed: create the communicator again"):
        backend.init_workspace([Requirement(Collective.ALL_REDUCE, "float32", 1 << 20)])
