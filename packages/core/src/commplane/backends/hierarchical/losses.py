"""An error of an inner group as one of the whole group: it knows its own ranks, and who is gone may be on another host."""

from __future__ import annotations

from collections.abc import Sequence

from commplane.api import BuildContext
from commplane.backends.hierarchical.shape import Shape
from commplane.errors import PeerError

__all__ = ["BetweenHosts", "explain"]


class BetweenHosts(PeerError):
    """The inner group between the hosts lost a peer. Never leaves this package."""


def explain(context: BuildContext, shape: Shape, error: PeerError, patience: float, waited: float) -> PeerError:
    """What to raise for `error` of an inner group. Asks the other ranks of the group that failed as well.

    Args:
        context: of the backend.
        shape: of the group.
        error: of the inner group inside this host, or `BetweenHosts`.
        patience: seconds that another rank has to say that it failed, too.
        waited: seconds that the call had taken when it failed.
    """
    assert context.inner is not None
    ended = context.facts.dead(shape.mine)  # before anybody leaves because of this
    suspects = _suspects(shape, error)
    missing = context.inner.find_missing(suspects, patience)
    if missing is None:  # the store does not answer
        missing = _alone(context, shape, error, ended, waited)
        how = "the control plane does not answer, so who is gone was taken from what this rank saw"
    else:
        how = f"asked over the control plane for up to {patience:g} s" if missing else "each rank that was suspected answered"
    lost = f"lost {_names(missing)} ({context.facts.describe_hosts(missing)})" if missing else "lost no rank that could be named"
    return PeerError(f"{context.who} all_reduce: {lost}; {how}: {error}", missing)


def _suspects(shape: Shape, error: PeerError) -> list[list[int]]:
    """Inside, those that the error names, or each where it cannot tell. Between, hosts: who is gone there may be another rank."""
    if not isinstance(error, BetweenHosts):
        return [[r] for r in error.missing_ranks or shape.mine if r != shape.rank]
    blamed = error.missing_ranks or shape.across
    return [list(shape.host_of(r)) for r in blamed if r != shape.rank]


def _alone(context: BuildContext, shape: Shape, error: PeerError, ended: tuple[int, ...], waited: float) -> tuple[int, ...]:
    """The same without the others."""
    others = [host for host in shape.hosts if shape.rank not in host]
    if not isinstance(error, BetweenHosts):
        if ended:
            return ended
        if waited >= 0.9 * context.timeout:
            return error.missing_ranks
    # A rank of this host gave up, and is alive: it had met another host. With them went the store, which one of them has.
    store = [host for host in others if 0 in host]
    return tuple(r for host in (others if len(others) == 1 else store) for r in host)


def _names(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
