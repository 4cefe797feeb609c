"""Server and client in one process: registering, joining, waiting, leases, changes."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from disagg_rows import TOKEN, Serve, client_of, eventually, row, serving, topology

from commplane.errors import AgreementError, CommplaneError, PeerError
from commplane.testing import run_threads
from commplane_disagg.port import BoundSocket, bind_listener
from commplane_disagg.registry import Follower, Lease, RegistryClient, RegistryServer, join
from commplane_disagg.registry.service import Service
from commplane_disagg.wire import Coordinate, DpRank, EngineOffer, Tenure

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def serve() -> Iterator[Serve]:
    with serving() as start:
        yield start


def test_ranks_register_and_every_one_of_them_reads_the_whole_table(serve: Serve) -> None:
    server = serve()
    rows = [row(tp, engines=(EngineOffer("tcp", bytes([tp])),)) for tp in range(4)]
    with client_of(server) as client:
        assert client.table().topology is None
        for one in rows:
            client.register(topology(tp=4), one)
        view = client.wait_ready(5)
        assert view.rows == tuple(rows)
        assert view.topology == topology(tp=4)
        assert client.lookup(Coordinate(tp=2)) == rows[2]
        assert client.lookup(Coordinate(tp=9)) is None
        assert view.row(Coordinate(tp=1)) == rows[1]


def test_the_ranks_of_a_plane_join_on_the_port_that_their_leader_has_bound() -> None:
    def rank_main(plane: Any) -> tuple[int, int, list[str]]:
        bound = bind_listener("127.0.0.1")
        with join(
            topology(tp=4), row(plane.rank), registry_host="127.0.0.1", bound=bound, token=TOKEN, plane=plane, timeout=20
        ) as member:
            assert (member.server is not None) == (plane.rank == 0)
            assert (bound.socket.fileno() >= 0) == (plane.rank == 0), "a socket that nobody needs is closed"
            plane.gather(None, what="all have joined")  # who leaves before that is missing for those that still wait
            return bound.port, member.port, [str(found.key) for found in member.table.rows]

    answers = run_threads(4, rank_main)
    assert not [answer for answer in answers if isinstance(answer, Exception)], answers
    bound, ports, keys = zip(*answers, strict=True)  # type: ignore[misc]
    assert len(set(bound)) == 4
    assert set(ports) == {bound[0]}
    assert keys == ([f"dp0/cp0/tp{tp}/pp0" for tp in range(4)],) * 4


def test_a_leader_that_cannot_serve_fails_on_all_ranks_at_once() -> None:
    def rank_main(plane: Any) -> None:
        bound = bind_listener("127.0.0.1")
        if plane.rank == 0:
            bound.socket.close()
            bound.port = 1
        join(topology(tp=3), row(plane.rank), registry_host="127.0.0.1", bound=bound, token=TOKEN, plane=plane, timeout=30)

    begun = time.monotonic()
    results = run_threads(3, rank_main)
    assert "cannot serve" in str(results[0])
    assert [str(result).partition(",")[0] for result in results[1:]] == ["rank 0 has no bound port"] * 2
    assert time.monotonic() - begun < 30


def test_one_process_joins_without_a_plane() -> None:
    bound = bind_listener("127.0.0.1")
    with join(topology(tp=1), row(0), registry_host="127.0.0.1", bound=bound, token=TOKEN, nnodes=1) as member:
        assert member.table.ready
    assert bound.socket.fileno() == -1


def test_joining_without_anything_to_agree_over_says_what_to_do_and_closes_the_socket() -> None:
    bound = bind_listener("127.0.0.1")
    with pytest.raises(RuntimeError, match=r"wants torch\.distributed initialised"):
        join(topology(), row(0), registry_host="127.0.0.1", bound=bound, token=TOKEN)
    assert bound.socket.fileno() == -1


def test_waiting_for_a_group_names_who_is_missing(serve: Serve) -> None:
    with client_of(serve()) as client:
        with pytest.raises(PeerError, match=r"group 'prefill' is not ready after 0.1 s: no rank has registered at 127.0.0.1"):
            client.wait_ready(0.1)
        client.register(topology(tp=3), row(1))
        with pytest.raises(
            PeerError, match=r"1 of 3 ranks are registered at .*, missing are dp0/cp0/tp0/pp0, dp0/cp0/tp2/pp0; look"
        ):
            client.wait_ready(0.1)
        wide = client.of("wide")
        wide.register(topology(tp=64), row(0))
        with pytest.raises(PeerError, match=r"dp0/cp0/tp16/pp0 and 47 more; look"):
            wide.wait_ready(0.1)


def test_who_waits_is_told_when_the_last_rank_comes(serve: Serve) -> None:
    with client_of(serve()) as client, ThreadPoolExecutor(1) as pool:
        client.register(topology(), row(0))
        waiting = pool.submit(client.wait_ready, 20)
        time.sleep(0.2)
        assert not waiting.done()
        client.register(topology(), row(1))
        assert waiting.result(5).ready


def test_groups_do_not_see_each_other(serve: Serve) -> None:
    with client_of(serve()) as client:
        client.register(topology(), row(0))
        decode_side = client.of("decode")
        assert decode_side.table().rows == ()
        decode_side.register(topology(tp=1, page_size=32), row(0))
        assert decode_side.table().ready
        assert not client.table().ready


def test_a_registration_waits_in_the_bound_socket_until_somebody_serves() -> None:
    bound = bind_listener("127.0.0.1")
    with RegistryClient("127.0.0.1", bound.port, token=TOKEN, timeout=20, attempt=0.5) as client, ThreadPoolExecutor(1) as pool:
        registering = pool.submit(client.register, topology(), row(0))
        time.sleep(0.7)  # longer than one try
        with RegistryServer(bound, token=TOKEN):
            assert registering.result(15).lease == 10.0
            assert len(client.table().rows) == 1, "a try that was given up and one that was answered are one row"


def test_a_registration_that_fails_names_the_rank_the_registry_and_the_last_cause() -> None:
    with bind_listener("127.0.0.1") as bound:
        port = bound.port
    with (
        RegistryClient("127.0.0.1", port, token=TOKEN, timeout=0.4) as client,
        pytest.raises(
            PeerError, match=rf"^rank dp0/cp0/tp1/pp0 of group 'prefill' cannot register: the registry at 127.0.0.1:{port} "
        ),
    ):
        client.register(topology(), row(1))
    refused = r"within 0.4 s \([0-9]+ tries\), the last cause was ConnectionRefusedError"
    with RegistryClient("127.0.0.1", port, token=TOKEN, timeout=0.4) as client, pytest.raises(PeerError, match=refused):
        client.table()


def test_somebody_else_at_the_address_is_an_error_and_no_crash() -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        stop = threading.Event()

        def talk() -> None:
            stranger.settimeout(0.1)
            while not stop.is_set():
                try:
                    connection, _ = stranger.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.recv(4096)
                    connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=talk)
        thread.start()
        try:
            client = RegistryClient("127.0.0.1", stranger.getsockname()[1], token=TOKEN, timeout=0.5)
            with client, pytest.raises(PeerError, match="the last cause was BadStatusLine"):
                client.table()
        finally:
            stop.set()
            thread.join()


def test_another_topology_is_an_agreement_error_with_the_difference_at_once(serve: Serve) -> None:
    with client_of(serve()) as client:
        client.register(topology(), row(0))
        begun = time.monotonic()
        with pytest.raises(
            AgreementError, match=r"rank dp0/cp0/tp1/pp0 of group 'prefill' cannot register: .*page_size 16 != 64"
        ):
            client.register(topology(page_size=64), row(1))
        assert time.monotonic() - begun < 5, "trying again would change nothing"


def test_a_lease_keeps_its_row_and_an_ended_one_is_told(serve: Serve) -> None:
    server = serve(lease=1.2)
    with client_of(server) as client:
        kept, lost = row(0), row(1)
        with Lease(client, topology(), kept) as lease:
            client.register(topology(), lost)
            kinds = [change.kind for change in client.watch(2, timeout=2.4)]
            assert kinds == ["expired"]
            assert client.table().rows == (kept,)
            lease.check()
            assert lease.registrations == 1
            assert lease.overdue == 0
        assert [change.kind for change in client.changes(3).changes] == ["withdrawn"]
        assert lease.close() is False, "once is enough"


def test_two_instances_of_one_rank_cannot_both_be_there(serve: Serve) -> None:
    server = serve(lease=1.0)
    with client_of(server) as client:
        first, second = row(0, instance="first"), row(0, instance="second")
        held = r"is held by instance first epoch 0 at 127.0.0.1:7000 for"
        with Lease(client, topology(), first), pytest.raises(AgreementError, match=held):
            client.register(topology(), second, timeout=1.5)
        dead = row(1, instance="dead")
        client.register(topology(), dead)
        client.register(topology(), msgspec.structs.replace(dead, instance="next"), timeout=10)  # waits for the lease of the dead
        assert [change.kind for change in client.changes(2).changes] == ["registered", "expired", "registered"]


def test_an_instance_that_is_replaced_is_told_and_so_are_its_peers(serve: Serve) -> None:
    server = serve(lease=0.6)
    told: list[CommplaneError] = []
    lost = r"rank dp0/cp0/tp0/pp0 lost its row at .*: row .* instance old epoch 0 was replaced"
    with (
        client_of(server) as client,
        Lease(client, topology(), row(0, instance="old"), on_lost=told.append) as old,
        Lease(client, topology(), row(0, instance="new", epoch=1)) as new,
    ):
        change = next(client.watch(1, timeout=5))
        assert (change.kind, change.instance, change.previous) == ("replaced", "new", "old")
        eventually(lambda: bool(told))
        with pytest.raises(AgreementError, match=lost):
            old.check()
        assert told == [old.error]
        new.check()
        assert old.close() is False
        assert client.table().rows[0].instance == "new", "the old one withdrew only itself"


def test_a_follower_knows_the_rows_without_asking_and_tells_what_changes(serve: Serve) -> None:
    server = serve(lease=0.8)
    with client_of(server) as client, Lease(client, topology(), row(0)) as first, Follower(client) as follower:
        assert set(follower.rows) == {Coordinate(tp=0)}
        assert follower.poll() == []
        assert not follower.ready
        client.register(topology(), row(1, instance="a"))
        eventually(lambda: follower.ready)
        client.register(topology(), row(1, instance="b", epoch=1))
        eventually(lambda: len(follower.rows) == 1)
        seen = [(change.kind, change.instance, change.previous) for change in follower.poll()]
        assert seen == [("registered", "a", ""), ("replaced", "b", "a"), ("expired", "b", "")]
        assert follower.topology == topology()
        first.close()
        eventually(lambda: not follower.rows)
        assert [change.kind for change in follower.poll()] == ["withdrawn"]


def test_a_follower_takes_no_restart_of_the_registry_for_the_death_of_its_ranks(serve: Serve) -> None:
    server = serve(lease=2)
    stays, dies = row(0, instance="stays"), row(1, instance="dies")
    with client_of(server) as client:
        client.register(topology(), stays)
        client.register(topology(), dies)
        with Follower(client, wait=0.5) as follower:
            server.close()
            time.sleep(0.4)
            assert len(follower.rows) == 2, "a registry that is down takes nothing away"
            again = serve(lease=2, port=server.port)
            eventually(lambda: follower._server == again.service.server)
            assert len(follower.rows) == 2, "nor does one that has forgotten everything, until ranks could have come back"
            with Lease(client, topology(), stays):
                eventually(lambda: len(follower.rows) == 1)
                assert [(change.kind, change.instance) for change in follower.poll()] == [("expired", "dies")]
                client.register(topology(), row(1, instance="new"))
                eventually(lambda: follower.ready)
                assert [(change.kind, change.instance) for change in follower.poll()] == [("registered", "new")]


def test_changes_that_are_not_kept_any_more_are_said_to_be_lost(serve: Serve) -> None:
    with client_of(serve()) as client:
        assert client.changes(5).reset
        with pytest.raises(CommplaneError, match="has lost changes after 5: read the table again"):
            next(client.watch(5, timeout=5))


def test_rooms_find_their_data_parallel_rank(serve: Serve) -> None:
    with client_of(serve()) as client:
        client.register_dp_ranks([DpRank(room=(1 << 62) + room, dp=room % 3) for room in range(10)])
        found = client.query_dp_ranks([(1 << 62) + 4, 7])
        assert found == {(1 << 62) + 4: DpRank(room=(1 << 62) + 4, dp=1)}
        with pytest.raises(AgreementError, match="is served by dp rank 1, and claimed by dp rank 2"):
            client.register_dp_ranks([DpRank(room=(1 << 62) + 4, dp=2)])


def test_withdrawing_twice_is_no_error_and_says_so(serve: Serve) -> None:
    with client_of(serve()) as client:
        found = row(0)
        client.register(topology(), found)
        tenure = Tenure(key=found.key, instance=found.instance)
        assert client.withdraw(tenure) is True
        assert client.withdraw(tenure) is False


def test_groups_are_bounded_and_make_room_once_nobody_uses_them(serve: Serve) -> None:
    server = serve()
    with client_of(server) as client:
        rows = [row(0) for _ in range(64)]
        for number in range(200):
            client.of(f"empty{number}").table()
        for number, one in enumerate(rows):
            client.of(f"g{number}").register(topology(tp=1), one)
        with pytest.raises(CommplaneError, match="keeps 64 groups and all are in use, found one more, 'g64'"):
            client.of("g64").table(timeout=2)
        seen = client.of("g3").table().sequence
        assert client.of("g3").withdraw(Tenure(key=rows[3].key, instance=rows[3].instance))
        assert client.of("g64").table().rows == ()
        with pytest.raises(CommplaneError, match="found one more, 'g3'"), ThreadPoolExecutor(1) as pool:
            waits = pool.submit(client.of("g64").changes, seen + 1, wait=5)
            eventually(lambda: bool(server.service.group("g64").waiters))
            try:
                client.of("g3").table(timeout=2)  # g64 is empty, but somebody waits for it
            finally:
                client.of("g64").register(topology(tp=1), row(0))
                assert [change.kind for change in waits.result(10).changes] == ["registered"]


def test_whoever_followed_a_group_that_made_room_learns_that_it_has_missed_changes(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("commplane_disagg.registry.service.GROUPS", 1)
    server = serve()
    with client_of(server) as client:
        one, two = client.of("one"), client.of("two")
        first = row(0)
        with one, two:
            one.register(topology(), first)
            seen = one.table().sequence
            one.withdraw(Tenure(key=first.key, instance=first.instance))
            two.register(topology(), found := row(1))
            two.withdraw(Tenure(key=found.key, instance=found.instance))
            for _ in range(3):
                one.register(topology(), again := row(0))
                one.withdraw(Tenure(key=again.key, instance=again.instance))
            assert one.changes(seen).reset
            assert b'group="two"' not in server.service.page()


def test_4096_ranks_register_with_duplicates_and_retries_and_are_ready_once(serve: Serve) -> None:
    server = serve()
    grid = topology(dp=4, cp=2, tp=64, pp=8)
    rows = [row(key=key) for key in grid.places()]
    sent = [one for number, one in enumerate(rows[:-1]) for _ in range(1 + (number % 8 == 0))]
    with client_of(server, timeout=30) as client:
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(lambda one: client.register(grid, one), sent[::-1]):
                pass
        view = client.table()
        assert (len(sent), len(view.rows), view.ready, view.sequence) == (4607, 4095, False, 4095)
        client.register(grid, rows[-1])
        view = client.wait_ready(5)
        assert view.rows == tuple(rows)
        assert view.sequence == 4096


def test_closing_the_server_answers_who_waits_and_leaves_nothing_behind() -> None:
    before = set(os.listdir("/proc/self/fd"))
    server = RegistryServer(bind_listener("127.0.0.1"), token=TOKEN).start()
    client = client_of(server)
    lease = Lease(client, topology(), row(0))
    follower = Follower(client)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.changes, 1, wait=20)
        time.sleep(0.2)
        begun = time.monotonic()
        server.close()
        assert waiting.result(5).changes == ()
        assert time.monotonic() - begun < 5
    server.close()
    lease.close(timeout=0.3)
    follower.close()
    client.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("commplane-disagg")]
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 0


def test_a_lease_whose_registry_is_gone_says_so_once_and_goes_on(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(lease=0.3)
    with client_of(server, attempt=0.2) as client, Lease(client, topology(), row(0)) as lease:
        with caplog.at_level(logging.WARNING, "commplane_disagg"):
            server.close()
            eventually(lambda: lease.overdue > 0.3)
        lines = [
            record.getMessage() for record in caplog.records if "cannot renew its row, and goes on trying" in record.getMessage()
        ]
        assert len(lines) == 1
        lease.check()
        again: RegistryServer = serve(lease=0.3, port=server.port)
        eventually(lambda: lease.overdue == 0 and lease.server == again.service.server)


def test_a_server_on_a_socket_that_is_gone_fails_at_start() -> None:
    bound: BoundSocket = bind_listener("127.0.0.1")
    bound.close()
    with pytest.raises(CommplaneError, match="cannot serve"):
        RegistryServer(bound, token=TOKEN).start()


def test_a_server_whose_leases_would_not_end_any_more_ends_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    served = threading.Event()

    async def fails(_service: Service) -> None:
        while not served.is_set():
            await asyncio.sleep(0.01)
        raise ValueError("found by the test")

    monkeypatch.setattr(Service, "sweep", fails)
    server = RegistryServer(bind_listener("127.0.0.1"), token=TOKEN).start()
    assert server.alive
    served.set()
    eventually(lambda: not server.alive)
    with pytest.raises(PeerError), client_of(server, timeout=0.3) as client:
        client.table()
    server.close()
