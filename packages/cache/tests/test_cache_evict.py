"""Who goes when room is needed, what it is written to first, and that no rank decides that alone."""

from __future__ import annotations

import random

import pytest
from cache_group import Group

from commplane.errors import CommplaneError, ConfigError
from commplane.testing import SimulatedRounds
from commplane_cache.agreed import cache_sync_spec
from commplane_cache.cache import PrefixCache
from commplane_cache.evict import POLICIES, VictimQueue
from commplane_cache.tiers import HELD, MOVING, TREE, FlatCopier, Pool
from commplane_cache.tree import Node, TokenRun

pytestmark = pytest.mark.timeout(30)


def prompt(first, pages=2):
    return [first] * 2 * pages


@pytest.mark.parametrize("policy", POLICIES)
def test_victims_come_in_the_order_of_the_policy_however_nodes_are_used_meanwhile(policy):
    draw = random.Random(policy)
    there = set()
    queue = VictimQueue(policy, 1, lambda node: node.seq in there)
    nodes, clock = [], 0
    for seq in range(300):
        clock += 1
        node = Node(seq, None, b"", b"", 1)
        node.clock, node.hits, node.priority = clock, 1, draw.randrange(3)
        there.add(seq)
        queue.consider(node)
        nodes.append(node)
        for used in draw.sample(nodes, min(3, len(nodes))):
            clock += 1
            used.clock, used.hits, used.priority = clock, used.hits + 1, max(used.priority, draw.randrange(3))
        if draw.random() < 0.3:  # locked and let go
            locked = draw.choice(nodes)
            was = locked.seq in there
            there.discard(locked.seq)
            victim = queue.pop()
            if victim is not None:
                assert victim is min((n for n in nodes if n.seq in there), key=lambda n: (POLICIES[policy](n), n.seq))
                there.discard(victim.seq)
            if was:
                there.add(locked.seq)
                queue.consider(locked)
    left = [n for n in nodes if n.seq in there]
    out = []
    while (victim := queue.pop()) is not None:
        out.append(victim.seq)
        there.discard(victim.seq)
    assert out == [n.seq for n in sorted(left, key=lambda n: (POLICIES[policy](n), n.seq))]


def test_an_unknown_policy_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="lru, lfu, priority"):
        VictimQueue("random", 1, lambda node: True)


@pytest.mark.parametrize(
    ("policy", "first"),
    [("lru", 1), ("lfu", 2), ("priority", 3)],
)
def test_the_policy_decides_which_prompt_is_forgotten(policy, first):
    group = Group(2, device=6, host=2, evict=policy, write="write_back")
    group.serve(prompt(1), priority=2)
    group.serve(prompt(2), priority=1)
    group.serve(prompt(3), priority=0)
    for tokens in (prompt(1), prompt(1), prompt(3), prompt(3), prompt(3), prompt(2)):
        group.all(lambda c, t=tokens: c.match(TokenRun(t, 2)))
    assert not group.serve(prompt(4))  # it is written to the host first
    group.step()
    assert group.serve(prompt(4))
    assert [group.known(prompt(i)) for i in (1, 2, 3)] == [(0, 2) if i == first else (2, 0) for i in (1, 2, 3)]


def test_what_a_request_has_locked_stays():
    group = Group(2, device=4, host=2, write="write_back")
    group.serve(prompt(1))
    nodes = [c.match(TokenRun(prompt(1), 2)).device_node for c in group.caches]
    for cache, node in zip(group.caches, nodes, strict=True):
        cache.lock(node)
    assert group.serve(prompt(2))
    group.step()
    for _ in range(3):
        assert group.all(lambda c: c.allocate(4) is None)
        group.step()
    assert group.known(prompt(1)) == group.known(prompt(2)) == (2, 0), "four pages cannot be had, so nobody goes"
    assert group.all(lambda c: c.allocate(2) is None), "the one that is not locked is written to the host first"
    group.step()
    assert group.all(lambda c: c.release(c.allocate(2))) is None
    assert group.known(prompt(1)) == (2, 0)
    for cache, node in zip(group.caches, nodes, strict=True):
        cache.unlock(node)
    assert group.all(lambda c: c.allocate(4) is not None), "the host is full of what storage still reads: it goes at once"


def test_ranks_with_more_memory_behave_like_the_one_with_the_least():
    group = Group(3, device=8, host=4, more=(5, 0, 2))
    assert group.owned("device", "free") == [13, 8, 10]
    assert group.all(lambda c: c.device_pages) == 8
    for cache in group.caches:
        with pytest.raises(ConfigError, match="wanted 9 device pages, found 8 on the rank with the fewest"):
            cache.allocate(9)
    assert group.all(lambda c: c.allocate(8) is not None)


def test_what_can_never_have_room_evicts_nothing():
    group = Group(2, device=8, host=64)
    for i in range(4):
        group.serve(prompt(i))
    with pytest.raises(ConfigError, match="wanted 9 device pages"):
        group.caches[0].allocate(9)
    with pytest.raises(ConfigError, match="wanted 9 device pages"):
        group.caches[1].allocate(9)
    group.step()
    assert group.owned("device", "tree") == [8, 8]
    nodes = [c.match(TokenRun(prompt(1), 2)).device_node for c in group.caches]
    for cache, node in zip(group.caches, nodes, strict=True):
        cache.lock(node)
    assert group.all(lambda c: c.allocate(7) is None), "two pages of eight are locked"
    assert group.owned("device", "tree") == [8, 8]
    assert group.all(lambda c: c.allocate(6) is not None)


def test_a_prompt_that_is_too_large_for_the_host_leaves_it_as_it_is():
    group = Group(1, device=32, host=8)
    for i in range(4):
        group.serve(prompt(i))
        group.step()
        group.end("put")
        group.step()
    assert group.owned("host", "tree") == [8]
    assert group.serve([100 + i // 2 for i in range(18)])
    group.step()
    assert group.owned("host", "tree") == [8]
    assert group.caches[0].counters.host.evicted == 0


def test_what_storage_still_reads_is_not_counted_as_room_on_the_host():
    group = Group(1, device=32, host=8)
    for i in range(4):
        group.serve(prompt(i))
    group.step()
    group.end("put")
    group.step()
    assert group.serve(prompt(5, 3))
    group.step()
    assert group.known(prompt(0)) == (2, 0)
    assert group.owned("host", "tree") == [8], "two pages could go, three are wanted"


def test_before_the_first_round_there_are_no_pages_to_give():
    cache = PrefixCache(SimulatedRounds(1, [cache_sync_spec()])[0], 8)
    assert cache.allocate(1) is None
    cache.step()
    assert len(cache.allocate(8)) == 8


class Broken(FlatCopier):
    """A copier whose copies fail."""

    def to_host(self, device, host):
        raise OSError("no such memory")

    def to_device(self, host, device):
        raise OSError("no such memory")


class BrokenBack(FlatCopier):
    def to_device(self, host, device):
        raise OSError("no such memory")


def test_a_copy_to_the_host_that_fails_on_one_rank_is_given_up_on_all():
    group = Group(3, copiers=[FlatCopier, Broken, FlatCopier])
    group.serve(prompt(1))
    assert group.owned("host", "moving") == [2] * 3
    group.step()
    assert group.owned("host", "free") == [16] * 3
    assert group.caches[0].counters.host.failed == 2
    assert group.known(prompt(1)) == (2, 0)


class BrokenForAWhile(FlatCopier):
    """A copier whose copies to the host fail while `broken` says so."""

    broken = False

    def to_host(self, device, host):
        if self.broken:
            raise OSError("no such memory, for a while")
        super().to_host(device, host)


@pytest.mark.parametrize("lasts", [False, True])
def test_what_could_not_be_backed_up_keeps_no_room_from_those_who_want_it(lasts):
    group = Group(1, device=8, host=64, copiers=[BrokenForAWhile])
    copier = group.caches[0]._residency._copier

    def settle():
        for _ in range(4):
            while group.stores[0].open_batches:
                group.end(group.stores[0].open_batches[0].what)
            group.step()

    for i in range(4):
        copier.broken = True
        assert group.serve([i, i])
        settle()
        copier.broken = False
        assert group.serve([i, i, 9, 9])
        settle()
    copier.broken = lasts
    served = []
    for _ in range(4):
        served.append(group.serve(prompt(70, 5)))
        settle()
    assert served == [False, True, True, True], "tried once more, and then written or forgotten"
    assert group.known([0, 0, 9, 9]) == ((0, 0) if lasts else (0, 2))
    assert group.known([3, 3, 9, 9]) == (2, 0), "there is room without it"


def test_a_request_that_asks_again_while_copies_are_slow_starts_no_more_of_them():
    class Slow(FlatCopier):
        def to_host(self, device, host):
            return Slowly()

    class Slowly:
        def query(self):
            return False

    group = Group(1, device=8, host=64, write="write_back", copiers=[Slow])
    for i in range(8):
        group.serve([i, i])
    group.step()
    for _ in range(4):
        assert group.all(lambda c: c.allocate(2) is None)
        group.step()
    assert group.owned("host", "moving") == [2]
    for _ in range(3):  # three requests in one step want two pages each
        assert group.all(lambda c: c.allocate(2) is None)
    assert group.owned("host", "moving") == [6]


class Failing:
    """A copy that fails on its way."""

    def __init__(self):
        self.asked = 0

    def query(self):
        self.asked += 1
        if self.asked == 3:
            raise RuntimeError("an illegal memory access was encountered")
        return False


class BrokenLater(FlatCopier):
    def to_host(self, device, host):
        return Failing()


def test_a_copy_that_fails_on_its_way_on_one_rank_is_given_up_on_all():
    group = Group(2, copiers=[FlatCopier, BrokenLater])
    group.serve(prompt(1))
    group.step(2)
    assert group.owned("host", "moving") == [2] * 2
    group.step()
    assert group.owned("host", "free") == [16] * 2
    assert group.known(prompt(1)) == (2, 0)


def test_a_load_that_fails_on_one_rank_is_given_up_on_all_and_the_host_keeps_its_pages():
    group = Group(2, device=4, write="write_back", copiers=[FlatCopier, BrokenBack])
    group.serve(prompt(1))
    group.serve(prompt(2))
    group.all(lambda c: c.allocate(4) is None)
    group.step()
    own = [c.allocate(4) for c in group.caches]
    for cache, pages in zip(group.caches, own, strict=True):
        cache.release(pages)
    assert group.known(prompt(1)) == (0, 2)
    works = [c.load_back(c.match(TokenRun(prompt(1), 2))) for c in group.caches]
    assert [w.agreed for w in works] == [None, None]
    group.step()
    assert [w.agreed for w in works] == [False, False]
    assert group.known(prompt(1)) == (0, 2)
    assert group.owned("device", "free") == [4, 4]


def test_a_prompt_that_was_computed_while_it_was_loaded_keeps_the_computed_pages():
    group = Group(2, device=6, write="write_back")
    group.serve(prompt(1))
    group.all(lambda c: c.flush())
    group.step()
    group.end("put")
    own = [c.allocate(6) for c in group.caches]
    for cache, pages in zip(group.caches, own, strict=True):
        cache.release(pages)
    assert group.known(prompt(1)) == (0, 2)
    group.all(lambda c: c.load_back(c.match(TokenRun(prompt(1), 2))) is not None)
    assert group.owned("device", "moving") == [2, 2]
    assert group.serve(prompt(1))
    group.step()
    assert group.owned("device", "moving") == [0, 0]
    assert group.owned("device", "tree") == [2, 2]
    assert group.known(prompt(1)) == (2, 0)


def test_a_write_to_storage_that_fails_on_one_rank_leaves_the_pages_unstored_on_all():
    group = Group(2)
    group.serve(prompt(1))
    group.serve(prompt(2))
    group.step()
    group.end("put", [2, 1])
    group.end("put", ranks=[0])
    group.step()
    stored = [[n.stored for n in sorted(c.tree.nodes(), key=lambda n: n.seq)] for c in group.caches]
    assert stored == [[False, False]] * 2
    group.end("put", ranks=[1])
    group.step()
    stored = [[n.stored for n in sorted(c.tree.nodes(), key=lambda n: n.seq)] for c in group.caches]
    assert stored == [[False, True]] * 2
    assert group.caches[0].counters.storage.filled == group.caches[0].counters.storage.failed == 2


def test_a_rank_that_does_not_write_waits_for_the_one_that_does():
    group = Group(1, writer=False)
    group.serve(prompt(1))
    group.step(2)
    assert group.stores[0].batches == 0
    assert [n.stored for n in group.caches[0].tree.nodes()] == [True]


def test_flush_writes_what_is_on_the_device_alone():
    group = Group(2, write="write_back")
    group.serve(prompt(1))
    group.serve([1, 1, 7, 7, 7, 7])
    assert group.owned("host", "tree") == [0, 0]
    assert group.all(lambda c: c.flush()) == 4
    group.step()
    assert group.owned("host", "tree") == [4, 4]
    for _ in range(3):
        group.end("put")
    group.step()
    assert not group.caches[0].busy


# Ownership.


def test_a_page_that_is_freed_twice_is_an_error_where_it_happens():
    pool = Pool("host", 8)
    pages = pool.take(3, MOVING)
    pool.hand_over(pages, MOVING, TREE)
    pool.give_back(pages, TREE)
    with pytest.raises(CommplaneError, match=r"from tree to free.*of free"):
        pool.give_back(pages, TREE)
    with pytest.raises(CommplaneError, match="from moving to tree"):
        pool.hand_over(pages, MOVING, TREE)
    with pytest.raises(CommplaneError, match="9 pages were to be taken and 8 are free"):
        pool.take(9, HELD)


def test_an_audit_finds_pages_that_are_lost_or_owned_twice():
    pool = Pool("host", 8)
    pages = pool.take(4, TREE)
    pool.audit([pages], [])
    with pytest.raises(CommplaneError, match="claims 2 pages and is written down with 4"):
        pool.audit([pages[:2]], [])
    with pytest.raises(CommplaneError, match="owned twice by tree"):
        pool.audit([pages, pages[:1]], [])


def test_an_engine_that_releases_pages_of_the_tree_is_refused():
    group = Group(1)
    group.serve(prompt(1))
    pages = group.caches[0].match(TokenRun(prompt(1), 2)).pages
    with pytest.raises(CommplaneError, match="from held to free"):
        group.caches[0].release(pages)
