"""Whether what was measured can be followed."""

from __future__ import annotations

from collections.abc import Sequence

from commplane.errors import CommunicatorError
from commplane.select import Curve, Plan

__all__ = ["check_outcome"]


def check_outcome(who: str, curves: Sequence[Curve], stopped: str, plan: Plan, before: Plan) -> None:
    """Refuse a plan that nothing was measured for, or that leaves calls with no way to run. Pure, equal on every rank.

    Args:
        who: how the error begins.
        curves: what was measured.
        stopped: why sizes ended early, if they did.
        plan: the one to follow.
        before: the one that stays if it is refused.

    Raises:
        CommunicatorError: it is refused.
    """
    failed = "; ".join(f"{c.candidate}: {c.failed}" for c in curves if c.failed)
    if not any(c.points for c in curves):
        reasons = "; ".join(text for text in (stopped, failed) if text)
        raise CommunicatorError(f"{who} tune measured nothing, so the plan stays as it was: {reasons or 'no way serves a size'}")
    lost = plan.lacks(before)
    if lost is not None:
        raise CommunicatorError(
            f"{who} tune would leave {lost}, with no way to run, so the plan stays as it was: {failed}: "
            f"leave out the backend that fails with the setting backends"
        )
