"""The plane: plugins, facts and communicators of one process in one job."""

from __future__ import annotations

import operator
import os
import warnings
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from commplane.agree import (
    Activity,
    BoundedStore,
    CaptureGuard,
    Forming,
    PeerFailed,
    StoreBootstrap,
    abort_backend,
    close_backend,
    exchange_facts,
    setback,
)
from commplane.api import CommBackend, GroupKey, ParallelLayout, SyncSpec
from commplane.config import Config
from commplane.errors import (
    AgreementError,
    CommplaneError,
    CommunicatorError,
    ConfigError,
)
from commplane.flight import signals
from commplane.notice import notice
from commplane.plugins import PluginHost
from commplane.runtime.capture import capture_all
from commplane.runtime.communicator import Communicator
from commplane.runtime.formation import Formation
from commplane.runtime.rendezvous import World, find_world
from commplane.runtime.startup import compare, recorder
from commplane.runtime.sync import SyncRound
from commplane.runtime.traced import teach
from commplane.runtime.tuning import named

__all__ = ["Plane", "init"]


def init(
    *,
    store: Any = None,
    rank: int | None = None,
    world_size: int | None = None,
    config: Mapping[str, Any] | None = None,
    plugins: PluginHost | None = None,
) -> Plane:
    """Meet the other ranks, load the plugins, compare, and learn the facts. Collective over all ranks of the job.

    Args:
        store: a c10d store that all ranks share, with `rank` and `world_size`. If unset, an initialised default group of
            torch.distributed, else torchrun's environment.
        rank: this process's global rank.
        world_size: number of ranks in the job.
        config: settings that win over the environment and the file; see `commplane.config.Config`.
        plugins: the plugins to use instead of those installed; for tests.

    Raises:
        ConfigError: a setting is wrong, or no rendezvous is found.
        PluginError: a plugin asked for by name cannot be used.
        AgreementError: ranks differ in plugin versions or settings; the same error on all of them.
        PeerError: ranks are missing at the deadline.
    """
    problem: ConfigError | None = None
    try:
        settings = Config.load(config)
    except ConfigError as error:  # perhaps on this rank only: the others are told when we meet
        problem, settings = error, Config()
    try:
        world = find_world(store, rank, world_size, settings.startup)
    except ConfigError as error:
        raise problem or error from None
    return Plane(world, settings, plugins, problem)


class Plane:
    """All communicators of this process. Made by `init`; a context manager that closes.

    Attributes:
        rank: global rank.
        world_size: number of ranks in the job.
        config: the resolved settings.
        facts: what is known of every rank; equal on all of them.
        plugins: the loaded plugins.
    """

    def __init__(
        self, world: World, config: Config, plugins: PluginHost | None = None, problem: ConfigError | None = None
    ) -> None:
        self.rank = world.rank
        self.world_size = world.world_size
        self.origin = world.origin
        self._guard = CaptureGuard()
        self._store = BoundedStore(world.store, config.startup, world.clock)
        # A store outlives a plane, and its keys with it: each plane of a job has a number, and keys of its own.
        self._generation = self._store.add(f"generation/{world.rank}", 1)
        self._activity = Activity(self._store, world.rank, f"plane/{self._generation}/activity")
        self._communicators: list[Communicator] = []
        self._rounds: list[SyncRound] = []
        self._instances: Counter[str] = Counter()
        self._closed = False
        self._faulted = False
        self._world = StoreBootstrap(
            self._store,
            range(world.world_size),
            world.rank,
            prefix=f"plane/{self._generation}/world",
            timeout=config.startup,
            who=f"[world rank {world.rank}/{world.world_size}]",
            guard=self._guard,
            activity=self._activity,
            conflict=self._other_generation,
            dead=self._dead,
        )
        self._activity.say("starts up")
        try:
            if problem is not None:
                raise problem
            if plugins is None:
                plugins = PluginHost.discover(config)
            else:
                plugins.configure(config.with_options(plugins.options()))
            self.plugins, self.config = plugins, plugins.config
            self.plugins.require(n for n in self.config.backends)
            self._tuning = named(self.config.tuning)
        except Exception as error:
            # A failure here is this rank's alone; the others are on their way to the first round and are told there.
            self._world.fail(setback(error).text)
            raise
        try:
            job = compare(self._world, self.plugins, self.config, self._tuning)
        except PeerFailed as failed:
            raise AgreementError(f"{failed}; this rank has no such problem: make the installations equal") from failed
        self.facts = exchange_facts(self._world, self.config.host_alias)
        self._activity.say("is up")
        self._flight = recorder(job, self.rank, self.facts, self.plugins, self.config)
        if self.config.flight_records:
            signals.attach(self._flight)
        _planes.add(self)

    def _other_generation(self, missing: Sequence[int]) -> str | None:
        """Why `missing` will not come to the first round: they are in another plane on the same store. Local."""
        for r in missing:
            theirs = self._store.add(f"generation/{r}", 0)
            if theirs > self._generation or (theirs and theirs < self._generation and not self._activity.read(r)):
                return (
                    f"rank {self.rank} calls init for the {self._generation}. time on this store, rank {r} has called it "
                    f"{theirs} times: start all ranks together, or give each start a store of its own"
                )
        return None

    def _dead(self, ranks: Sequence[int]) -> Sequence[int]:
        facts = getattr(self, "facts", None)
        return () if facts is None else facts.dead(ranks)

    @property
    def communicators(self) -> tuple[Communicator, ...]:
        """The open communicators of this rank, in order of creation."""
        return tuple(self._communicators)

    def communicator(
        self,
        name: str,
        ranks: Sequence[int] | None = None,
        *,
        device: str | None = None,
        backends: Sequence[str] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        timeout: float | None = None,
    ) -> Communicator:
        """Agree, build, prove and commit one communicator. Collective over `ranks`; other ranks do not take part.

        Ranks that share several groups create them in the same order.

        Args:
            name: the purpose, such as ``"tp"``; part of the group's identity.
            ranks: global ranks in group order, the same on every one of them. If unset, all ranks.
            device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``. If unset, the setting ``device``.
            backends: names in the order of preference, instead of the setting ``backends``. ``torch`` is always last.
            options: backends' own settings by name that differ for this communicator, such as
                ``{"torch_symm": {"algorithm": "one_shot"}}``; the same on every rank.
            timeout: seconds that a collective may wait for its peers, the same on every rank. If unset, the setting
                ``run_timeout``.

        Raises:
            AgreementError: the ranks asked for different things, shown in the text.
            ConfigError: an option that no backend has, or of another type.
            PluginError: a backend asked for by name is not installed or broken.
            SelectionError: no backend is left; the reason of each is in the text.
            PeerError: ranks are missing at the deadline.
        """
        self._guard.check(f"communicator {name!r}")
        self._open("communicator")
        members = tuple(range(self.world_size)) if ranks is None else tuple(operator.index(r) for r in ranks)
        self._check_members(name, members)
        where = _device(device or self.config.device)
        key = GroupKey(members, where.partition(":")[0], name)
        if any(c.key == key for c in self._communicators):
            raise CommunicatorError(f"[{name}] communicator {key} is open already: close it first, or give the new one a name")
        named = self.config.backends if backends is None else backends
        wanted = [n.strip() for n in named.split(",") if n.strip()] if isinstance(named, str) else list(named)
        instance, bootstrap = self._meeting(key)
        built: dict[str, CommBackend] = {}
        try:
            with self._activity.forming(Forming(key, instance, bootstrap.first_decision)):
                try:
                    self.plugins.require(wanted)
                    plan, built, attempts = self._formation(key, where, wanted, bootstrap, options or {}, timeout).run()
                except Exception as error:
                    # If it happened on this rank alone, the others are told in the round that they wait in.
                    bootstrap.fail(setback(error).text)
                    raise
            teach()
            out = Communicator(
                key,
                bootstrap.rank,
                where,
                plan,
                built,
                bootstrap,
                attempts,
                self.plugins,
                self.config.startup,
                self._flight.group(key, instance, bootstrap.rank, plan.digest, built),
                on_fault=self._note_fault,
                on_close=self._communicators.remove,
            )
            self._communicators.append(out)
        except BaseException:  # the store was lost, or this rank interrupted, after the group had been formed
            for backend_name, backend in built.items():
                abort_backend(backend_name, [backend])
                close_backend(backend_name, backend, where)
            raise
        self.plugins.notify("commplane_plan_committed", communicator=out)
        return out

    def groups(
        self, layout: ParallelLayout, families: Sequence[str] | None = None, *, prefix: str = "", **options: Any
    ) -> dict[str, Communicator]:
        """The communicators of this rank's groups in a layout, by family. Collective over all ranks, which all ask for the same.

        Each family has communicators of its own, named after it, also where two have the same ranks: what one keeps for its
        calls is never mixed with another's. All are made in the layout's one order, so no rank waits in vain.

        Args:
            layout: the sizes; equal on all ranks.
            families: of `ParallelLayout.families`, in any order. If unset, those whose groups have more than one rank.
            prefix: put before the name of a family to name its communicator.
            options: as for `communicator`.

        Raises:
            MismatchError: the ranks asked for different groups, shown in the text.
            ConfigError: the layout is of another number of ranks, or has no such family.
            CommplaneError: as `communicator` raises; what was made before is closed.
        """
        from commplane.runtime.families import form_families

        self._open("groups")
        return form_families(
            layout,
            self.rank,
            self.world_size,
            families,
            prefix,
            lambda wanted: self.gather(wanted, what="groups of a layout"),
            lambda name, ranks: self.communicator(name, ranks, **options),
        )

    def _meeting(self, key: GroupKey) -> tuple[int, StoreBootstrap]:
        """The how many-th communicator with this key is formed, and the control plane that its ranks meet on. Local."""
        self._instances[str(key)] += 1
        instance = self._instances[str(key)]
        return instance, StoreBootstrap(
            self._store,
            key.ranks,
            self.rank,
            prefix=f"plane/{self._generation}/group/{key.digest}/{instance}",
            timeout=self.config.startup,
            who=f"[{key.purpose} rank {key.ranks.index(self.rank)}/{len(key.ranks)}]",
            guard=self._guard,
            activity=self._activity,
            conflict=lambda missing: self._activity.conflict(key, missing, self._instances.__getitem__),
            dead=self._dead,
        )

    def _formation(
        self,
        key: GroupKey,
        device: str,
        wanted: Sequence[str],
        bootstrap: StoreBootstrap,
        options: Mapping[str, Mapping[str, Any]],
        timeout: float | None = None,
    ) -> Formation:
        """One attempt to form a communicator. Local."""
        who = f"[{key.purpose} rank {bootstrap.rank}/{len(key.ranks)}]"
        config = self.config.changed(options)
        request: dict[str, Any] = {"backends": list(wanted)}
        if options:
            request["options"] = {b: {o: config.options[b][o] for o in given} for b, given in sorted(options.items())}
        if timeout is not None:
            if not timeout > 0:
                raise ConfigError(f"{who} timeout: wanted seconds above 0, found {timeout!r}")
            request["timeout"] = timeout
            config = replace(config, run_timeout=timeout)
        return Formation(self.plugins, config, self.facts, key, device, request, bootstrap, who, self._tuning)

    def agree(self, name: str) -> tuple[str, ...]:
        """What a communicator of that name over all ranks would be built of, in order, without building it. Collective.

        The ranks probe, publish and decide as `communicator` does first; `commplane bench --startup` measures it.
        """
        self._open("agree")
        key = GroupKey(tuple(range(self.world_size)), _device(self.config.device).partition(":")[0], name)
        _, bootstrap = self._meeting(key)
        return self._formation(key, key.device, self.config.backends, bootstrap, {}).agree().order

    def sync_round(
        self,
        name: str,
        ranks: Sequence[int] | None = None,
        *,
        specs: Sequence[str | SyncSpec] | None = None,
        backends: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> SyncRound:
        """A round of votes over `ranks`. Collective over `ranks`, in the same order among communicators on all of them.

        It has communicators of its own, so its steps never mix with other traffic: one over all ranks where they share a host
        or each has a host of its own, else one a host and one over the first ranks of the hosts.

        Args:
            name: the purpose, such as ``"cache"``.
            ranks: global ranks in group order, the same on every one of them. If unset, all ranks.
            specs: whose fields take part: names of what plugins registered with `commplane_register_cache_sync`, or a `SyncSpec`
                itself. If unset, all that are registered.
            backends: as for `communicator`. Where they are named, rows go through them inside a host, too.
            timeout: seconds in which a round ends, or raises who is missing. If unset, the setting ``run_timeout``.

        Raises:
            MismatchError: the ranks have different fields or timeouts.
            ConfigError: a spec is not registered, or two have one name; other ranks raise an `AgreementError` with its text.
            CommunicatorError, AgreementError, PeerError: as `communicator` raises.
        """
        from commplane.runtime.sync.forming import chosen_specs, form

        self._guard.check(f"sync_round {name!r}")
        self._open("sync_round")
        members = tuple(range(self.world_size)) if ranks is None else tuple(operator.index(r) for r in ranks)
        self._check_members(f"sync_{name}", members)
        instance, bootstrap = self._meeting(GroupKey(members, "cpu", f"sync_{name}_round"))
        self._activity.say(f"makes sync round {name!r} over {list(members)}")
        registered = {n: r.spec for n, r in self.plugins.registered(SyncSpec).items() if isinstance(r.spec, SyncSpec)}
        out = form(
            name,
            members,
            self.facts,
            bootstrap,
            lambda: chosen_specs(registered, specs),
            self.config.run if timeout is None else float(timeout),
            self.config.startup,
            lambda purpose, over, seconds: self.communicator(purpose, over, device="cpu", backends=backends, timeout=seconds),
            self._rounds.remove,
            slots=backends is None,
        )
        self._flight.round(instance, out.notes)
        self._rounds.append(out)
        return out

    def sync_bootstrap(self, value: Any) -> Any:
        """One JSON value, such as a bound port, made equal on all ranks by the first plugin that knows how. Collective.

        Core's own rule, used where no plugin has another, is rank 0's value. Slow: over the control plane.
        """
        self._open("sync_bootstrap")
        return self.plugins.sync_bootstrap(self._world, value)

    def gather(self, value: Any, *, what: str, timeout: float | None = None) -> list[Any]:
        """Every rank's JSON value, by global rank, over the control plane. Collective over all ranks; slow.

        Args:
            value: what this rank contributes.
            what: name of the step, the same on every rank; shown in errors.
            timeout: seconds to wait for the others; if unset, the setting for start-up.
        """
        self._open("gather")
        return self._world.all_gather(value, what=what, timeout=timeout)

    def dump_flight_records(self, reason: str) -> Path:
        """Write the last calls of every communicator of this rank to a file, for `commplane trace`: the file. Local.

        The same is done by itself when a communicator is poisoned, when the plane or a communicator is left through an
        exception, and on SIGUSR1. A rank has one file, which each dump replaces.

        Raises:
            CommplaneError: the file could not be written.
        """
        self._open("dump_flight_records")
        try:
            return self._flight.dump(reason)
        except OSError as error:
            raise CommplaneError(
                f"flight records could not be written: {error}; COMMPLANE_FLIGHT_DIR names the folder"
            ) from error

    def _note_fault(self) -> None:
        self._faulted = True

    def _check_members(self, name: str, members: tuple[int, ...]) -> None:
        if len(set(members)) != len(members) or not members:
            raise ConfigError(f"communicator {name!r}: wanted each rank once, found {list(members)}")
        if not all(0 <= r < self.world_size for r in members):
            raise ConfigError(f"communicator {name!r}: wanted ranks below {self.world_size}, found {list(members)}")
        if self.rank not in members:
            raise ConfigError(f"communicator {name!r} over {list(members)}: rank {self.rank} is not in it and must not create it")

    def capture(self) -> AbstractContextManager[None]:
        """Capture collectives of every open communicator. Collective over the ranks of each that captures.

        Control-plane calls inside raise `CaptureError`. Afterwards each communicator agrees that all ranks captured the same
        operations: same count, order and sizes. If the body failed on some rank, that rank raises its own exception and all
        others a `CaptureError` that carries it. Communicators with nothing to capture pass through, and so do sync rounds.
        """
        self._open("capture")
        apart = {id(c) for r in self._rounds for c in r.communicators}
        return capture_all(self._guard, [c for c in self._communicators if id(c) not in apart])

    def _open(self, what: str) -> None:
        if self._closed:
            raise CommplaneError(f"{what} on a plane that is closed: call commplane.init again")

    def close(self) -> None:
        """Close every sync round and communicator, in order of creation, and leave. Collective over all ranks, idempotent.

        After a fault of any communicator it waits for nobody: who is lost will not come, and the others leave too.
        """
        self._close(wait=not self._faulted)

    def _close(self, *, wait: bool) -> None:
        if self._closed:
            return
        self._guard.check("close")
        for r in tuple(self._rounds):
            r._close(wait=wait)
        for c in self.communicators:
            c._close(wait=wait)
        self._closed = True
        signals.detach(self._flight)
        try:
            if wait:
                self._activity.say("closes its plane")
                self._world.farewell(self.config.startup)
            else:
                self._activity.say("left after an error", gone=True)
        except CommplaneError as error:
            notice(f"plane closed without all ranks: {error}", stacklevel=3)

    def __enter__(self) -> Plane:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if error is not None and not self._closed and not isinstance(error, (SystemExit, GeneratorExit)):
            for c in self.communicators:  # before anything that takes time: peers may be waiting for this rank
                c.abort()
            if self._communicators:
                self._flight.dump_once(error, f"the plane is left after {type(error).__name__}: {error}")
        self._close(wait=kind is None and not self._faulted)

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and getattr(self, "facts", None) is not None:
            warnings.warn("a commplane Plane was never closed", ResourceWarning, stacklevel=2, source=self)


_planes: weakref.WeakSet[Plane] = weakref.WeakSet()


def _after_fork() -> None:
    """A forked child shares the parent's mappings and sockets: it must not use them, nor close them as if it were the rank."""
    for plane in list(_planes):
        plane._closed = True
        for c in plane.communicators:
            c.disown()
        for r in plane._rounds:
            r.disown()


os.register_at_fork(after_in_child=_after_fork)


def _device(name: str) -> str:
    """Resolve ``auto`` and a CUDA device without a number. Local."""
    if name not in ("auto", "cuda"):
        return name
    import torch

    if name == "auto" and not torch.cuda.is_available():
        return "cpu"
    local = os.environ.get("LOCAL_RANK")
    if local is None:
        return f"cuda:{torch.cuda.current_device()}"
    # A launcher may show each rank one GPU only, and several ranks may share one.
    return f"cuda:{int(local) % max(1, torch.cuda.device_count())}"
