"""Hundreds of cases on virtual ranks: whatever goes wrong, those that are left come to one outcome, in time, and say why."""

from __future__ import annotations

import pytest
from agreement_claims import judge, shown
from agreement_options import cases
from agreement_ranks import play
from agreement_scenario import FAULTS, FOREVER_S, Fault, Scenario, scenarios
from hypothesis import HealthCheck, given, note, settings


# What --full takes. The scenario that hypothesis prints is all that agreement_replay.py needs.
@pytest.mark.timeout(1800)
def test_ranks_agree_under_fire(request: pytest.FixtureRequest) -> None:
    @settings(
        max_examples=cases(request.config),
        deadline=None,
        database=None,
        # The same cases each time: what is red was changed. Others, and more, with --full.
        derandomize=not request.config.getoption("--full", default=False),
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(scenarios())
    def under_fire(scenario: Scenario) -> None:
        case = play(scenario)
        note("\n".join(shown(case)))
        note(f"play it again: python packages/core/tests/agreement/agreement_replay.py '{scenario.to_json()}'")
        judge(case)

    under_fire()


def test_every_fault_takes_place_and_every_claim_holds_alone_with_it() -> None:
    for phase, hows in FAULTS.items():
        for how in hows:
            seconds = FOREVER_S if how in ("late", "silence") else 0.0
            fault = Fault(phase, how, rank=1, backend=1, seconds=seconds, point=60 if phase == "anywhere" else 0)
            groups = ((0, 1, 2), (2, 1)) if phase == "order" else ((0, 1, 2),)
            case = play(Scenario(3, groups, faults=(fault,), seed=1))
            assert fault in case.fired, fault
            judge(case)


def test_without_a_fault_every_rank_succeeds_in_every_step_and_64_ranks_agree() -> None:
    for ranks in (1, 2, 64):
        case = play(Scenario(ranks, (tuple(range(ranks)),), seed=ranks))
        judge(case)
        for log in case.logs.values():
            assert all(r.error is None for r in log), "\n".join(shown(case))
            rounds = {r.step: r.rounds for r in log}
            # Facts take three rounds; a communicator of two backends the agreement, a vote on the policy, two for each, a commit.
            wanted = {"init": 4, "create 0": 7, "prepare 0": 2, "empty 0": 2, "use 0": 0, "capture": 2, "close 0": 1, "leave": 1}
            assert rounds == (wanted if ranks > 1 else dict.fromkeys(wanted, 0))


@pytest.mark.parametrize("restless", [0.05, 1.0])
def test_a_case_is_the_same_every_time_for_the_same_seed(restless: float) -> None:
    fault = Fault("anywhere", "die", rank=1, point=77)

    def text(seed: int) -> tuple[list[str], float, int]:
        case = play(Scenario(4, (tuple(range(4)), (2, 1)), faults=(fault,), seed=seed, restless=restless))
        return list(shown(case)), case.simulation.time, case.simulation.points.total()

    assert text(3) == text(3)
    assert len({text(seed)[2] for seed in range(5)}) > 1


def test_a_scenario_is_read_back_as_it_was_printed() -> None:
    fault = Fault("anywhere", "silence", rank=1, seconds=5.0, point=9, everywhere=True)
    scenario = Scenario(3, ((0, 1, 2), (2, 0)), wanted=("b", "a"), faults=(fault,), seed=5)
    assert Scenario.from_json(repr(scenario)) == scenario
