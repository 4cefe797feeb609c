"""Steps of a tuning that every rank takes, each bounded and followed by a vote, so that all ranks know how it went on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from commplane.agree import StoreBootstrap, on_device, setback
from commplane.agree.bounded import Abandoned, call_bounded
from commplane.agree.device import settle
from commplane.errors import AgreementError, CommunicatorError, PeerError
from commplane.runtime.tune.data import Wrong

__all__ = ["Steps", "Trouble"]

_GRACE_S = 1.0
"""How long a rank goes on after another has raised: where all raise, each is to say its own reason, and stays in step."""


@dataclass(frozen=True)
class Trouble:
    """Why a step failed, equal on every rank. `wrong` if some rank has found a wrong result."""

    text: str
    wrong: bool


class Steps:
    """The steps of one call of `tune`. Every method is collective over the group.

    Args:
        who: how errors begin.
        bootstrap: control plane of the communicator.
        number: of this call of `tune` on the communicator; equal on all ranks.
        device: where the group's tensors are; the current one inside of steps, which run in another thread.
        seconds: that one step may take.
        poison: called with the error after which the ranks are no longer at the same point.
        check: raises where the communicator can no longer be used.
    """

    def __init__(
        self,
        who: str,
        bootstrap: StoreBootstrap,
        number: int,
        device: str,
        seconds: float,
        poison: Callable[[Exception], None],
        check: Callable[[], None],
    ) -> None:
        # A step may vote on the communicator's own control plane, as a capture does, and be left waiting there: the votes on the
        # steps are apart from it.
        self._votes = bootstrap.child(f"tune/{number}/votes", who=who, timeout=2 * seconds + 1)
        self._told = bootstrap.child(f"tune/{number}", who=who, timeout=seconds)
        self._who = who
        self._device = device
        self._seconds = seconds
        self._poison = poison
        self._check = check
        self._count = 0

    def gather(self, value: Any, what: str) -> list[Any]:
        """Every rank's value, in group order."""
        try:
            # A step is bounded on each rank, so a rank may come here that much later than another.
            return self._votes.all_gather(value, what=f"tune, {what}")
        except BaseException as error:
            self._out_of_step(error, what)
            raise

    def alone(self, what: str, act: Callable[[], Any]) -> tuple[Any, Trouble | None]:
        """What `act`, which does not communicate, gave on this rank; or how it failed on some rank."""
        done, said = self._vote(what, act)
        return done, _trouble(said)

    def together(self, what: str, act: Callable[[], Any]) -> tuple[Any, Trouble | None]:
        """The same of an `act` that communicates.

        Raises:
            CommunicatorError: it failed on some ranks only, or ranks were left waiting, and may not be at the same point.
        """
        done, said = self._vote(what, act)
        raised = {rank: text for rank, (kind, text) in said.items() if kind == "raised"}
        left = [rank for rank, (kind, _) in said.items() if kind == "left"]
        if left or 0 < len(raised) < len(said):
            cause = _by_text(raised) or _by_text({rank: said[rank][1] for rank in left})
            where = "on some ranks only, which are now out of step" if raised or len(left) < len(said) else "on every rank"
            problem = CommunicatorError(
                f"{self._who} tune, {what}: failed {where}: {cause}: close the communicator"
                f"{', and end the process if the device does not come to rest' if self._device.startswith('cuda') else ''}"
            )
            self._poison(problem)
            raise problem
        self._check()  # a capture that fails on all ranks poisons
        return done, _trouble(said)

    def _vote(self, what: str, act: Callable[[], Any]) -> tuple[Any, dict[int, tuple[str, str]]]:
        """Act within the deadline; what it gave, and by global rank how it went: ok, wrong, raised, or left undone."""
        self._count += 1
        self._told.begin(str(self._count))
        clock = self._votes.clock
        failed: list[tuple[Exception, float]] = []

        def step() -> Any:
            with on_device(self._device):
                out = act()
                settle(self._device)  # what a kernel fails with is of this step, and what it wrote is there for the next thread
                return out

        def give_up() -> Exception | None:
            if not failed and (error := self._told.peer_failed()) is not None:
                failed.append((error, clock.now() + _GRACE_S))
            return failed[0][0] if failed and clock.now() >= failed[0][1] else None

        done, mine = None, ("ok", "")
        try:
            # Every rank of a large group that waits wakes up for each look.
            look_every = max(0.05, 0.0005 * self._votes.world_size)
            done = call_bounded(step, self._seconds, f"tune, {what}", give_up=give_up, look_every=look_every, clock=clock)
        except Wrong as error:
            mine = "wrong", str(error)
        except Exception as error:  # whatever a plugin raises becomes a vote
            problem = setback(error.__cause__ if isinstance(error, Abandoned) and error.__cause__ else error)
            mine = "left" if isinstance(error, (Abandoned, PeerError)) else "raised", problem.text
            self._told.fail(problem.text)
        except BaseException as error:  # Ctrl-C
            self._out_of_step(error, what)
            raise
        said = self.gather(mine, f"vote on {what}")
        return done, {rank: (kind, text) for rank, (kind, text) in zip(self._votes.ranks, said, strict=True)}

    def _out_of_step(self, error: BaseException, what: str) -> None:
        self._told.fail(f"{type(error).__name__} in tune, {what}")
        self._poison(error if isinstance(error, Exception) else AgreementError(f"{self._who} tune, {what} was interrupted"))


def _trouble(said: dict[int, tuple[str, str]]) -> Trouble | None:
    found = {rank: text for rank, (kind, text) in said.items() if kind != "ok"}
    return Trouble(_by_text(found), any(kind == "wrong" for kind, _ in said.values())) if found else None


def _by_text(found: dict[int, str]) -> str:
    """Each text once, with the ranks that have it."""
    ranks: dict[str, list[int]] = {}
    for rank, text in found.items():
        ranks.setdefault(text, []).append(rank)
    parts = (f"{'rank' if len(at) == 1 else 'ranks'} {', '.join(map(str, at))}: {text}" for text, at in ranks.items())
    return "; ".join(parts)
