"""Build the agreed backends: open with a deadline, vote, canary, vote. A rank never falls back alone."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

from commplane.agree.bootstrap import PeerFailed, StoreBootstrap
from commplane.agree.bounded import Abandoned, Stalled, call_bounded
from commplane.agree.device import on_device, on_device_if_possible
from commplane.api import BackendSpec, BuildContext, Capability, CommBackend, QuantFormat
from commplane.errors import AgreementError, CommplaneError, PeerError
from commplane.notice import notice
from commplane.select import Candidate, Offer, ask, disagreement

__all__ = ["Attempt", "Setback", "build_backend", "close_backend", "joint_verdict", "setback"]


@dataclass(frozen=True)
class Setback:
    """Why a step failed on this rank. `derived` if it only failed because another rank did."""

    text: str
    derived: bool = False


def setback(error: BaseException) -> Setback:
    """An exception as one line for a message on other ranks."""
    if isinstance(error, (CommplaneError, Abandoned)):
        return Setback(str(error), isinstance(error, (PeerFailed, PeerError)))
    return Setback(" ".join("".join(traceback.format_exception_only(type(error), error)).split()))


def joint_verdict(
    bootstrap: StoreBootstrap,
    what: str,
    problem: Setback | None,
    timeout: float,
    digest: str = "",
) -> str | None:
    """Vote: None if every rank succeeded, else the reasons in one text that is equal on every rank. Collective.

    Ranks that failed only because another did are left out of the text where the cause is known. Where all succeeded,
    their `digest` is compared.

    Raises:
        AgreementError: the digests differ.
        PeerError: a rank did not vote.
    """
    vote = {"problem": problem and problem.text, "derived": problem is not None and problem.derived, "digest": digest}
    ranks = bootstrap.ranks
    votes = bootstrap.gather(vote, what=f"vote on {what}", timeout=timeout).groups
    places = sorted((i, number) for number, (v, at) in enumerate(votes) if v["problem"] is not None for i in at)
    failed = [(ranks[i], votes[number][0]) for i, number in places]
    causes = [(rank, v["problem"]) for rank, v in failed if not v["derived"]]
    reasons: dict[str, list[int]] = {}
    for rank, reason in causes or [(rank, v["problem"]) for rank, v in failed]:
        reasons.setdefault(reason, []).append(rank)
    if reasons:
        return "; ".join(
            f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}: {reason}"
            for reason, ranks in reasons.items()
        )
    text = disagreement(f"the plan before {what}", [(v["digest"], [ranks[i] for i in at]) for v, at in votes])
    if text is not None:
        raise AgreementError(
            f"{text}; does a commplane_select_backend hook, or CommBackend.formats, answer differently on some rank?"
        )
    return None


@dataclass
class Attempt:
    """How building one backend ended. `backend` is None unless `candidate` is ready; `offers` are of this rank.

    `spec` is what the open backend serves of what was declared.
    """

    candidate: Candidate
    backend: CommBackend | None
    spec: BackendSpec
    offers: tuple[Offer, ...] = ()


def build_backend(
    spec: BackendSpec,
    dist: str,
    make: Callable[[], CommBackend],
    context: BuildContext,
    attempt: StoreBootstrap,
    votes: StoreBootstrap,
    digest: str,
    check: Callable[[BackendSpec, CommBackend, BuildContext], None],
) -> Attempt:
    """Open `spec` on all ranks or on none. Collective.

    Args:
        spec: what to build.
        dist: where it came from, for the plan.
        make: constructs the backend object. Local.
        context: what it is opened with.
        attempt: the context's control plane, of this attempt alone.
        votes: control plane of the communicator.
        digest: of the decisions so far, compared with the other ranks'.
        check: the canary. Collective.
    """
    seconds = context.deadline.seconds
    # Every rank of a large group that waits wakes up for each look.
    look_every = max(0.05, 0.0005 * context.world_size)
    holder: list[CommBackend] = []
    offers: list[Offer] = []
    served = [spec]

    def release() -> None:
        for backend in holder:
            close_backend(spec.name, backend, context.device)

    def open_it() -> None:
        with on_device(context.device):
            backend = make()
            holder.append(backend)
            backend.open(context)
            served[0] = _served(spec, backend)
            offers.extend(ask(served[0], backend))

    def prove_it() -> None:
        with on_device(context.device):
            check(served[0], holder[0], context)

    for state, step in (("build", open_it), ("canary", prove_it)):
        problem: Setback | None = None
        running = False
        try:
            call_bounded(
                step,
                seconds,
                f"{spec.name} {state}",
                on_late=release,
                give_up=attempt.peer_failed,
                look_every=look_every,
                clock=votes.clock,
            )
        except BaseException as error:  # whatever a plugin raises becomes a vote
            running = isinstance(error, Abandoned) or not isinstance(error, Exception)
            problem = setback(error.__cause__ if isinstance(error, Abandoned) and error.__cause__ else error)
            # A cause ends the attempt of the other ranks at once. Who only waited in vain leaves the word to the rank that
            # was waited for: its own deadline is as near.
            if not problem.derived and not isinstance(error, Stalled):
                attempt.fail(problem.text)
            abort_backend(spec.name, holder)
            if not isinstance(error, Exception):  # Ctrl-C; the thread, if it still runs, releases what it built
                raise
        try:
            # A step is bounded by `seconds` on each rank, so a rank may come to the vote that much later than another.
            # Ranks whose formats differ would not run the same canary.
            so_far = digest if served[0] is spec else f"{digest}, {spec.name} serves {sorted(map(str, served[0].formats))}"
            reasons = joint_verdict(votes, f"{state} of {spec.name}", problem, 2 * seconds + 1, so_far)
        except BaseException:
            if not running:
                release()
            raise
        if reasons is not None:
            if not running:  # otherwise the thread that is still inside releases it when it comes back
                release()
            return Attempt(Candidate(spec.name, dist, state, reasons), None, spec)
    return Attempt(Candidate(spec.name, dist, "ready"), holder[0], served[0], tuple(offers))


def _served(spec: BackendSpec, backend: CommBackend) -> BackendSpec:
    """`spec` with those formats alone that the open backend has on its device. Local."""
    quant = Capability.ALL_REDUCE_RMS_NORM_QUANT
    answer = backend.formats() if quant in spec.capabilities else None
    if answer is None:
        return spec
    formats = {QuantFormat(f) for f in answer}
    strange = formats - set(spec.formats)
    if strange:
        raise ValueError(f"{spec.name}: formats() must be among those of the spec, found {', '.join(sorted(map(str, strange)))}")
    return replace(spec, formats=formats, capabilities=set(spec.capabilities) - (set() if formats else {quant}))


def abort_backend(name: str, holder: list[CommBackend]) -> None:
    """Make peers that wait for us stop. Local; a half-built backend that cannot is warned of, its peers have a deadline."""
    for backend in holder:
        try:
            backend.abort()
        except Exception as error:
            notice(f"abort of backend {name!r} raised {error!r}")


def close_backend(name: str, backend: CommBackend, device: str) -> None:
    """Close; what a plugin raises here is a warning, because the caller is already leaving. Local."""
    try:
        with on_device_if_possible(device):
            backend.close()
    except Exception as error:
        notice(f"close of backend {name!r} raised {error!r}")
