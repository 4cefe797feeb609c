"""The registry's routes: who may ask, addresses in rows, and what is refused."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from disagg_rows import TOKEN, Serve, client_of, row, serving, topology

from commplane.errors import ConfigError, PeerError
from commplane_disagg.registry import RegistryClient, RegistryServer, metrics_token
from commplane_disagg.registry.auth import Signer
from commplane_disagg.wire import JSON, Coordinate, EngineOffer, TableView, decode

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def serve() -> Iterator[Serve]:
    with serving() as start:
        yield start


def test_a_wildcard_is_refused_and_rewritten_only_on_request(serve: Serve) -> None:
    with client_of(serve()) as client:
        with pytest.raises(ConfigError, match=r"rank dp0/cp0/tp0/pp0 .* found '0.0.0.0': that is a wildcard"):
            client.register(topology(), row(0, host="0.0.0.0"))
        found = row(0, host="0.0.0.0")
        assert client.register(topology(), found, peer_address=True).host == "127.0.0.1"
        assert client.register(topology(), found, peer_address=True).host == "127.0.0.1", "again, it is the same row"
        assert client.table().rows[0].host == "127.0.0.1"


@pytest.mark.parametrize(("bound", "asked"), [("::1", "::1"), ("::", "::1"), ("::", "127.0.0.1")])
def test_ipv6_works_like_ipv4(serve: Serve, bound: str, asked: str) -> None:
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


def test_only_health_is_open_and_the_metrics_have_a_token_of_their_own(serve: Serve) -> None:
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


def test_another_token_is_refused_at_once_and_says_so(serve: Serve) -> None:
    server = serve()
    with client_of(server, token=b"another token of tests") as client:
        begun = time.monotonic()
        with pytest.raises(ConfigError, match="the request was signed with another token"):
            client.register(topology(), row(0))
        assert time.monotonic() - begun < 5
    with client_of(server, token=None) as client, pytest.raises(ConfigError, match="wants an Authorization header"):
        client.table()


def test_a_recorded_request_cannot_be_sent_again(serve: Serve) -> None:
    server, path = serve(), "/v1/groups/prefill/table"
    header = {"Authorization": Signer(TOKEN).header("GET", path, "", b"")}
    assert http(server, path, headers=header)[0] == 200
    status, body, _ = http(server, path, headers=header)
    assert (status, json.loads(body)["message"]) == (401, "the request was sent before: each try wants a nonce of its own")


def test_who_takes_over_the_port_cannot_make_up_rows(serve: Serve) -> None:
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


def test_without_authentication_a_person_with_curl_is_served_in_json(serve: Serve) -> None:
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
def test_what_cannot_be_read_is_refused_with_its_reason(serve: Serve, path: str, options: dict[str, Any], status: int) -> None:
    server = serve(token=None, body_limit=1000)
    found, body, _ = http(server, path, **options)
    assert found == status
    assert json.loads(body)["message"]
    assert http(server, "/health")[0] == 200
