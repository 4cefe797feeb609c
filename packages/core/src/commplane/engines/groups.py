"""Communicators for the groups of an engine: made, used, captured and closed where the engine does that with its own.

An engine's group is any object with ``unique_name``, ``ranks``, ``world_size`` and ``device``, made on all its ranks in one
order. What is called here is collective unless it says local.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from importlib_metadata import version

from commplane.api import Collective, ReduceOp
from commplane.config import Config
from commplane.engines.seams import Engine
from commplane.engines.vote import active, vote
from commplane.errors import ConfigError
from commplane.runtime import Communicator, Plane, init

__all__ = ["Groups", "Served"]

_ATTRIBUTE = "commplane_served"


class Served:
    """A communicator in the place of an engine's own all-reduce, for the sizes that one of our backends has.

    What the plan leaves to torch is the engine's: it has kernels and streams of its own for that. The plan and the bytes decide,
    which are equal on all ranks, so all ranks go the same way.
    """

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self._plan = communicator.plan
        self._on_cuda = communicator.device.partition(":")[0] == "cuda"
        self._ranges: dict[tuple[torch.dtype, bool], tuple[tuple[int, float], ...]] = {}

    def takes(self, tensor: torch.Tensor, capturing: bool) -> bool:
        """Whether the sum of `tensor` is ours. Local, equal on every rank."""
        if tensor.is_cuda is not self._on_cuda:
            return False
        if self._plan is not self.communicator.plan:  # it was tuned
            self._plan = self.communicator.plan
            self._ranges.clear()
        ranges = self._ranges.get((tensor.dtype, capturing))
        if ranges is None:
            ranges = self._ranges[tensor.dtype, capturing] = self.ranges(tensor.dtype, capturing)
        size = tensor.nbytes
        for low, high in ranges:  # noqa: SIM110  a generator would cost as much as all of the rest, at every sum
            if low <= size < high:
                return True
        return False

    def ranges(self, dtype: torch.dtype, capturing: bool) -> tuple[tuple[int, float], ...]:
        """``low <= bytes < high`` of what is ours. Local, equal on every rank."""
        name = str(dtype).removeprefix("torch.")
        routes = self.communicator.plan.find(Collective.ALL_REDUCE, ReduceOp.SUM, name, capturing=capturing)
        return tuple((r.low, float("inf") if r.high is None else r.high) for r in routes if r.backend != "torch")

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum as a new tensor of the strides that `torch.empty_like` has: what engines tell torch.compile. Collective."""
        out = self.communicator.all_reduce(tensor)
        return out if tensor.is_contiguous() else torch.empty_like(tensor).copy_(out)

    def prepare(self, tokens: int, hidden: int, dtype: torch.dtype) -> None:
        """Build workspaces for activations of `tokens` x `hidden`, as far as they are ours. Collective over the group."""
        max_bytes = tokens * hidden * dtype.itemsize
        ours = [high for capturing in (False, True) for _, high in self.ranges(dtype, capturing)]
        if ours:
            self.communicator.prepare("all_reduce", dtype=dtype, max_bytes=int(min(max_bytes, max(ours))))


class Groups:
    """All groups of an engine in this process, and the plane that their communicators live in.

    The plane lives as long as the group at which the ranks voted, which is the first one, or as torch's default group, whose
    store it is on. Which of an engine's groups are still in use is no measure: it may drop them without a word, and garbage
    is collected on each rank at another time.

    Args:
        engine: what the adapter knows of the engine.
        purposes: names of the groups that sum activations; the others stay the engine's alone.
        logger: where plans are told.

    Attributes:
        problem: why the adapter may not work in this process, in one sentence; set by the adapter before the first group.
    """

    def __init__(self, engine: Engine, purposes: frozenset[str], logger: logging.Logger) -> None:
        self.engine = engine
        self.problem: str | None = None
        self._purposes = purposes
        self._logger = logger
        self._plane: Plane | None = None
        self._first: weakref.ref[Any] | None = None
        self._world: weakref.ref[Any] | None = None
        self._served: dict[Served, weakref.ref[Any]] = {}
        self._depth = 0

    @property
    def plane(self) -> Plane | None:
        """The open plane; None before the first group, after its end, and where the adapter is not at work. Local."""
        return self._plane

    @property
    def served(self) -> tuple[Served, ...]:
        """What serves groups, in order of their creation. Local."""
        return tuple(self._served)

    @property
    def idle(self) -> bool:
        """Whether the adapter has no part in a job as far as this rank can tell without the others. Local."""
        return self._problem() is not None

    @property
    def capturing(self) -> bool:
        """Whether a capture is open. Local."""
        return self._depth > 0

    def attach(self, group: Any) -> Served | None:
        """Give `group`, which the engine has just made, a communicator where that is of use. Collective over its ranks.

        At the first group all ranks of the job vote, and meet in a plane; again in a new default group.

        Returns:
            What serves the group, on all its ranks; None where the engine's own does.

        Raises:
            PeerError: ranks have no adapter, or did not come; names them.
            AgreementError: the adapter may work on some ranks only.
            CommplaneError: as `commplane.init` and `Plane.communicator` raise.
        """
        if dist.get_world_size() == 1:
            return None
        world = dist.group.WORLD
        if self._world is None or self._world() is not world:
            self._leave()
            if self._vote():
                self._plane = init()
            self._world, self._first = weakref.ref(world), weakref.ref(group)
        if self._plane is None or group.world_size == 1 or group.device.type not in ("cpu", "cuda"):
            return None
        if group.unique_name.rpartition(":")[0] not in self._purposes:
            return None
        communicator = self._plane.communicator(group.unique_name, group.ranks, device=str(group.device))
        if communicator.rank == 0:
            self._logger.info("%s", communicator.plan)
        if communicator.plan.backends == ("torch",):  # nothing that the engine has not; equal on all ranks, because the plan is
            communicator.close()
            return None
        served = Served(communicator)
        self._served[served] = weakref.ref(group)
        setattr(group, _ATTRIBUTE, served)
        return served

    def _vote(self) -> bool:
        """Whether the adapter works in this job. Collective over all ranks."""
        settings = _settings()
        engine, rank = self.engine, dist.get_rank()
        who = f"[{engine.adapter} rank {rank}/{dist.get_world_size()}]"
        ballots = vote(
            dist.PrefixStore(engine.adapter, dist.distributed_c10d._get_default_store()),
            rank,
            dist.get_world_size(),
            {
                "adapter": f"{engine.adapter} {version(engine.adapter)}",
                "engine": f"{engine.name} {engine.version}",
                "problem": self._problem(),
            },
            settings.startup,
            who,
            f"install {engine.adapter} for every rank and start all alike, or {engine.leave_out}",
        )
        at_work = active(ballots, who, f"make the installations equal, or {engine.leave_out}")
        if not at_work and rank == 0:
            self._logger.warning("all ranks go on without %s: %s", engine.adapter, ballots[0]["problem"])
        return at_work

    def _problem(self) -> str | None:
        return self.problem or self._not_repeatable(_settings().numerics)

    def _not_repeatable(self, numerics: str) -> str | None:
        """Why sums of ours would not be what the user asked the engine for, if so. Local."""
        name = self.engine.repeatable
        if numerics == "rank_order" or os.environ.get(name, "").strip().lower() in ("", "0", "false", "no", "n", "off"):
            return None
        return (
            f"wanted numerics=rank_order, because {name} asks for the same bits in every batch, found numerics={numerics}: "
            "set COMMPLANE_NUMERICS=rank_order"
        )

    def all_reduce(self, group: Any, tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What sums `tensor` into a new one over `group`; None where that is the engine's. Local, equal on every rank."""
        served = self._for(group, tensor)
        if served is None:
            return None
        return served.communicator.all_reduce if tensor.is_contiguous() else served.all_reduce

    def all_reduce_(self, group: Any, tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """The same in place."""
        served = self._for(group, tensor)
        return None if served is None else served.communicator.all_reduce_

    def _for(self, group: Any, tensor: torch.Tensor) -> Served | None:
        served: Served | None = group.__dict__.get(_ATTRIBUTE)
        if served is None:
            return None
        # A trace has no sizes to go by, and a plan serves all of them.
        if torch.compiler.is_compiling():
            return served
        if not served.takes(tensor, self._depth > 0):
            return None
        # A graph that the engine captures past its groups is of no communicator of ours: nobody compares it, or registers in it.
        if self._depth == 0 and tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        return served

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Around the engine's capture of one group; it nests one group's in another's, and the outermost one counts."""
        if self._plane is None:
            yield
            return
        self._depth += 1
        try:
            if self._depth > 1:
                yield
            else:
                with self._plane.capture():
                    yield
        finally:
            self._depth -= 1

    def detach(self, group: Any) -> None:
        """Close what `attach` made, before the engine destroys the group; with the first group, the plane. Collective.

        A second call for the same group does nothing. Where another rank does not come, it closes all the same after the
        start-up deadline, with a warning.
        """
        served: Served | None = group.__dict__.pop(_ATTRIBUTE, None)
        if served is not None:
            del self._served[served]
            served.communicator.close()
        if self._first is not None and self._first() is group:
            self._leave()

    def _leave(self) -> None:
        """Close the plane and what is left in it; groups that are still there go on with the engine's own. Collective."""
        served, self._served = self._served, {}
        for of in served.values():
            group = of()
            if group is not None:
                group.__dict__.pop(_ATTRIBUTE, None)
        if self._plane is not None:
            self._plane.close()  # before it is forgotten: inside of a capture it raises, and stays open
        self._plane = self._first = self._world = None


def _settings() -> Config:
    try:
        return Config.load()
    except ConfigError:  # perhaps on this rank only: `init` tells it to all
        return Config()
