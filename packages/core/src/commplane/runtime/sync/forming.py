"""How the ranks of a round come together: what they want is compared, then communicators of its own are formed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence

from commplane.agree import StoreBootstrap, joint_verdict, setback
from commplane.api import Facts, SyncSpec
from commplane.errors import CommplaneError, CommunicatorError, ConfigError, MismatchError
from commplane.notice import notice
from commplane.runtime.communicator import Communicator
from commplane.runtime.sync.paths import Alone, HostByHost, OneGroup, Path
from commplane.runtime.sync.roll_call import BEFORE_ROLL_CALL, RollCall
from commplane.runtime.sync.round import SyncRound
from commplane.runtime.sync.schema import Schema
from commplane.runtime.sync.segment import map_together
from commplane.runtime.sync.slots import Slots, segment_bytes
from commplane.select import difference

__all__ = ["chosen_specs", "form"]


def chosen_specs(registered: Mapping[str, SyncSpec], wanted: Sequence[str | SyncSpec] | None) -> list[SyncSpec]:
    """The specs that take part: all that are registered, or those wanted by name or given. Local.

    Raises:
        ConfigError: a name that no plugin registered.
    """
    if wanted is None:
        return list(registered.values())
    unknown = [s for s in wanted if not isinstance(s, SyncSpec) and s not in registered]
    if unknown:
        raise ConfigError(
            f"sync round: no plugin registered {', '.join(map(repr, unknown))}, found {', '.join(registered) or 'none'}: "
            f"install the plugin, or give the SyncSpec itself"
        )
    return [s if isinstance(s, SyncSpec) else registered[s] for s in wanted]


def form(
    name: str,
    ranks: Sequence[int],
    facts: Facts,
    bootstrap: StoreBootstrap,
    specs: Callable[[], Sequence[SyncSpec]],
    timeout: float,
    startup: float,
    communicator: Callable[[str, Sequence[int], float], Communicator],
    on_close: Callable[[SyncRound], None],
    *,
    slots: bool = True,
) -> SyncRound:
    """Compare, form, vote. Collective over `ranks`.

    Args:
        name: of the round.
        ranks: global ranks in group order.
        facts: of all ranks.
        bootstrap: control plane of the round.
        specs: gives the specs that take part; what it raises on this rank alone is told to the others.
        timeout: seconds that a round may take.
        startup: seconds that one wait may take until the round is made.
        communicator: forms one communicator: purpose, global ranks, seconds that one wait of it may take.
        on_close: called when the round is closed.
        slots: whether ranks that share a host may leave their rows in shared memory instead of sending them through the
            communicator; equal on all ranks.
    """
    who = f"[sync_{name} rank {bootstrap.rank}/{len(ranks)}]"
    try:
        if importlib.util.find_spec("numpy") is None:
            raise ConfigError(f"{who} sync round wants numpy, found none: pip install 'commplane[torch]'")
        if not timeout > 0:
            raise ConfigError(f"{who} timeout of a sync round: wanted seconds above 0, found {timeout!r}")
        schema = Schema(specs(), len(ranks))
    except Exception as error:
        bootstrap.fail(setback(error).text)
        raise
    wanted = bootstrap.all_gather({**schema.to_json(), "timeout": timeout}, what="sync round")
    text = difference("the arguments of sync round", dict(zip(ranks, wanted, strict=True)))
    if text is not None:
        raise MismatchError(f"{who} {text}")
    path = _path(name, ranks, bootstrap, facts, schema, timeout, startup, communicator, slots)
    return SyncRound(name, bootstrap.rank, ranks, schema, path, RollCall(bootstrap, who, timeout), timeout, on_close)


def _path(
    name: str,
    ranks: Sequence[int],
    bootstrap: StoreBootstrap,
    facts: Facts,
    schema: Schema,
    timeout: float,
    startup: float,
    communicator: Callable[[str, Sequence[int], float], Communicator],
    slots: bool,
) -> Path:
    if len(ranks) == 1:
        return Alone(schema.columns)
    hosts = facts.hosts(ranks)
    if len(hosts) in (1, len(ranks)):
        patience = BEFORE_ROLL_CALL * timeout
        whole = communicator(f"sync_{name}", ranks, patience)
        if not (slots and facts.same_host(ranks)):
            return OneGroup(schema.columns, whole)
        try:
            memory = map_together(bootstrap, "slots of sync round", segment_bytes(schema.columns, len(ranks)), 2 * startup)
        except BaseException:
            whole._close(wait=False)
            raise
        if isinstance(memory, str):
            if bootstrap.rank == 0:
                notice(f"[sync_{name}] sync round goes without slots in shared memory, which makes `issue` slower: {memory}")
            return OneGroup(schema.columns, whole)
        return Slots(schema.columns, bootstrap.rank, ranks, memory, patience, facts.dead, whole)
    return _host_by_host(name, ranks, hosts, bootstrap, schema, BEFORE_ROLL_CALL * timeout, startup, communicator)


def _host_by_host(
    name: str,
    ranks: Sequence[int],
    hosts: Sequence[Sequence[int]],
    bootstrap: StoreBootstrap,
    schema: Schema,
    timeout: float,
    startup: float,
    communicator: Callable[[str, Sequence[int], float], Communicator],
) -> HostByHost:
    """A communicator for each host with several ranks, and one over the first ranks; all are formed, or none stays."""
    me = ranks[bootstrap.rank]
    mine = next(host for host in hosts if me in host)
    firsts = [host[0] for host in hosts]
    formed: dict[str, Communicator] = {}
    problem: Exception | None = None
    try:
        if len(mine) > 1:
            formed["host"] = communicator(f"sync_{name}_host", mine, timeout)
        if me in firsts:
            formed["hosts"] = communicator(f"sync_{name}_hosts", firsts, timeout)
    except Exception as error:  # each rank has to come to the vote
        problem = error
    reasons: str | None = "the vote did not come to an end"
    try:
        reasons = joint_verdict(bootstrap, "sync round", None if problem is None else setback(problem), 2 * startup)
    finally:
        if reasons is not None:
            for c in formed.values():
                c._close(wait=False)
    if reasons is not None:
        if isinstance(problem, CommplaneError):
            raise problem
        raise CommunicatorError(f"[sync_{name} rank {bootstrap.rank}/{len(ranks)}] sync round could not be formed: {reasons}")
    at = {rank: i for i, rank in enumerate(ranks)}
    positions: list[list[int]] = [[at[rank] for rank in host] for host in hosts]
    return HostByHost(schema.columns, positions, formed.get("host"), formed.get("hosts"))
