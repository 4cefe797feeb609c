"""A capture over several communicators, and the vote after it: same operations on every rank, and no rank failed inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from commplane.agree import CaptureGuard, StoreBootstrap, setback
from commplane.api import CommBackend
from commplane.errors import CaptureError, CommplaneError, PeerError
from commplane.runtime.joint import JointSteps

if TYPE_CHECKING:
    from commplane.runtime.communicator import Communicator

__all__ = ["agree_on_capture", "capture_all"]


@contextmanager
def capture_all(guard: CaptureGuard, communicators: Sequence[Communicator]) -> Iterator[None]:
    """`Plane.capture` over the communicators that are there when it is entered."""
    communicators = tuple(communicators)
    if guard.active:
        raise CaptureError("a capture inside a capture: end the first one before")
    for c in communicators:
        c.check_usable("capture")
    entered: list[Communicator] = []
    guard.active = True
    failure: BaseException | None = None
    try:
        for c in communicators:
            entered.append(c)
            c._capture_begin()
        yield
    except BaseException as error:  # every rank must come to the votes, also this one
        failure = error
    guard.active = False
    if failure is not None:
        # Peers that wait for us inside the capture, in whichever communicator, can stop before the first vote.
        for c in entered:
            if c.captures:
                c.abort()
    outcomes: list[CaptureError | None] = []
    try:
        for c in entered:
            outcomes.append(c._capture_end(failure))
    except BaseException:  # interrupted in a vote: this rank comes to none of those behind it
        for c in entered[len(outcomes) :]:
            c._capture_interrupted()
        raise
    if failure is not None:
        cause = next((o for o in outcomes if o is not None), None)
        if isinstance(failure, PeerError) and cause is not None:  # who only waited in vain has learned from the vote why
            cause.__cause__ = failure.__cause__
            raise failure from cause
        raise failure
    for outcome in outcomes:
        if outcome is not None:
            raise outcome


def agree_on_capture(
    who: str,
    bootstrap: StoreBootstrap,
    joint: JointSteps,
    backends: Sequence[tuple[CommBackend, StoreBootstrap]],
    timeout: float,
    records: Sequence[str],
    error: BaseException | None,
    poison: Callable[[Exception], None],
) -> CaptureError | None:
    """What every rank is to raise, or None. Collective over the communicator.

    Args:
        who: how errors begin.
        bootstrap: control plane of the communicator.
        joint: the communicator's joint steps.
        backends: those that capture, each with its own control plane; they exchange what replay needs once all ranks agree.
        timeout: seconds that one wait at start-up may take; a vote may take twice as long.
        records: what this rank captured, in order.
        error: what the body of the capture raised on this rank.
        poison: called where the ranks may be at different points.
    """
    failed = None if error is None else setback(error)
    mine = {"problem": failed and failed.text, "derived": failed is not None and failed.derived, "records": list(records)}
    try:
        votes = bootstrap.all_gather(mine, what="vote on capture", timeout=2 * timeout)
        problems = [(r, v) for r, v in zip(bootstrap.ranks, votes, strict=True) if v["problem"] is not None]
        if problems:
            causes = [(r, v) for r, v in problems if not v["derived"]] or problems
            text = "; ".join(f"rank {r} failed inside the capture: {v['problem']}" for r, v in causes)
            out = CaptureError(f"{who} {text}")
            # Ranks may have stopped at different operations: what one sends next, another would take for an earlier one.
            poison(out)
            return out
        text = _first_difference({r: v["records"] for r, v in zip(bootstrap.ranks, votes, strict=True)}) or ""
        if text:
            out = CaptureError(f"{who} {text}")
            poison(out)
            return out

        def register() -> None:
            for backend, own in backends:
                backend.capture_end(own)

        _, reasons = joint.vote("registration after capture", register, lambda _done: None, poison)
        return None if reasons is None else CaptureError(f"{who} registration after the capture failed: {reasons}")
    except CommplaneError as lost:
        poison(lost)
        return CaptureError(f"{who} vote on the capture failed: {lost}")


def _first_difference(records: Mapping[int, Sequence[str]]) -> str | None:
    """How the ranks' captured operations differ, or None. Pure."""
    if len({tuple(r) for r in records.values()}) == 1:
        return None
    longest = max(map(len, records.values()))

    def at(i: int) -> Iterable[tuple[int, str]]:
        return ((rank, r[i] if i < len(r) else "nothing") for rank, r in records.items())

    index = next(i for i in range(longest) if len({text for _, text in at(i)}) > 1)
    counts = ", ".join(f"rank {rank} {len(r)}" for rank, r in records.items())
    shown = "; ".join(f"rank {rank} has {text}" for rank, text in at(index))
    return f"ranks captured different operations ({counts} in all), first at number {index + 1}: {shown}"
