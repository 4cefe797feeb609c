"""Whatever is sent, the registry answers 4xx or less, never 5xx, and goes on serving."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from disagg_rows import TOKEN, row, topology
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from commplane_disagg.port import bind_listener
from commplane_disagg.registry import RegistryClient, RegistryServer
from commplane_disagg.registry.auth import Signer
from commplane_disagg.wire import JSON, MSGPACK, EngineOffer, Registration

pytestmark = pytest.mark.timeout(90)

fuzzed = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

_PATHS = [
    "/rows",
    "/renewals",
    "/withdrawals",
    "/rooms",
    "/rooms/query",
    "/table",
    "/ready",
    "/changes",
    "/rows/0/0/0/0",
    "/x",
    "",
]


@pytest.fixture(scope="module")
def open_server() -> Iterator[RegistryServer]:
    with RegistryServer(bind_listener("127.0.0.1"), token=None, lease=600, body_limit=1 << 16) as server:
        yield server


@pytest.fixture(scope="module")
def locked_server() -> Iterator[RegistryServer]:
    with RegistryServer(bind_listener("127.0.0.1"), token=TOKEN, lease=600, body_limit=1 << 16) as server:
        yield server


def ask(server: RegistryServer, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.request(method, path, body or None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def serves(server: RegistryServer) -> bool:
    return ask(server, "GET", "/health", b"", {})[0] == 200


@fuzzed
@given(
    method=st.sampled_from(["GET", "PUT", "POST", "DELETE", "PATCH", "OPTIONS"]),
    path=st.sampled_from(_PATHS),
    content_type=st.sampled_from([JSON, MSGPACK, "", "text/plain", f"{JSON}; charset=utf-16"]),
    accept=st.sampled_from([JSON, MSGPACK, "", "*/*"]),
    body=st.binary(max_size=400),
)
def test_bytes_that_mean_nothing_are_refused(
    open_server: RegistryServer, method: str, path: str, content_type: str, accept: str, body: bytes
) -> None:
    headers = {"Content-Type": content_type, "Accept": accept}
    status, answer = ask(open_server, method, f"/v1/groups/fuzz{path}", body, headers)
    assert status < 500, answer


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([-1, 0, 1 << 16, 1 << 63, 1 << 64]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)
GOOD: dict[str, Any] = msgspec.to_builtins(
    Registration(topology=topology(extra={"a": "b"}), row=row(0, engines=(EngineOffer("tcp", b"x"),)))
)
DEPTHS = [
    *((field,) for field in GOOD),
    *(("topology", field) for field in GOOD["topology"]),
    *(("row", field) for field in GOOD["row"]),
    *(("row", "key", index) for index in range(4)),
    ("row", "engines", 0),
    ("row", "engines", 0, "metadata"),
    ("row", "extra", "new"),
]


def changed(place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(json.dumps(GOOD))
    inner: Any = body
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    return body


@fuzzed
@given(place=st.sampled_from(DEPTHS), value=json_values, path=st.sampled_from(_PATHS[:5]), packed=st.booleans())
def test_requests_that_are_almost_right_are_taken_or_refused(
    open_server: RegistryServer, place: tuple[Any, ...], value: Any, path: str, packed: bool
) -> None:
    body = changed(place, value)
    try:
        data = msgspec.msgpack.encode(body) if packed else json.dumps(body).encode()
    except (OverflowError, UnicodeEncodeError):  # integers and surrogates that msgpack does not have: JSON carries them
        packed, data = False, json.dumps(body).encode()
    method = "PUT" if path == "/rows" else "POST"
    status, answer = ask(open_server, method, f"/v1/groups/almost{path}", data, {"Content-Type": MSGPACK if packed else JSON})
    assert status < 500, answer
    if status >= 400:
        assert json.loads(answer)["message"]


@fuzzed
@given(st.text(max_size=40), st.text(alphabet="0123456789.-einf", max_size=8))
def test_names_and_numbers_in_the_path_are_taken_or_refused(open_server: RegistryServer, name: str, number: str) -> None:
    for path in (
        f"/v1/groups/{quote(name, safe='')}/nothing",
        f"/v1/groups/names/rows/0/0/{quote(name, safe='')}/{quote(number)}",
    ):
        assert ask(open_server, "GET", path, b"", {})[0] < 500
    for query in (f"changes?since={quote(number)}", f"ready?wait={quote(number)}x", f"changes?wait=-{quote(number)}"):
        assert ask(open_server, "GET", f"/v1/groups/names/{query}", b"", {})[0] < 500


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=300), st.booleans())
def test_bytes_that_are_not_http_close_their_own_connection_only(
    open_server: RegistryServer, data: bytes, after_head: bool
) -> None:
    with socket.create_connection(("127.0.0.1", open_server.port), timeout=20) as sock:
        head = b"PUT /v1/groups/raw/rows HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" if after_head else b""
        try:
            sock.sendall(head + data)
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := sock.recv(4096):
                answer += piece
        except ConnectionError:
            return
    assert not answer or int(answer.split(b" ")[1]) < 500, answer


def test_after_all_that_the_registry_serves_and_its_groups_hold_what_was_registered(open_server: RegistryServer) -> None:
    assert serves(open_server)
    with RegistryClient("127.0.0.1", open_server.port, token=None, group="after", timeout=10) as client:
        client.register(topology(tp=1), row(0))
        assert client.wait_ready(5).ready


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_above_the_limit_is_refused_and_the_rest_of_it_is_not_waited_for(
    open_server: RegistryServer, declared: bool
) -> None:
    with socket.create_connection(("127.0.0.1", open_server.port), timeout=20) as sock:
        head = b"PUT /v1/groups/big/rows HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        if declared:
            sock.sendall(head + b"Content-Length: 1000000000\r\n\r\n{")
        else:
            sock.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n20000\r\n" + b"x" * 0x20000 + b"\r\n")
        answer = b""
        while piece := sock.recv(4096):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 413"), answer
    assert b"a request has at most 65536 bytes" in answer
    assert serves(open_server)


@fuzzed
@given(header=st.text(max_size=60).filter(lambda text: text.isprintable() and text.isascii()), body=st.binary(max_size=100))
def test_without_the_token_nothing_gets_in_whatever_is_sent(locked_server: RegistryServer, header: str, body: bytes) -> None:
    for value in (header, f"commplane-hmac {header}", f"Bearer {header}"):
        headers = {"Authorization": value, "Content-Type": MSGPACK}
        assert ask(locked_server, "PUT", "/v1/groups/locked/rows", body, headers)[0] == 401
    assert locked_server.service.empty


@fuzzed
@given(st.binary(max_size=300), st.sampled_from([JSON, MSGPACK]))
def test_who_has_the_token_cannot_break_the_registry_either(locked_server: RegistryServer, body: bytes, kind: str) -> None:
    path = "/v1/groups/signed/rows"
    headers = {"Authorization": Signer(TOKEN).header("PUT", path, kind, body), "Content-Type": kind}
    assert 400 <= ask(locked_server, "PUT", path, body, headers)[0] < 500


def test_a_body_that_does_not_come_is_not_waited_for(open_server: RegistryServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("commplane_disagg.registry.routes._BODY_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", open_server.port), timeout=20) as sock:
        sock.sendall(
            b"PUT /v1/groups/slow/rows HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{"
        )
        answer = sock.recv(4096)
    assert answer.startswith(b"HTTP/1.1 400"), answer
    assert b"the body did not arrive within 0.3 s" in answer


@pytest.mark.parametrize("said", [b"", b"GET /health HTTP/1.1\r\nHost"])
def test_a_connection_that_says_nothing_or_half_a_head_is_closed(said: bytes) -> None:
    with RegistryServer(bind_listener("127.0.0.1"), token=None, lease=0.3, idle=0.3) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
            sock.sendall(said)
            assert sock.recv(4096) == b""
        assert serves(server)
