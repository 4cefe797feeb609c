"""FlashInfer's `CommBackend` over the control plane of one group. The only place where its ranks and ours meet.

FlashInfer numbers ranks within the group, and so does `Bootstrap`; texts for people name global ranks. All that FlashInfer wants
exchanged becomes rounds of one kind, each with room for a failure. So a rank that fails half-way joins one round more, says why
there, and every other rank leaves FlashInfer's code at that point: nobody waits for a deadline. Every round is on the control
plane, on the CPU: nothing touches a device's communicator.

What is raised through FlashInfer's frames is not what the caller of `agree` is given: an error that lives on would keep those
frames, and in them the device memory that was half built.
"""

from __future__ import annotations

import base64
import copy
import pickle
from typing import Any

from commplane.api import Bootstrap
from commplane.errors import CommplaneError, CommunicatorError, UnsupportedOperation

__all__ = ["Ended", "Exchange"]


class Ended(Exception):
    """Raised through FlashInfer's code: some rank has failed or is lost. `Exchange.agree` says what happened."""


class Exchange:
    """One joint step of a group: rounds until `agree` says how it ended. Collective: every rank makes the same rounds.

    After a failure that all ranks know of, or a lost rank, no round is made any more.

    Args:
        bootstrap: control plane of the group; it bounds each round and names who is missing.
        what: the step, for errors.
    """

    def __init__(self, bootstrap: Bootstrap, what: str) -> None:
        self._bootstrap = bootstrap
        self._what = what
        self._ended: CommplaneError | None = None

    def Get_rank(self) -> int:  # noqa: N802  FlashInfer's names, as the next ones
        """Rank in the group. Local."""
        return self._bootstrap.rank

    def Get_size(self) -> int:  # noqa: N802
        """Number of ranks in the group. Local."""
        return self._bootstrap.world_size

    def allgather(self, data: Any) -> tuple[Any, ...]:
        """Every rank's object, by group rank. Collective. Raises `Ended`."""
        return self._values(data)

    def bcast(self, data: Any, root: int) -> Any:
        """The object of group rank `root`. Collective. Raises `Ended`."""
        return self._values(data if root == self._bootstrap.rank else None)[root]

    def barrier(self) -> None:
        """Return when all ranks have come here, or one has failed. Collective.

        It raises nothing: it is the last that FlashInfer does, and a workspace that is complete can be freed whole. To the
        control block of one whose creation raises there is no way.
        """
        self._round(None)

    def Split(self, color: int, key: int) -> Exchange:  # noqa: N802
        """Refused: what would split the group are kernels for NVLink multicast."""
        raise UnsupportedOperation(f"{self._what} wanted to split the group, which only multicast kernels need: use trtllm's")

    def agree(self, problem: str | None, value: Any = None) -> tuple[Any, ...]:
        """Vote on the step: None from a rank that could, else why it could not. Collective. Returns every rank's `value`.

        Raises:
            CommunicatorError: some rank could not; the text is equal on all ranks and names each with its reason.
            PeerError: a rank is missing.
        """
        said = self._round(value, problem)
        if isinstance(said, CommplaneError):
            raise copy.copy(said)  # what is kept here must not hold the frames, and their tensors, of whoever catches it
        return said

    def _values(self, value: Any) -> tuple[Any, ...]:
        said = self._round(value)
        if isinstance(said, CommplaneError):
            raise Ended(str(said))
        return said

    def _round(self, value: Any, problem: str | None = None) -> tuple[Any, ...] | CommplaneError:
        """What every rank brought, or how the step has ended."""
        if self._ended is not None:
            return self._ended
        try:
            said = self._bootstrap.all_gather({"value": _text(value), "problem": problem}, what=self._what)
        except CommplaneError as error:
            self._ended = copy.copy(error)
            return self._ended
        reasons: dict[str, list[int]] = {}
        for rank, s in zip(self._bootstrap.ranks, said, strict=True):
            if s["problem"] is not None:
                reasons.setdefault(s["problem"], []).append(rank)
        if reasons:
            text = "; ".join(
                f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}: {reason}"
                for reason, ranks in reasons.items()
            )
            self._ended = CommunicatorError(f"{self._what} failed and is undone on all ranks: {text}")
            return self._ended
        return tuple(_value(s["value"]) for s in said)


def _text(data: Any) -> str:
    return base64.b64encode(pickle.dumps(data)).decode()


def _value(text: str) -> Any:
    # From ranks of this job, which run the same code.
    return pickle.loads(base64.b64decode(text))
