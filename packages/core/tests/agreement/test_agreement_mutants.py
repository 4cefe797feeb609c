"""The claims are worth something: code that breaks one of the rules of the agreement is caught by them, in a few cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from agreement_claims import judge
from agreement_ranks import play
from agreement_scenario import Scenario, scenarios
from hypothesis import HealthCheck, Phase, given, seed, settings

from commplane.agree import Setback, StoreBootstrap, build, joint_verdict
from commplane.runtime import formation, joint, startup

MOST_CASES = 1500

Patch = pytest.MonkeyPatch
MUTANTS: dict[str, Callable[[Patch], None]] = {}


def mutant(function: Callable[[Patch], None]) -> Callable[[Patch], None]:
    MUTANTS[function.__name__] = function
    return function


@mutant
def a_rank_skips_a_vote(patch: Patch) -> None:
    def skipping(bootstrap: StoreBootstrap, *args: Any) -> str | None:
        return None if bootstrap.ranks[bootstrap.rank] == 1 else joint_verdict(bootstrap, *args)

    patch.setattr(formation, "joint_verdict", skipping)


@mutant
def the_digests_are_gathered_and_not_compared(patch: Patch) -> None:
    patch.setattr(startup, "difference", lambda *_: None)
    patch.setattr(formation, "disagreement", lambda *_: None)


@mutant
def each_rank_decides_by_its_own_success(patch: Patch) -> None:
    def alone(bootstrap: StoreBootstrap, what: str, problem: Setback | None, *args: Any) -> str | None:
        joint_verdict(bootstrap, what, problem, *args)
        return problem and problem.text

    patch.setattr(build, "joint_verdict", alone)


def _with_another_timeout(patch: Patch, change: Callable[[StoreBootstrap, float], float]) -> None:
    real = StoreBootstrap._round

    def changed(self: StoreBootstrap, value: Any, what: str, timeout: float | None) -> Any:
        return real(self, value, what, change(self, self._timeout if timeout is None else timeout))

    patch.setattr(StoreBootstrap, "_round", changed)


@mutant
def a_rank_leaves_a_round_early(patch: Patch) -> None:
    _with_another_timeout(patch, lambda self, timeout: timeout / 20 if self.rank == 0 else timeout)


@mutant
def a_rank_waits_beyond_the_deadline(patch: Patch) -> None:
    _with_another_timeout(patch, lambda _self, timeout: timeout + 0.5)


@mutant
def a_rank_that_gives_up_tells_nobody(patch: Patch) -> None:
    real = StoreBootstrap._publish
    patch.setattr(StoreBootstrap, "_publish", lambda self, at, said: said if "missing" in said else real(self, at, said))


@mutant
def a_rank_that_fails_says_nothing(patch: Patch) -> None:
    patch.setattr(StoreBootstrap, "fail", lambda _self, _reason: None)


@mutant
def a_failed_backend_is_not_closed(patch: Patch) -> None:
    patch.setattr(build, "close_backend", lambda _name, _backend: None)


@mutant
def a_call_that_comes_back_late_is_not_cleaned_up(patch: Patch) -> None:
    real = build.call_bounded
    patch.setattr(build, "call_bounded", lambda *args, on_late, **rest: real(*args, **rest))


@mutant
def a_failed_prepare_is_not_undone(patch: Patch) -> None:
    real = joint.JointSteps.vote
    patch.setattr(joint.JointSteps, "vote", lambda self, what, act, _undo, poison: real(self, what, act, lambda _: None, poison))


@mutant
def the_reason_is_lost(patch: Patch) -> None:
    patch.setattr(build, "setback", lambda _error: Setback("failed"))


# It takes hundreds of cases, 7 to 15 s, until one shows these.
LONG = {"the_digests_are_gathered_and_not_compared", "a_rank_that_gives_up_tells_nobody"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in MUTANTS])
def test_a_broken_rule_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    @seed(1)
    @settings(
        max_examples=MOST_CASES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(scenarios(4))
    def under_fire(scenario: Scenario) -> None:
        tried.append(scenario)
        judge(play(scenario))

    MUTANTS[name](monkeypatch)
    with pytest.raises(AssertionError) as caught:
        under_fire()
    monkeypatch.undo()
    print(f"{name}: caught in case {len(tried)}: {caught.value}")
    judge(play(tried[-1]))  # it was the mutant, and not the case
