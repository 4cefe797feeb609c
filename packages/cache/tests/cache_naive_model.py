"""A cache as one would write it on paper: a list of segments, searched from one end to the other for everything.

It knows device and host, no storage. `commplane_cache` must come to the same segments on the same tiers after every call.
"""

from __future__ import annotations

from dataclasses import dataclass

ORDERS = {
    "lru": lambda s: (s.clock,),
    "lfu": lambda s: (s.hits, s.clock),
    "priority": lambda s: (s.priority, s.clock),
}


@dataclass(eq=False)
class Segment:
    seq: int
    before: tuple  # pages before it
    pages: tuple  # its own; each a tuple of tokens
    device: str = ""  # "", "moving", "here"
    host: str = ""
    clock: int = 0
    hits: int = 0
    priority: int = 0
    locks: int = 0
    leaves: bool = False  # from the device, when its pages have come to the host

    @property
    def end(self):
        return self.before + self.pages


class NaiveCache:
    def __init__(self, policy, write, device, host):
        self.order, self.write = ORDERS[policy], write
        self.segments: list[Segment] = []
        self.device, self.host = device, host
        self.free_device, self.free_host = device, host
        self.clock, self.seq = 0, 1
        self.promised = 0  # pages that calls since the last step did not get

    # Structure.

    def children(self, segment):
        return [s for s in self.segments if s.before == segment.end]

    def ancestors(self, segment):
        return [s for s in self.segments if s.end == segment.end[: len(s.end)]]

    def new(self, before, pages):
        self.segments.append(Segment(self.seq, before, pages))
        self.seq += 1
        return self.segments[-1]

    def walk(self, pages):
        """Segments along `pages`; one that is left in its middle is cut there."""
        path, place = [], 0
        while True:
            found = [s for s in self.segments if s.before == pages[:place] and s.pages[:1] == pages[place : place + 1]]
            if not found:
                return path, place
            (segment,) = found
            rest = pages[place:]
            common = 0
            while common < min(len(rest), len(segment.pages)) and rest[common] == segment.pages[common]:
                common += 1
            if common < len(segment.pages):
                upper = self.new(segment.before, segment.pages[:common])
                for name in ("device", "host", "clock", "hits", "priority", "locks", "leaves"):
                    setattr(upper, name, getattr(segment, name))
                segment.before, segment.pages = upper.end, segment.pages[common:]
                segment = upper
            path.append(segment)
            place += common
            if common < len(rest) and place < len(segment.end):
                return path, place

    # Room.

    def best(self, candidates):
        return min(candidates, key=lambda s: (self.order(s), s.seq), default=None)

    def device_room(self, pages, asks_again=False):
        if self.free_device >= pages:
            return True
        if self.free_device + sum(len(s.pages) for s in self.segments if s.device == "here" and not s.locks) < pages:
            return False
        coming = sum(
            len(s.pages) for s in self.segments if s.host == "moving" and s.leaves and s.device == "here" and not s.locks
        )
        while self.free_device < pages and self.free_device + coming < pages + self.promised:
            victim = self.best(
                s
                for s in self.segments
                if s.device == "here" and not s.locks and s.host != "moving" and not any(c.device for c in self.children(s))
            )
            if victim is None:
                break
            size = len(victim.pages)
            if victim.host == "here":
                victim.device = ""
                self.free_device += size
            elif self.write == "write_back" and self.back_up(victim):
                victim.leaves = True
                coming += size
            elif not self.children(victim):
                self.segments.remove(victim)
                self.free_device += size
            elif self.back_up(victim):
                victim.leaves = True
                coming += size
            else:
                below = [s for s in self.segments if s is not victim and s.end[: len(victim.end)] == victim.end]
                self.free_host += sum(len(s.pages) for s in below)
                self.free_device += size
                self.segments = [s for s in self.segments if s is not victim and s not in below]
        if self.free_device >= pages:
            return True
        self.promised += pages * asks_again
        return False

    def host_room(self, pages):
        idle = sum(len(s.pages) for s in self.segments if s.host == "here" and s.device != "moving")
        if self.free_host < pages > self.free_host + idle:
            return False
        while self.free_host < pages:
            victim = self.best(
                s
                for s in self.segments
                if s.host == "here" and s.device != "moving" and (s.device == "here" or not (s.locks or self.children(s)))
            )
            if victim is None:
                return False
            victim.host = ""
            self.free_host += len(victim.pages)
            if not victim.device:
                self.segments.remove(victim)
        return True

    def back_up(self, segment):
        if segment.host or segment.device != "here" or not self.host_room(len(segment.pages)):
            return False
        segment.host = "moving"
        self.free_host -= len(segment.pages)
        return True

    # What an engine calls.

    def match(self, pages, priority, *, again=False):
        """Segments on the device, segments after them on the host."""
        self.clock += 1
        device, host = [], []
        for segment in self.walk(pages)[0]:
            if not host and segment.device == "here":
                device.append(segment)
            elif segment.host == "here":
                host.append(segment)
            else:
                break
            segment.clock = self.clock
            segment.hits += not again
            segment.priority = max(segment.priority, priority)
            if self.write == "write_through_selective" and segment.hits >= 2:
                self.back_up(segment)
        return device, host

    def lock(self, segments, by):
        for segment in self.ancestors(segments[-1]) if segments else ():
            segment.locks += by

    def allocate(self, pages):
        if not self.device_room(pages, asks_again=True):
            return False
        self.free_device -= pages
        return True

    def insert(self, pages, start, priority):
        self.clock += 1
        self.walk(pages[:start])
        path, known = self.walk(pages)
        for segment in path:
            if len(segment.end) > start:
                if segment.device == "here":
                    self.free_device += len(segment.pages)
                elif segment.device == "moving":
                    raise NotImplementedError("a load is under way: the test does not insert then")
                segment.device = "here"
        if known < len(pages):
            segment = self.new(pages[:known], pages[known:])
            segment.device, segment.clock, segment.hits, segment.priority = "here", self.clock, 1, priority
            path.append(segment)
        for segment in path:
            segment.clock, segment.priority = self.clock, max(segment.priority, priority)
            if self.write == "write_through" or (self.write == "write_through_selective" and segment.hits >= 2):
                self.back_up(segment)
        return path

    def load(self, host):
        if any(s.device == "moving" for s in host):
            return
        todo = []
        for segment in host:
            if segment.device:
                break
            todo.append(segment)
        self.lock(todo, 1)
        while todo and not self.device_room(sum(len(s.pages) for s in todo)):
            self.lock(todo, -1)
            todo.pop()
            self.lock(todo, 1)
        self.lock(todo, -1)
        for segment in todo:
            segment.device = "moving"
            self.free_device -= len(segment.pages)

    def step(self):
        self.promised = 0
        for segment in self.segments:
            segment.leaves = False
            segment.device = segment.device and "here"
            segment.host = segment.host and "here"

    def picture(self):
        return sorted((s.end, len(s.pages), s.device, s.host, s.clock, s.hits, s.priority, s.locks) for s in self.segments)
