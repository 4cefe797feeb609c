"""Steps of a communicator over its control plane that happen on every rank or on none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from commplane.agree import StoreBootstrap, joint_verdict, setback
from commplane.errors import AgreementError, CommunicatorError, MismatchError, PeerError
from commplane.select import difference

__all__ = ["JointSteps"]

T = TypeVar("T")
Poison = Callable[[Exception], None]


class JointSteps:
    """Comparisons and votes of one communicator. Every method is collective over its ranks.

    `poison` is called with the error of a step after which the ranks are no longer at the same point. It is given with each call
    and not kept: the communicator holds this object, and is to be collected without help of the garbage collector.

    Args:
        who: how errors begin.
        bootstrap: control plane of the communicator.
        attempts: control planes of its backends; ranks that wait in one are told when a step fails here.
        timeout: seconds that one wait may take.
    """

    def __init__(self, who: str, bootstrap: StoreBootstrap, attempts: Sequence[StoreBootstrap], timeout: float) -> None:
        self._who = who
        self._bootstrap = bootstrap
        self._attempts = tuple(attempts)
        self._timeout = timeout
        self._steps = 0

    def compare(self, what: str, value: Mapping[str, Any], poison: Poison) -> None:
        """Raise `MismatchError` on every rank if `value`, a JSON object, is not equal on all of them."""
        try:
            values = self._bootstrap.all_gather(value, what=what, timeout=self._timeout)
        except (PeerError, AgreementError) as error:
            poison(error)
            raise
        text = difference(f"the arguments of {what}", dict(zip(self._bootstrap.ranks, values, strict=True)))
        if text is not None:
            raise MismatchError(f"{self._who} {text}")

    def run(self, what: str, value: Mapping[str, Any], act: Callable[[], T], undo: Callable[[T], None], poison: Poison) -> T:
        """Compare `value` over the ranks, act, vote.

        Raises:
            CommunicatorError: `act` raised on some rank; on the others its result was given to `undo`.
        """
        self.compare(what, value, poison)
        done = self.vote(what, act, undo, poison)
        if done[1] is not None:
            raise CommunicatorError(f"{self._who} {what} failed and was rolled back on all ranks: {done[1]}")
        return done[0]  # type: ignore[return-value]

    def vote(self, what: str, act: Callable[[], T], undo: Callable[[T], None], poison: Poison) -> tuple[T | None, str | None]:
        """Act, then vote: the result and None, or None and why some rank could not, equal on every rank.

        What was done and is not to stay, also because a rank was lost in the vote, is given to `undo`.
        """
        self._steps += 1
        for attempt in self._attempts:
            attempt.begin(f"{what}/{self._steps}")
        problem, done = None, []
        try:
            try:
                done.append(act())
            except Exception as error:  # whatever a plugin raises becomes a vote
                problem = setback(error)
                if not problem.derived:
                    for attempt in self._attempts:
                        attempt.fail(problem.text)
            reasons = joint_verdict(self._bootstrap, what, problem, 2 * self._timeout)
        except BaseException as error:  # a rank is lost, or this one was interrupted: the ranks are no longer in step
            for attempt in self._attempts:
                attempt.fail(f"{type(error).__name__} in {what}")
            poison(error if isinstance(error, Exception) else AgreementError(f"{self._who} {what} was interrupted"))
            for result in done:
                undo(result)
            raise
        if reasons is None:
            return done[0], None
        for result in done:
            undo(result)
        return None, reasons
