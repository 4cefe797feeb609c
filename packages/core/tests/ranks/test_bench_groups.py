"""Groups that measure side by side, and candidates that not every group has, torch among them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import devices
import pytest

from commplane import errors
from commplane.api import Collective, Facts, ProbeRequest, Unusable, Usable, Verdict
from commplane.backends.torch_dist import TorchDistributed
from commplane.bench import form, measure, steps, table
from commplane.bench.cases import own_group
from commplane.bench.timing import beginning
from commplane.plugins import PluginHost
from commplane.runtime import Plane
from commplane.testing import run_threads

# `form` keeps warnings to itself, which is not for threads: one rank's filters are undone by another's.
pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore::commplane.errors.CommplaneWarning")]


def first_ranks_alone(request: ProbeRequest, _facts: Facts) -> Verdict:
    """Serves groups that begin with rank 0."""
    return Usable({}) if request.key.ranks[0] == 0 else Unusable("rank 0 is elsewhere")


def run(function: Callable[[Plane], Any], ranks: int = 4, plugins: PluginHost | None = None) -> list[Any]:
    more: dict[str, Any] = {} if plugins is None else {"plugins": lambda _rank: plugins}
    out = run_threads(ranks, function, config=lambda _rank: {"timeout": 30}, timeout=100, **more)
    for result in out:
        if isinstance(result, Exception):
            raise result
    return out


def test_every_rank_is_in_one_group_of_neighbours() -> None:
    out = run(lambda plane: [own_group(plane, n) for n in (1, 2)])
    assert [o[0] for o in out] == [[0, 1, 2, 3]] * 4
    assert [o[1] for o in out] == [[0, 1], [0, 1], [2, 3], [2, 3]]


@pytest.mark.parametrize("groups", [3, 4, 5, 8])
def test_ranks_that_do_not_make_such_groups_are_refused_before_anything_is_formed(groups: int) -> None:
    def rank_main(plane: Plane) -> int:
        for refused in (
            lambda: form(plane, None, "bench", groups=groups),
            lambda: steps(
                plane, collectives=[Collective.BARRIER], op="sum", dtypes=["float32"], sizes=[4], hidden=1, groups=groups
            ),
        ):
            with pytest.raises(errors.ConfigError, match=rf"wanted {groups} groups of equal size, of 2 ranks or more, found 4"):
                refused()
        return len(plane.communicators)

    assert run(rank_main) == [0] * 4


def test_groups_side_by_side_measure_the_same_and_every_rank_has_the_rows_of_the_slowest() -> None:
    inside, most, lock = [0, 0], [0], threading.Lock()

    def rank_main(plane: Plane) -> Any:
        formed = form(plane, ["torch"], "bench", groups=2)
        (comm,) = formed.values()
        group, call = plane.rank // 2, comm.all_reduce_

        def counted(*args: Any) -> Any:
            with lock:
                inside[group] += 1
                most[0] = max(most[0], min(inside))
            result = call(*args)
            with lock:
                inside[group] -= 1
            return result

        comm.all_reduce_ = counted  # type: ignore[method-assign]
        todo = steps(
            plane,
            collectives=[Collective.ALL_REDUCE, Collective.REDUCE_SCATTER],
            op="sum",
            dtypes=["float32"],
            sizes=[12],
            hidden=1,
            groups=2,
        )
        return [s.nbytes for s in todo], list(comm.ranks), measure(plane, formed, todo, pin="off", rounds=2)

    out = run(rank_main)
    assert [ranks for _, ranks, _ in out] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [sizes for sizes, _, _ in out] == [[12, 8]] * 4  # two ranks divide it, not four
    assert [rows for _, _, rows in out] == [out[0][2]] * 4
    assert [(r.ranks, r.groups, r.vs_torch) for r in out[0][2]] == [(2, 2, 1.0)] * 2
    assert most[0] >= 1  # both were in a call at once
    assert "all_reduce sum, float32, 2 groups of 2 ranks at once, cpu" in table(out[0][2])


def test_a_backend_that_one_group_cannot_have_is_no_candidate_of_any() -> None:
    plugins = devices.host(devices.spec(probe="test_bench_groups:first_ranks_alone"))

    def rank_main(plane: Plane) -> list[str]:
        with pytest.raises(errors.ConfigError, match=r"backend 'twin' cannot serve these ranks: .*rank 0 is elsewhere"):
            form(plane, ["twin"], "asked", groups=2)
        return list(form(plane, None, "bench", groups=2))

    assert run(rank_main, plugins=plugins) == [["torch"]] * 4


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where ranks share a GPU: NCCL refuses them."""

    def refuse(self: Any, context: Any) -> None:
        raise RuntimeError("two ranks on one device")

    monkeypatch.setattr(TorchDistributed, "open", refuse)


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize("groups", [1, 2])
def test_without_torch_the_others_are_measured_and_it_is_said(groups: int) -> None:
    def rank_main(plane: Plane) -> Any:
        said: list[str] = []
        formed = form(plane, None, "bench", groups=groups, left_out=said.append)
        # It has no barrier: then the ranks meet at the control plane.
        met = beginning(plane, formed["twin"])
        assert met is not formed["twin"].barrier
        met()
        todo = steps(
            plane, collectives=[Collective.ALL_REDUCE], op="sum", dtypes=["float32"], sizes=[64], hidden=1, groups=groups
        )
        (row,) = measure(plane, formed, todo, pin="off", rounds=1)
        return list(formed), said, row

    out = run(rank_main, plugins=devices.host(devices.spec()))
    assert out == [out[0]] * 4
    names, said, row = out[0]
    assert names == ["twin"] and row.backend == "twin" and row.vs_torch is None
    (line,) = said
    assert line.startswith("torch: ") and "two ranks on one device" in line
    assert "times" not in table([row])


@pytest.mark.usefixtures("without_torch")
def test_without_any_backend_the_reasons_are_the_error() -> None:
    def rank_main(plane: Plane) -> None:
        with pytest.raises(errors.ConfigError, match=r"no backend serves these ranks: torch: .*two ranks on one device"):
            form(plane, None, "bench")
        with pytest.raises(errors.ConfigError, match="backend 'torch' cannot serve these ranks"):
            form(plane, ["torch"], "asked")

    run(rank_main, 2, plugins=PluginHost())


def test_the_barrier_of_a_group_of_all_begins_its_turns_and_groups_side_by_side_meet_before() -> None:
    def rank_main(plane: Plane) -> tuple[bool, bool]:
        whole, part = form(plane, ["torch"], "a")["torch"], form(plane, ["torch"], "b", groups=2)["torch"]
        return beginning(plane, whole) == whole.barrier, beginning(plane, part) == part.barrier

    assert run(rank_main) == [(True, False)] * 4
