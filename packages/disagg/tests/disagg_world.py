"""Replicas of prefill and decode on a simulated network, requests between them, and what must hold whatever goes wrong."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from disagg_network import Network, SimChannel, SimEngine
from disagg_sides import layout_of

from commplane.testing import SimulatedRounds
from commplane_disagg.ends import Address, DecodeEnd, PrefillEnd, PrefillReplica, Report
from commplane_disagg.ends.card import encode_card
from commplane_disagg.ranks import Grid, Kv, holding
from commplane_disagg.rooms import CAPACITY, ROOMS, Key, Status

ROW = struct.Struct("<qqqq")
KV = Kv(layers=2, heads=2)
PAGES = 40


class SimPrefill(PrefillEnd):
    network: Network

    def _make_channel(self, listener: Any) -> Any:
        listener.close()
        return SimChannel(self.network, self.name, encode_card(self.card))


class SimDecode(DecodeEnd):
    network: Network

    def _make_channel(self, listener: Any) -> Any:
        return SimChannel(self.network, self.name, encode_card(self.card))


@dataclass
class Request:
    """One request as its router knows it."""

    room: int
    generation: int
    source: Replica
    target: Replica
    pages: int
    here: list[int] = field(default_factory=list)
    there: list[int] = field(default_factory=list)
    ends: dict[str, bool] = field(default_factory=dict)


class Replica:
    """All ranks of one side. They step together, as a sync round makes them; each has its own list of what to call next."""

    def __init__(self, world: World, name: str, kind: type[SimPrefill] | type[SimDecode], grid: Grid) -> None:
        self.world, self.name, self.kind, self.grid = world, name, kind, grid
        self.hasty = 0.0  # how often all rooms are given up while a round is out
        self.start()

    def start(self) -> None:
        network = self.world.network
        self.rounds = SimulatedRounds(self.grid.size, [ROOMS])
        self.ends: list[Any] = []
        self.pools: list[memoryview] = []
        for rank in range(self.grid.size):
            end = self.kind(
                name=f"{self.name}/{rank}",
                kv=KV,
                grid=self.grid,
                rank=rank,
                layout=layout_of(KV, self.grid, rank, pages=PAGES, tokens=1, row=ROW.size),
                engine=SimEngine(network, quiet=self.world.quiet, faults=self.world.faults),
                engine_name="sim",
                capabilities=("quiet",) if self.world.quiet else (),
                token=None,
                timeout=15.0,
                drain_timeout=3.0,
                lost_after=2.0,
                clock=network.clock,
                has_ended=network.has_ended,
            )
            end.network = network
            end.table._slots = [None] * self.world.places
            self.pools.append(end.open())
            end.engine.instance = end.identity.instance
            network.engines[end.identity.instance] = end.engine
            self.ends.append(end)
        self.free = set(range(PAGES))
        self.paused = 0
        self.calls: list[deque[Callable[[], None]]] = [deque() for _ in self.ends]
        self.live: dict[Key, Request] = {}
        self.kept_away: dict[Key, tuple[int, ...]] = {}

    def call(self, rank: int, what: Callable[[], None]) -> None:
        """Have a rank do something, after what it has to do already."""
        self.calls[rank].append(what)

    def step(self) -> None:
        random = self.world.network.random
        for queue in self.calls:
            while queue and random.random() < 0.7:
                queue.popleft()()
        for end, votes in zip(self.ends, self.rounds, strict=True):
            votes.issue(end.votes(), digest=end.table.digest)
            if self.hasty and random.random() < self.hasty:  # the engine's own thread gives a room up while the round is out
                for room in list(end.table.rooms.values()):
                    end.abort(room.key.room, generation=room.key.generation, why="nobody waits for it")
        reports = [end.settle(votes.result()) for end, votes in zip(self.ends, self.rounds, strict=True)]
        self.world.alike(self, reports)
        self.world.take(self, reports)

    def source(self) -> PrefillReplica:
        return PrefillReplica(self.grid, {r: Address(end.name, "sim", 1) for r, end in enumerate(self.ends)})


class World:
    """Everything, and what is checked: see `alike`, `take`, `landing` and `settle_down`."""

    def __init__(
        self,
        seed: int,
        prefill: list[Grid],
        decode: list[Grid],
        *,
        quiet: bool = True,
        faults: float = 0.02,
        places: int = CAPACITY,
    ) -> None:
        self.network = Network(seed)
        self.network.landed = self.landing
        self.random = self.network.random
        self.quiet, self.faults, self.places = quiet, faults, places
        self.prefill = [Replica(self, f"p{i}", SimPrefill, grid) for i, grid in enumerate(prefill)]
        self.decode = [Replica(self, f"d{i}", SimDecode, grid) for i, grid in enumerate(decode)]
        self.generations: dict[int, int] = {}
        self.requests: list[Request] = []
        self.counts = dict.fromkeys(("success", "failed", "quarantined", "landed", "killed", "paused", "broken", "aborted"), 0)

    def landing(self, engine: SimEngine, offset: int, data: bytes) -> None:
        """No byte may land in a page that is not of the room that the bytes are of."""
        self.counts["landed"] += 1
        end = next(e for r in self.decode for e in r.ends if e.identity.instance == engine.instance)
        for start in range(0, len(data), ROW.size):
            room, generation, *_ = ROW.unpack_from(data, start)
            place = (offset + start) // end.card.layout.page_bytes
            holders = end.ledger.holders(place)
            assert holders == (Key(room, generation),), (
                f"bytes of room {room} generation {generation} land in page {place} of {end.name}, which is of {holders}"
            )

    def alike(self, replica: Replica, reports: list[Report]) -> None:
        """All ranks of a replica see the same, in the same step."""
        seen = [
            (
                [(r.room, r.generation, r.ok, type(r.error)) for r in report.results],
                [(r.room, r.generation) for r in report.released],
                [(r.room, r.generation) for r in report.quarantined],
                {key: end.table.rooms[key].status for key in sorted(end.table.rooms) if end.table.rooms[key].status > Status.NEW},
            )
            for report, end in zip(reports, replica.ends, strict=True)
        ]
        assert all(s[:3] == seen[0][:3] for s in seen), seen
        common = set.intersection(*(set(s[3]) for s in seen))
        assert all(s[3][key] == seen[0][3][key] for s in seen for key in common), seen

    def take(self, replica: Replica, reports: list[Report]) -> None:
        """What an engine does with a report. Contents of a room that succeeded are checked at once, on every rank."""
        for result in reports[0].results:
            request = replica.live[Key(result.room, result.generation)]
            assert replica.name not in request.ends, "a room ended twice"
            request.ends[replica.name] = result.ok
            self.counts["success" if result.ok else "failed"] += 1
            if result.ok and replica is request.target:
                self.whole(request)
        for kept in reports[0].quarantined:
            self.counts["quarantined"] += 1
            request = replica.live[Key(kept.room, kept.generation)]
            pages = request.here if replica is request.source else request.there
            replica.kept_away[Key(kept.room, kept.generation)] = tuple(pages)
        for back in reports[0].released:
            key = Key(back.room, back.generation)
            replica.kept_away.pop(key, None)
            request = replica.live[key]
            pages = set(request.here if replica is request.source else request.there)
            assert set(back.pages) <= pages, "pages of another room came back"
            assert not replica.free & pages, "a page was given back twice"
            assert replica.name in request.ends, "pages came back before the room's result"
            replica.free |= pages

    def whole(self, request: Request) -> None:
        """Every row of every page of the request is there, on every decode rank."""
        for end, pool in zip(request.target.ends, request.target.pools, strict=True):
            layout = end.card.layout
            held = holding(KV, request.target.grid, end.card.rank)
            for position, page in enumerate(request.there):
                rows = {
                    ROW.unpack_from(pool, page * layout.page_bytes + i * ROW.size) for i in range(layout.page_bytes // ROW.size)
                }
                cells = {
                    (request.room, request.generation, position, layer * 8 + head)
                    for layer in range(*held.layers)
                    for head in range(*held.heads)
                }
                assert rows == cells

    def compute(self, request: Request) -> None:
        """What prefill's kernels would do: fill the request's pages."""
        for end, pool in zip(request.source.ends, request.source.pools, strict=True):
            layout = end.card.layout
            heads = layout.heads[1] - layout.heads[0]
            for position, page in enumerate(request.here):
                for i in range(layout.page_bytes // ROW.size):
                    layer, head = layout.layers[0] + i // (2 * heads), layout.heads[0] + i % heads
                    ROW.pack_into(
                        pool,
                        page * layout.page_bytes + i * ROW.size,
                        request.room,
                        request.generation,
                        position,
                        layer * 8 + head,
                    )

    def request(self) -> None:
        """A request comes in, if both sides have room for it."""
        room, pages = self.random.randrange(10), self.random.randint(1, 5)
        source, target = self.random.choice(self.prefill), self.random.choice(self.decode)
        busy = any(room in e.table.rooms for r in (*self.prefill, *self.decode) for e in r.ends)
        busy = busy or any(r.room == room and len(r.ends) < 2 for r in self.requests)
        if busy or len(source.free) < pages or len(target.free) < pages:
            return
        generation = self.generations[room] = self.generations.get(room, -1) + 1
        request = Request(room, generation, source, target, pages)
        request.here = [source.free.pop() for _ in range(pages)]
        request.there = [target.free.pop() for _ in range(pages)]
        self.requests.append(request)
        source.live[Key(room, generation)] = target.live[Key(room, generation)] = request
        self.compute(request)
        cut = self.random.randint(0, pages)
        where = source.source()

        def send(end: PrefillEnd, pages: list[int], *, last: bool) -> None:
            if source.name not in request.ends:  # an engine that has heard of the end of a room computes no more of it
                end.send(room, pages, last=last, generation=generation)

        for rank, end in enumerate(target.ends):
            target.call(rank, lambda end=end: end.receive(room, request.there, where, generation=generation))
        for rank, end in enumerate(source.ends):
            if cut:
                source.call(rank, lambda end=end: send(end, request.here[:cut], last=False))
            source.call(rank, lambda end=end: send(end, request.here[cut:], last=True))

    def trouble(self) -> None:
        """Something goes wrong."""
        kind = self.random.random()
        replica = self.random.choice((*self.prefill, *self.decode))
        end = self.random.choice(replica.ends)
        if kind < 0.35:
            for room in list(end.table.rooms.values()):
                if self.random.random() < 0.5:
                    self.counts["aborted"] += 1
                    end.abort(room.key.room, generation=room.key.generation, why="nobody waits for it")
        elif kind < 0.6:
            self.cut(end)
        elif kind < 0.85:
            self.counts["paused"] += 1
            replica.paused = self.random.choice((5, 60, 400))
        else:
            self.restart(replica)

    def cut(self, end: Any) -> None:
        """All connections of an end break, and some of what is on its way, acknowledgements too, is lost."""
        for wire in list(self.network.channels[end.name].wires.values()):
            self.counts["broken"] += 1
            wire.cut(None)

    def restart(self, replica: Replica) -> None:
        """All processes of a replica die, one is enough for that, and are started again under their names."""
        self.counts["killed"] += 1
        old = [end.identity.instance for end in replica.ends]
        for end in replica.ends:
            self.network.kill(end.name)
        if self.random.random() < 0.8:
            self.network.seen_dead.update(old)
        for request in self.requests:
            if replica in (request.source, request.target):
                request.ends.setdefault(replica.name, False)
        replica.start()

    def step(self) -> None:
        self.network.advance(0.05 * self.random.random())
        for replica in self.random.sample([*self.prefill, *self.decode], len(self.prefill) + len(self.decode)):
            if replica.paused:
                replica.paused -= 1
                for end in replica.ends:  # its peers grow tired of its silence
                    for wire in list(self.network.channels[end.name].wires.values()):
                        if self.random.random() < 0.02:
                            wire.cut(wire.other(self.network.channels[end.name]))
            else:
                replica.step()

    def play(self, steps: int, *, trouble: float = 0.03) -> None:
        for _ in range(steps):
            if self.random.random() < 0.3:
                self.request()
            if self.random.random() < trouble:
                self.trouble()
            self.step()

    def settle_down(self) -> None:
        """Nothing new goes wrong: every room ends on both sides, and every page comes back that can."""
        everybody = [*self.prefill, *self.decode]
        for _ in range(3000):
            self.step()
            waiting = [r for r in self.requests if len(r.ends) < 2]
            rooms = [
                room
                for x in everybody
                for e in x.ends
                for room in e.table.rooms.values()
                if room.status is not Status.QUARANTINED
            ]
            if not waiting and not rooms and not any(q for x in everybody for q in x.calls) and self.network.now:
                break
        else:
            raise AssertionError([(r.room, r.generation, r.ends) for r in self.requests if len(r.ends) < 2])
        for replica in everybody:
            away = {page for pages in replica.kept_away.values() for page in pages}
            assert replica.free | away == set(range(PAGES)) and not replica.free & away
            for end in replica.ends:
                assert len(end.ledger) <= len(away)
