"""Pages from the cache: how an engine uses `commplane_cache.cache.PrefixCache`, request by request."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from commplane_cache.cache import Match, PrefixCache
from commplane_cache.demo.engine import Running
from commplane_cache.tree import Node, TokenRun
from commplane_cache.work import Work

__all__ = ["CachedPages"]


@dataclass
class _Held:
    """What a request has from the cache.

    Attributes:
        run: its prompt, later with its answer.
        before: pages that the cache had when it was admitted; what is on the host beyond that came from storage.
        found: what the cache had after the prefetch.
        match: what it has now; locked while `load` is on its way.
        load: host to device, on its way.
        node: locked for as long as the request lives.
        shared: pages of the request that are the tree's.
        own: pages after these, which nobody else sees.
    """

    run: TokenRun
    before: int
    found: Match | None = None
    match: Match | None = None
    load: Work | None = None
    node: Node | None = None
    shared: int = 0
    own: np.ndarray | None = None


class CachedPages:
    """As `commplane_cache.demo.engine.Pages`, from a cache. All ranks call alike.

    Args:
        cache: whose device pages are those of the model's pool.
        flush: at the end of the stream, back up what is on the device alone.
        mute: prompts after whose computation this rank runs no round any more, which is a fault, for tests; 0 for never.
    """

    def __init__(self, cache: PrefixCache, *, flush: bool, mute: int = 0) -> None:
        self._cache, self._flush, self._mute = cache, flush, mute
        self._page = cache.options.page_tokens
        self._held: dict[str, _Held] = {}
        self._computed = 0

    def step(self) -> None:
        """The round of this step. Collective."""
        if not self._mute or self._computed < self._mute:
            self._cache.step()

    def admit(self, request: Running) -> None:
        """Look what is there, and let storage look for the rest."""
        run = TokenRun(request.prompt, self._page)
        match = self._cache.match(run)
        self._held[request.name] = _Held(run, match.known)
        self._cache.prefetch(request.name, run, match)

    def ready(self, request: Running) -> bool:
        """First the prefetch, then the host's pages, then room for what is to be computed."""
        cache, held = self._cache, self._held[request.name]
        if held.match is None:
            if not cache.check_prefetch_progress(request.name):
                return False
            held.match = held.found = cache.match(held.run, again=True)
            cache.lock(held.match.node)
            held.load = cache.load_back(held.match)
        while held.load is not None:
            if held.load.agreed is None:
                return False
            # What had been on its way for another request may have been but a part: ask for the rest, as long as that helps.
            now = cache.match(held.run, again=True)
            cache.lock(now.node)
            cache.unlock(held.match.node)
            more, held.match = now.device > held.match.device, now
            held.load = cache.load_back(now) if more else None
        if held.node is None:
            # A load that failed somewhere, or found no room, leaves less on the device, on all ranks alike: that is computed.
            now = cache.match(held.run, again=True)
            cache.lock(now.device_node)
            cache.unlock(held.match.node)
            held.node, held.shared = now.device_node, now.device
            request.pages = now.pages.tolist()
            self._account(request, held)
        own = cache.allocate(-(-request.room // self._page) - held.shared)
        if own is None:
            return False
        held.own = own
        request.pages += own.tolist()
        return True

    def _account(self, request: Running, held: _Held) -> None:
        """Where the tokens of the prompt come from. At least its last one is computed: what follows it is asked for."""
        assert held.found is not None
        request.start = min(held.shared * self._page, len(request.prompt) - 1)
        device, host = held.found.device, max(held.found.device, held.before)
        edges = [min(pages * self._page, request.start) for pages in (device, host)]
        request.device, request.host, request.storage = edges[0], edges[1] - edges[0], request.start - edges[1]

    def computed(self, request: Running) -> None:
        """Its prompt is computed: others may use the full pages of it from now on."""
        self._computed += 1
        self._give(request, self._held[request.name])

    def done(self, request: Running) -> None:
        """The full pages of the answer go to the tree as well, what is left over is free."""
        held = self._held.pop(request.name)
        held.run = held.run.extended(request.answer[:-1])
        self._give(request, held)
        assert held.node is not None
        assert held.own is not None
        self._cache.unlock(held.node)
        self._cache.release(held.own)

    def _give(self, request: Running, held: _Held) -> None:
        assert held.own is not None
        assert held.node is not None
        count = held.run.pages - held.shared
        if count < 1:
            return
        given = self._cache.insert(held.run, held.own[:count], start=held.shared)
        self._cache.lock(given.node)
        self._cache.unlock(held.node)
        held.node, held.own = given.node, held.own[count:]
        request.pages[held.shared : held.shared + count] = given.pages.tolist()
        held.shared += count

    def finish(self) -> None:
        """All are answered."""
        if self._flush:
            self._cache.flush()

    def busy(self) -> bool:
        """Whether copies, writes or reads are on their way."""
        return self._cache.busy
