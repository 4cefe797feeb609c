"""Many ranks whose storage, copies, memory and clocks differ: their caches stay equal, and one that decides alone is found."""

from __future__ import annotations

import subprocess
import sys

import pytest

from commplane.errors import CommplaneError
from commplane.testing import SimulatedRounds
from commplane_cache.simulator import MISTAKES, Scenario, simulate
from commplane_cache.simulator.rank import Faults

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("seed", range(0, 54, 4))
def test_ranks_stay_equal_and_lose_no_page_with_every_policy(seed):
    outcome = simulate(Scenario(ranks=4, steps=200, seed=seed, check_every=20), SimulatedRounds)
    assert outcome.served > 20
    assert outcome.reused > 0


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_groups_of_any_size_stay_equal(ranks):
    """One rank, TP or CP alone, and TP x CP are groups of one, some and all ranks: the same code, one round a step."""
    outcome = simulate(Scenario(ranks=ranks, steps=200, seed=0), SimulatedRounds)
    assert outcome.counters["storage"]["moved"] > 0
    assert outcome.counters["host"]["moved"] > 0


@pytest.mark.parametrize("seed", [0, 6, 36, 42])
def test_ranks_that_ask_and_abort_at_different_steps_stay_equal(seed):
    faults = Faults(delay=6, copy=0.1)
    scenario = Scenario(ranks=4, steps=250, seed=seed, arrive=0.4, abort=0.3, host=24, check_every=5, faults=faults)
    assert simulate(scenario, SimulatedRounds).counters["aborted"] > 5


def test_64_ranks_stay_equal():
    simulate(Scenario(ranks=64, steps=100, seed=33, check_every=50), SimulatedRounds)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_64_ranks_stay_equal_for_100000_steps():
    simulate(Scenario(ranks=64, steps=100_000, seed=0), SimulatedRounds)


def test_the_same_seed_plays_the_same_game():
    scenario = Scenario(ranks=3, steps=150, seed=18)
    assert simulate(scenario, SimulatedRounds) == simulate(scenario, SimulatedRounds)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_rank_that_decides_alone_is_found(mistake):
    found = []
    for seed in range(0, 54, 6):
        scenario = Scenario(
            ranks=4,
            steps=250,
            seed=seed,
            arrive=0.4,
            abort=0.3,
            host=24,  # so small that much comes from storage, and is aborted on its way
            check_every=5,
            faults=Faults(delay=6, copy=0.1),
            mistake=MISTAKES[mistake],
        )
        try:
            simulate(scenario, SimulatedRounds)
        except CommplaneError as error:
            found.append(str(error))
            break
    assert found, f"{mistake} was not noticed"


def test_a_reduction_over_tp_alone_is_found():
    """The upstream bug: ranks of one TP row agree with each other and not with those of the other CP rows."""

    def rows(ranks, specs):
        return [one for _ in range(ranks // 2) for one in SimulatedRounds(2, specs)]

    with pytest.raises(CommplaneError, match=r"the digests of rank 0 and rank [23] differ"):
        simulate(Scenario(ranks=4, steps=200, seed=0), rows)
    simulate(Scenario(ranks=4, steps=200, seed=0), SimulatedRounds)


def test_ranks_that_differ_are_named_with_the_decision_in_which_they_do():
    with pytest.raises(CommplaneError, match=r"digests of rank 0 and rank \d differ.*Decision\(number=\d+, step=\d+"):
        simulate(Scenario(ranks=4, steps=400, seed=0, mistake=MISTAKES["own_victims"]), SimulatedRounds)


@pytest.mark.parametrize(
    ("mistake", "code", "said"), [([], 0, "equal on all ranks"), (["--mistake", "own_victims"], 1, "differ")]
)
def test_the_command_says_whether_ranks_stayed_equal(mistake, code, said):
    words = [sys.executable, "-m", "commplane_cache.simulator", "--ranks", "3", "--steps", "200", *mistake]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, said in done.stdout) == (code, True), done.stdout + done.stderr
