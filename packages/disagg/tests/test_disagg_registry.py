"""Server and client in one process: registering, waiting, leases, changes, and what is refused."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from disagg_rows import TOKEN, row, topology

from commplane.errors import AgreementError, CommplaneError, ConfigError, PeerError
from commplane.testing import run_threads
from commplane_disagg.port import BoundSocket, bind_listener
from commplane_disagg.registry import Follower, Lease, RegistryClient, RegistryServer, join, metrics_token
from commplane_disagg.registry.auth import Signer
from commplane_disagg.wire import JSON, Coordinate, DpRank, EngineOffer, TableView, Tenure, decode

pytestmark = pytest.mark.timeout(60)

_Serve = Callable[..., RegistryServer]


@pytest.fixture
def serve() -> Iterator[_Serve]:
    servers = []

    def start(host: str = "127.0.0.1", *, token: bytes | None = TOKEN, lease: float = 30.0, port: int = 0, **options: Any) -> Any:
        servers.append(RegistryServer(bind_listener(host, port), token=token, lease=lease, **options).start())
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def client_of(server: RegistryServer, **options: Any) -> RegistryClient:
    return RegistryClient(server.bound.host, server.port, **{"token": TOKEN, "timeout": 10.0, **options})


def eventually(what: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def test_ranks_register_and_every_one_of_them_reads_the_whole_table(serve: _Serve) -> None:
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


def test_waiting_for_a_group_names_who_is_missing(serve: _Serve) -> None:
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


def test_who_waits_is_told_when_the_last_rank_comes(serve: _Serve) -> None:
    with client_of(serve()) as client, ThreadPoolExecutor(1) as pool:
        client.register(topology(), row(0))
        waiting = pool.submit(client.wait_ready, 20)
        time.sleep(0.2)
        assert not waiting.done()
        client.register(topology(), row(1))
        assert waiting.result(5).ready


def test_groups_do_not_see_each_other(serve: _Serve) -> None:
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


def test_another_topology_is_an_agreement_error_with_the_difference_at_once(serve: _Serve) -> None:
    with client_of(serve()) as client:
        client.register(topology(), row(0))
        begun = time.monotonic()
        with pytest.raises(
            AgreementError, match=r"rank dp0/cp0/tp1/pp0 of group 'prefill' cannot register: .*page_size 16 != 64"
        ):
            client.register(topology(page_size=64), row(1))
        assert time.monotonic() - begun < 5, "trying again would change nothing"


def test_a_lease_keeps_its_row_and_an_ended_one_is_told(serve: _Serve) -> None:
    server = serve(lease=0.6)
    with client_of(server) as client:
        kept, lost = row(0), row(1)
        with Lease(client, topology(), kept) as lease:
            client.register(topology(), lost)
            kinds = [change.kind for change in client.watch(2, timeout=1.5)]
            assert kinds == ["expired"]
            assert client.table().rows == (kept,)
            lease.check()
            assert lease.registrations == 1
            assert lease.overdue == 0
        assert [change.kind for change in client.changes(3).changes] == ["withdrawn"]
        assert lease.close() is False, "once is enough"


def test_two_instances_of_one_rank_cannot_both_be_there(serve: _Serve) -> None:
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


def test_an_instance_that_is_replaced_is_told_and_so_are_its_peers(serve: _Serve) -> None:
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


def test_a_follower_knows_the_rows_without_asking_and_tells_what_changes(serve: _Serve) -> None:
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


def test_a_follower_takes_no_restart_of_the_registry_for_the_death_of_its_ranks(serve: _Serve) -> None:
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


def test_changes_that_are_not_kept_any_more_are_said_to_be_lost(serve: _Serve) -> None:
    with client_of(serve()) as client:
        assert client.changes(5).reset
        with pytest.raises(CommplaneError, match="has lost changes after 5: read the table again"):
            next(client.watch(5, timeout=5))


def test_rooms_find_their_data_parallel_rank(serve: _Serve) -> None:
    with client_of(serve()) as client:
        client.register_dp_ranks([DpRank(room=(1 << 62) + room, dp=room % 3) for room in range(10)])
        found = client.query_dp_ranks([(1 << 62) + 4, 7])
        assert found == {(1 << 62) + 4: DpRank(room=(1 << 62) + 4, dp=1)}
        with pytest.raises(AgreementError, match="is served by dp rank 1, and claimed by dp rank 2"):
            client.register_dp_ranks([DpRank(room=(1 << 62) + 4, dp=2)])


def test_withdrawing_twice_is_no_error_and_says_so(serve: _Serve) -> None:
    with client_of(serve()) as client:
        found = row(0)
        client.register(topology(), found)
        tenure = Tenure(key=found.key, instance=found.instance)
        assert client.withdraw(tenure) is True
        assert client.withdraw(tenure) is False


def test_a_wildcard_is_refused_and_rewritten_only_on_request(serve: _Serve) -> None:
    with client_of(serve()) as client:
        with pytest.raises(ConfigError, match=r"rank dp0/cp0/tp0/pp0 .* found '0.0.0.0': that is a wildcard"):
            client.register(topology(), row(0, host="0.0.0.0"))
        found = row(0, host="0.0.0.0")
        assert client.register(topology(), found, peer_address=True).host == "127.0.0.1"
        assert client.register(topology(), found, peer_address=True).host == "127.0.0.1", "again, it is the same row"
        assert client.table().rows[0].host == "127.0.0.1"


@pytest.mark.parametrize(("bound", "asked"), [("::1", "::1"), ("::", "::1"), ("::", "127.0.0.1")])
def test_ipv6_works_like_ipv4(serve: _Serve, bound: str, asked: str) -> None:
    server = serve(bound)
    with RegistryClient(asked, server.port, token=TOKEN, timeout=5) as client:
        client.register(topology(tp=1), row(0, host="::"), peer_address=True)
        assert client.wait_ready(5).rows[0].host == asked
        assert client.address == (f"[{asked}]:{server.port}" if ":" in asked else f"{asked}:{server.port}")


def http(server: RegistryServer, path: str, **options: Any) -> tuple[int, bytes, dict[str, str]]:
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", **options)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def test_only_health_is_open_and_the_metrics_have_a_token_of_their_own(serve: _Serve) -> None:
    server = serve()
    status, body, _ = http(server, "/health")
    assert (status, json.loads(body)["status"]) == (200, "ok")
    for path in ("/metrics", "/v1/groups/prefill/table", "/v1/groups/prefill/ready", "/nothing", "/health/"):
        status, body, headers = http(server, path)
        assert (status, json.loads(body)["code"], headers["WWW-Authenticate"]) == (401, "unauthorized", "commplane-hmac"), path
    status, _, _ = http(server, "/health", method="POST", data=b"{}")
    assert status == 401
    bearer = {"Authorization": f"Bearer {metrics_token(TOKEN)}"}
    assert http(server, "/v1/groups/prefill/table", headers=bearer)[0] == 401
    with client_of(server) as client:
        client.register(topology(), row(0))
    status, body, _ = http(server, "/metrics", headers=bearer)
    assert status == 200
    page = body.decode()
    assert 'commplane_disagg_requests_total{route="/v1/groups/{group}/rows",status="200"} 1.0' in page
    assert 'commplane_disagg_rows{group="prefill"} 1.0' in page
    assert 'commplane_disagg_grid{group="prefill"} 2.0' in page
    assert 'commplane_disagg_ready{group="prefill"} 0.0' in page
    assert 'commplane_disagg_changes_total{group="prefill",kind="registered"} 1.0' in page
    assert 'commplane_disagg_unauthenticated_total{reason="missing"} 6.0' in page
    assert 'reason="malformed"} 1.0' in page


def test_another_token_is_refused_at_once_and_says_so(serve: _Serve) -> None:
    server = serve()
    with client_of(server, token=b"another token of tests") as client:
        begun = time.monotonic()
        with pytest.raises(ConfigError, match="the request was signed with another token"):
            client.register(topology(), row(0))
        assert time.monotonic() - begun < 5
    with client_of(server, token=None) as client, pytest.raises(ConfigError, match="wants an Authorization header"):
        client.table()


def test_a_recorded_request_cannot_be_sent_again(serve: _Serve) -> None:
    server, path = serve(), "/v1/groups/prefill/table"
    header = {"Authorization": Signer(TOKEN).header("GET", path, "", b"")}
    assert http(server, path, headers=header)[0] == 200
    status, body, _ = http(server, path, headers=header)
    assert (status, json.loads(body)["message"]) == (401, "the request was sent before: each try wants a nonce of its own")


def test_who_takes_over_the_port_cannot_make_up_rows(serve: _Serve) -> None:
    impostor = serve(token=None)
    with client_of(impostor, token=None) as anybody:
        anybody.register(topology(tp=1), row(0))
    with client_of(impostor, timeout=0.5) as client:
        calls: list[Callable[[], Any]] = [
            client.table,
            lambda: client.register(topology(), row(1)),
            lambda: client.lookup(Coordinate(tp=9)),
        ]
        for call in calls:
            with pytest.raises(PeerError, match="an answer that was not made with the shared token"):
                call()


def test_without_authentication_a_person_with_curl_is_served_in_json(serve: _Serve) -> None:
    server = serve(token=None)
    with client_of(server, token=None) as client:
        client.register(topology(), row(0, engines=(EngineOffer("tcp", b"\x00\xff"),)))
    status, body, headers = http(server, "/v1/groups/prefill/table")
    assert (status, headers["Content-Type"]) == (200, JSON)
    assert decode(TableView, body, JSON).rows[0].engines[0].metadata == b"\x00\xff"
    status, body, _ = http(server, "/v1/groups/prefill/rows/0/0/1/0")
    assert (status, json.loads(body)["code"]) == (404, "unknown_row")


@pytest.mark.parametrize(
    ("path", "options", "status"),
    [
        ("/v1/groups/prefill/rows", {"method": "PUT", "data": b"{", "headers": {"Content-Type": JSON}}, 400),
        ("/v1/groups/prefill/rows", {"method": "PUT", "data": b"{}", "headers": {"Content-Type": "text/plain"}}, 415),
        ("/v1/groups/prefill/rows", {"method": "PUT", "data": b"x" * 2000, "headers": {"Content-Type": JSON}}, 413),
        ("/v1/groups/prefill/rows", {"method": "POST", "data": b"{}"}, 405),
        ("/v1/groups/prefill/changes?since=-1", {}, 400),
        ("/v1/groups/prefill/changes?since=1e3", {}, 400),
        ("/v1/groups/prefill/ready?wait=inf", {}, 400),
        ("/v1/groups/prefill/rows/0/0/x/0", {}, 400),
        ("/v1/groups/-/table", {}, 404),
        ("/v2/groups/prefill/table", {}, 404),
        ("/", {}, 404),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_reason(serve: _Serve, path: str, options: dict[str, Any], status: int) -> None:
    server = serve(token=None, body_limit=1000)
    found, body, _ = http(server, path, **options)
    assert found == status
    assert json.loads(body)["message"]
    assert http(server, "/health")[0] == 200


def test_groups_are_bounded(serve: _Serve) -> None:
    server = serve()
    with client_of(server) as client:
        for number in range(64):
            client.of(f"g{number}").table()
        with pytest.raises(CommplaneError, match="keeps 64 groups, found one more, 'g64'"):
            client.of("g64").table(timeout=2)
        client.of("g3").table()


def test_4096_ranks_register_with_duplicates_and_retries_and_are_ready_once(serve: _Serve) -> None:
    server = serve()
    grid = topology(dp=4, cp=2, tp=64, pp=8)
    rows = [row(key=key) for key in grid.places()]
    sent = [one for number, one in enumerate(rows[:-1]) for _ in range(1 + (number % 4 == 0))]
    with client_of(server, timeout=30) as client:
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(lambda one: client.register(grid, one), sent[::-1]):
                pass
        view = client.table()
        assert (len(sent), len(view.rows), view.ready, view.sequence) == (5119, 4095, False, 4095)
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


def test_a_lease_whose_registry_is_gone_says_so_once_and_goes_on(serve: _Serve, caplog: pytest.LogCaptureFixture) -> None:
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
