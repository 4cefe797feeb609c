"""What the cases have found, each as the sentence that is true since."""

from __future__ import annotations

from agreement_claims import judge
from agreement_ranks import Case, play
from agreement_scenario import FOREVER_S, Fault, Scenario

from commplane import errors

THREE = (tuple(range(3)),)


def one(fault: Fault, seed: int = 0) -> Case:
    case = play(Scenario(3, THREE, faults=(fault,), seed=seed))
    assert fault in case.fired
    judge(case)
    return case


def last_error(case: Case, rank: int, step: str) -> BaseException:
    error = next(r.error for r in case.logs[rank] if r.step == step)
    assert error is not None
    return error


def test_a_workspace_is_closed_when_another_rank_does_not_come_to_the_vote() -> None:
    case = one(Fault("prepare", "late", rank=1, backend=0, seconds=FOREVER_S))
    assert isinstance(last_error(case, 0, "prepare 0"), errors.PeerError)
    others = [w for rank, w in case.workspaces if rank != 1]
    assert others and all((w.commits, w.closes) == (0, 1) for w in others)


def test_a_rank_that_fails_to_register_a_capture_is_named_with_its_reason() -> None:
    case = one(Fault("registration", "raise", rank=1, backend=1))
    for rank in range(3):
        error = last_error(case, rank, "capture")
        assert isinstance(error, errors.CaptureError)
        assert "registration after the capture failed: rank 1: RuntimeError: as rank 1 was told for registration" in str(error)


def test_a_rank_that_waited_in_a_capture_raises_from_the_reason_of_the_rank_that_failed() -> None:
    case = one(Fault("capture", "raise", rank=1))
    error = last_error(case, 0, "capture")
    assert isinstance(error, errors.PeerError)
    assert isinstance(error.__cause__, errors.CaptureError)
    assert "rank 1 failed inside the capture: RuntimeError: as rank 1 was told for capture" in str(error.__cause__)


def test_communicators_can_be_closed_after_an_interrupt_in_the_vote_on_a_capture() -> None:
    steps = []
    for point in range(100, 260, 4):
        fault = Fault("anywhere", "interrupt", rank=0, point=point)
        case = play(Scenario(2, ((0, 1), (0, 1)), faults=(fault,), seed=1, restless=1.0))
        judge(case)
        steps.append(case.fired.get(fault))
    assert "capture" in steps


def test_backends_are_closed_when_a_rank_is_cut_off_or_interrupted_at_any_point_of_their_creation() -> None:
    built = 0
    for how in ("lost", "interrupt"):
        for point in range(1, 80):
            case = play(Scenario(1, ((0,),), faults=(Fault("anywhere", how, rank=0, point=point),)))
            judge(case)
            built += len(case.built)
    assert built
