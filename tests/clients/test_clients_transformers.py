"""Models of transformers, cut over two ranks by their own plans, over commplane: beside the whole model, and beside Gloo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.timeout(600)  # a job ends itself before that

Results = Callable[[str], list[dict[str, Any]]]

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mixtral", "qwen3_moe")

# A sum over half of a row and one over the other half are added, where the whole model adds the row in another order. Logits here
# are at most about 10, whose last bit is 1e-6 as float32; each of 2 layers has two such sums. Over a wrong rank, or over a tensor
# that was read too early, logits differ by 0.1 and more.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
# bfloat16 has 8 bits: 0.03 of the last one at 8.
CLOSE_BFLOAT16 = {"rtol": 0.05, "atol": 0.15}


def check_like_gloo(rank: dict[str, Any]) -> None:
    """Bit for bit: of two numbers the sum is the same in either order."""
    found, wanted = rank["commplane"], rank["gloo"]
    assert found.keys() == wanted.keys()
    differing = [name for name, value in wanted.items() if not torch.equal(found[name], value)]
    assert not differing


def check_like_whole(rank: dict[str, Any], close: dict[str, float] = CLOSE) -> None:
    found, wanted = rank["commplane"], rank["whole"]
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_split_model_answers_what_the_whole_one_does(results: Results, architecture: str) -> None:
    for rank in results(f"asked:{architecture}"):
        check_like_whole(rank)  # tokens are integers, for which close is equal


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_split_model_answers_over_commplane_what_it_does_over_gloo(results: Results, architecture: str) -> None:
    first, second = results(f"asked:{architecture}")
    check_like_gloo(first)
    check_like_gloo(second)
    assert all(torch.equal(first["commplane"][name], value) for name, value in second["commplane"].items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_a_split_model_communicates_goes_over_the_agreed_plan(results: Results, architecture: str) -> None:
    pytest.importorskip("commplane_custom_ar", reason="wants commplane-custom-ar: pip install commplane-custom-ar")
    for rank in results(f"asked:{architecture}"):
        assert rank["plan"][0] == "custom_ar"
        # Two sums in each of two layers for each forward; the logits are gathered once.
        forwards = rank["calls"]["all_gather"]
        assert forwards >= 19 and rank["calls"]["all_reduce_"] >= 4 * forwards


def test_a_split_model_in_bfloat16_answers_what_it_does_over_gloo(results: Results) -> None:
    for rank in results("bfloat16:llama"):
        check_like_gloo(rank)
        prompts = {of: {n: a for n, a in rank[of].items() if "tokens" not in n} for of in ("commplane", "whole")}
        check_like_whole(prompts, CLOSE_BFLOAT16)  # not tokens: rounding may choose another one of two near ones


def test_gradients_of_a_split_model_are_those_of_the_whole_one_and_those_over_gloo(results: Results) -> None:
    for rank in results("trained:qwen3"):
        check_like_gloo(rank)
        check_like_whole(rank)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_gradients_of_more_architectures(results: Results, architecture: str) -> None:
    for rank in results(f"trained:{architecture}"):
        check_like_gloo(rank)
        check_like_whole(rank)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_compiled_split_model_answers_what_the_whole_one_does(results: Results, architecture: str) -> None:
    for rank in results(f"compiled:{architecture}"):
        check_like_gloo(rank)
        check_like_whole(rank)


@pytest.mark.long
def test_experts_in_bfloat16_answer_what_they_do_over_gloo(results: Results) -> None:
    for rank in results("bfloat16:qwen3_moe"):
        check_like_gloo(rank)
