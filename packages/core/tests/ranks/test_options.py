"""Options of one communicator, and candidates of a bench that differ in them alone."""

from __future__ import annotations

from typing import Any

import devices
import pytest

from commplane import errors
from commplane.bench import form
from commplane.runtime import Plane
from commplane.testing import run_threads

SPEC = devices.spec(options={"algorithm": "auto", "blocks": 8})


def run(function: Any) -> list[Any]:
    return run_threads(2, function, plugins=lambda _rank: devices.host(SPEC), config=lambda _rank: {"timeout": 30}, timeout=60)


def given(comm: Any) -> dict[str, Any]:
    return dict(comm.backends[0].context.options)


def test_options_hold_for_one_communicator_and_the_others_keep_the_settings() -> None:
    def rank_main(plane: Plane) -> Any:
        one = plane.communicator("one", device="cpu", options={"twin": {"algorithm": "one_shot"}})
        other = plane.communicator("other", device="cpu")
        return given(one), given(other), plane.config.options["twin"]

    settings = {"algorithm": "auto", "blocks": 8}
    assert run(rank_main) == [({"algorithm": "one_shot", "blocks": 8}, settings, settings)] * 2


def test_ranks_with_other_options_all_get_an_error_that_shows_them() -> None:
    def rank_main(plane: Plane) -> str:
        with pytest.raises(errors.AgreementError) as caught:
            plane.communicator("tp", device="cpu", options={"twin": {"blocks": 8 + plane.rank}})
        return str(caught.value)

    first, second = run(rank_main)
    assert first == second
    assert "{'twin': {'blocks': 8}}" in first and "{'twin': {'blocks': 9}}" in first


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"twin": {"block": 1}}, "no backend has a setting 'twin.block', found .*twin.algorithm, twin.blocks"),
        ({"nobody": {"algorithm": "x"}}, "no backend has a setting 'nobody.algorithm'"),
        ({"twin": {"blocks": "many"}}, "setting 'twin.blocks' from argument: wanted int"),
    ],
)
def test_an_option_that_does_not_exist_or_fit_is_an_error_on_every_rank(options: Any, words: str) -> None:
    def rank_main(plane: Plane) -> None:
        with pytest.raises(errors.ConfigError, match=words):
            plane.communicator("tp", device="cpu", options=options)

    assert run(rank_main) == [None, None]


def test_one_backend_is_several_candidates_by_its_algorithms() -> None:
    def rank_main(plane: Plane) -> Any:
        formed = form(plane, ["twin:one_shot", "twin", "twin:two_shot", "torch"], "bench", "cpu")
        return {name: given(comm)["algorithm"] for name, comm in formed.items() if name != "torch"}

    assert run(rank_main) == [{"twin:one_shot": "one_shot", "twin": "auto", "twin:two_shot": "two_shot"}] * 2


def test_a_backend_without_algorithms_cannot_be_asked_for_one() -> None:
    def rank_main(plane: Plane) -> None:
        with pytest.raises(errors.ConfigError, match=r"no backend has a setting 'torch.algorithm'"):
            form(plane, ["torch:ring"], "bench", "cpu")

    assert run(rank_main) == [None, None]
