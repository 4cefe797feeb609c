"""The ranks of an engine vote on an adapter: all of them return the same, or all raise."""

from __future__ import annotations

import time
from datetime import timedelta
from threading import Thread

import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore

from commplane.engines.vote import active, vote
from commplane.errors import AgreementError, PeerError

READY = {"adapter": "adapter 0.1.0", "engine": "madeup 1.4", "problem": None}


def voters(store, ballots, timeout, late=()):
    """The outcome of each rank, as threads; those of `late` vote when the others have given up."""
    said = {}

    def one(rank):
        who = f"[adapter rank {rank}/{len(ballots)}]"
        try:
            said[rank] = vote(store(), rank, len(ballots), ballots[rank], timeout, who, "do it")
        except PeerError as error:
            said[rank] = error

    for ranks in ([r for r in range(len(ballots)) if ballots[r] is not None and r not in late], late):
        threads = [Thread(target=one, args=(r,)) for r in ranks]
        for t in threads:
            t.start()
        for t in threads:
            t.join(30)
    return said


@pytest.mark.timeout(60)
def test_every_rank_gets_all_ballots_also_when_they_vote_again():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for again in range(2):
        ballots = [{**READY, "adapter": f"of rank {r}, {again}"} for r in range(4)]
        said = voters(lambda: PrefixStore("v", TCPStore("127.0.0.1", server.port)), ballots, 20)
        assert said == dict.fromkeys(range(4), ballots)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("absent", [0, 1])
def test_all_ranks_name_the_missing_one_and_one_that_comes_late_learns_that_it_was(absent):
    store = HashStore()
    ballots = [READY] * 4
    ballots[absent] = None
    said = voters(lambda: store, ballots, 0.3, late=[3])
    assert sorted(said) == sorted({0, 1, 2, 3} - {absent})
    for rank in set(said) - {3}:
        error = said[rank]
        assert isinstance(error, PeerError) and absent in error.missing_ranks
        assert str(error).startswith(
            f"[adapter rank {rank}/4] vote: wanted the adapter on all 4 ranks, found no answer from rank "
        )
        assert str(error).endswith(" within 0.3 s: do it")
    assert isinstance(said[3], PeerError) and str(said[3]).endswith(": do it")


@pytest.mark.timeout(60)
def test_a_store_that_is_gone_is_an_error_and_no_wait():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    client = TCPStore("127.0.0.1", server.port, timeout=timedelta(seconds=5))
    del server
    with pytest.raises(PeerError, match=r"^\[adapter rank 0/2\] vote: .*store.*: do it$"):
        vote(client, 0, 2, READY, 20, "[adapter rank 0/2]", "do it")


class Slow:
    """A store whose reads take their time."""

    def __init__(self, store):
        self.store = store

    def __getattr__(self, name):
        return getattr(self.store, name)

    def compare_set(self, *args):
        time.sleep(0.3)
        return self.store.compare_set(*args)


@pytest.mark.timeout(60)
def test_the_host_of_the_store_ends_only_when_all_know_that_they_differ():
    master = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    clients, said = [master[0], Slow(TCPStore("127.0.0.1", master[0].port))], {}
    ballots = [READY, {**READY, "problem": "wanted a, found b"}]

    def one(rank):
        try:
            said[rank] = vote(clients[rank], rank, 2, ballots[rank], 10, f"[adapter rank {rank}/2]", "do it")
        except PeerError as error:
            said[rank] = error
        if rank == 0:  # its process ends
            clients[0] = None
            master.clear()

    threads = [Thread(target=one, args=(r,)) for r in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert said == {0: ballots, 1: ballots}


def test_the_adapter_works_on_all_ranks_or_on_none():
    refusing = {**READY, "problem": "wanted a, found b"}
    assert active([READY] * 3, "w", "f")
    assert not active([refusing, {**refusing, "problem": "wanted c, found d"}], "w", "f")
    with pytest.raises(AgreementError) as some:
        active([READY, refusing, READY], "[w]", "do it")
    assert str(some.value) == (
        "[w] vote: wanted the same adapter at work on all ranks, found rank 0, 2: adapter 0.1.0 for madeup 1.4; "
        "rank 1: wanted a, found b: do it"
    )
    with pytest.raises(AgreementError, match=r"rank 1: adapter 0\.2\.0 for"):
        active([READY, {**READY, "adapter": "adapter 0.2.0"}], "w", "f")
    with pytest.raises(AgreementError, match=r"rank 0: adapter 0\.1\.0 for madeup 1\.4; rank 1: .* for madeup 1\.3"):
        active([READY, {**READY, "engine": "madeup 1.3"}], "w", "f")
