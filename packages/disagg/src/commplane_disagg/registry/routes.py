"""HTTP in front of the service: who may ask, what is read, and how a refusal is said. Nothing a client sends makes a 5xx."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from aiohttp import web

import commplane_disagg
from commplane_disagg.registry.auth import Refused, Verifier
from commplane_disagg.registry.refusals import NotFound, Refusal
from commplane_disagg.registry.service import Group, Service
from commplane_disagg.wire import (
    JSON,
    MSGPACK,
    ROUTES,
    Coordinate,
    DpRanks,
    Problem,
    Registration,
    RoomQuery,
    Tenure,
    decode,
    encode,
)

__all__ = ["Routes"]

_BODY_SECONDS = 10.0
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
_OPEN = "/health"
_WAITS = ("/ready", "/changes")

_T = TypeVar("_T")
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Malformed(Refusal):
    """A request that cannot be read."""


class _Unsupported(Refusal):
    """A content type that is not read here."""

    status = 415


class Routes:
    """The application.

    Args:
        service: does the work.
        verifier: checks every request but ``GET /health``; None takes them from anybody.
        body_limit: bytes of one request.
    """

    def __init__(self, service: Service, verifier: Verifier | None, body_limit: int) -> None:
        self._service, self._verifier, self._body_limit = service, verifier, body_limit
        self.spoken: set[object] = set()  # connections that have sent a request; the server forgets closed ones
        self.application = web.Application(middlewares=[self._guard], client_max_size=body_limit)
        group = f"{ROUTES}/groups/{{group}}"
        self.application.add_routes(
            [
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
                web.put(f"{group}/rows", self._register),
                web.post(f"{group}/renewals", self._renew),
                web.post(f"{group}/withdrawals", self._withdraw),
                web.get(f"{group}/rows/{{dp}}/{{cp}}/{{tp}}/{{pp}}", self._row),
                web.get(f"{group}/table", self._table),
                web.get(f"{group}/ready", self._ready),
                web.get(f"{group}/changes", self._changes),
                web.post(f"{group}/rooms", self._rooms),
                web.post(f"{group}/rooms/query", self._query),
            ]
        )

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Read, check, answer: every request passes here, also one for a route that does not exist."""
        begun = time.perf_counter()
        self.spoken.add(request.protocol)
        response: web.StreamResponse
        nonce: str | None = None
        try:
            if (request.content_length or 0) > self._body_limit:
                raise web.HTTPRequestEntityTooLarge(self._body_limit, request.content_length or 0)
            body = await _read(request)
            nonce = self._check(request, body)
            response = await handler(request)
        except Refused as refused:
            self._service.metrics.refused(refused.reason)
            response = _say(request, 401, Problem(code="unauthorized", message=str(refused)))
            response.headers["WWW-Authenticate"] = "commplane-hmac"
        except Refusal as refusal:
            response = _say(request, refusal.status, refusal.problem)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            response = _say(request, 400, Problem(code="malformed", message=f"the body cannot be read: {error}"))
        except web.HTTPRequestEntityTooLarge:
            text = f"a request has at most {self._body_limit} bytes, found more: register fewer or smaller things at once"
            response = _say(request, 413, Problem(code="too_large", message=text))
            response.force_close()  # the rest of the body is not read
        except web.HTTPException as error:
            code = "not_found" if error.status == 404 else "malformed"
            response = _say(request, error.status, Problem(code=code, message=f"{request.method} {request.path}: {error.reason}"))
            response.headers.update({name: value for name, value in error.headers.items() if name == "Allow"})
        if nonce is not None and self._verifier is not None:
            sent = response.body if isinstance(response, web.Response) else None
            kind = response.headers.get("Content-Type", "")
            signature = self._verifier.answer(nonce, response.status, kind, sent if isinstance(sent, bytes) else b"")
            response.headers["Authentication-Info"] = signature
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "unknown"
        seconds = None if route.endswith(_WAITS) else time.perf_counter() - begun
        self._service.metrics.answered(route, response.status, seconds)
        return response

    def _check(self, request: web.Request, body: bytes) -> str | None:
        """The nonce of a signed request; None for one that needs no signature."""
        if self._verifier is None or (request.method == "GET" and request.path == _OPEN):
            return None
        header = request.headers.get("Authorization")
        if request.path == "/metrics" and request.method == "GET" and self._verifier.metrics(header):
            return None
        return self._verifier.check(header, request.method, request.raw_path, request.headers.get("Content-Type", ""), body)

    async def _health(self, request: web.Request) -> web.Response:
        body = {"status": "ok", "server": self._service.server, "version": commplane_disagg.__version__, "routes": ROUTES}
        return web.json_response(body)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._service.page(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _register(self, request: web.Request) -> web.Response:
        asked = await _parse(request, Registration)
        transport = request.transport
        peer = transport.get_extra_info("peername") if transport is not None else None
        return _give(request, self._service.register(self._group(request), asked, peer[0] if peer else None))

    async def _renew(self, request: web.Request) -> web.Response:
        tenure = await _parse(request, Tenure)
        return _give(request, self._service.renew(self._group(request), tenure))

    async def _withdraw(self, request: web.Request) -> web.Response:
        tenure = await _parse(request, Tenure)
        return _give(request, self._service.withdraw(self._group(request), tenure))

    async def _row(self, request: web.Request) -> web.Response:
        parts = [request.match_info[name] for name in ("dp", "cp", "tp", "pp")]
        if not all(re.fullmatch(r"[0-9]{1,5}", part) for part in parts):
            raise _Malformed(f"a row is named by four numbers, dp/cp/tp/pp, found {'/'.join(parts)}")
        return _give(request, self._service.row(self._group(request), Coordinate(*map(int, parts))))

    async def _table(self, request: web.Request) -> web.Response:
        kind = _answer_type(request)
        return _raw(self._group(request).view(self._service.server, kind), kind)

    async def _ready(self, request: web.Request) -> web.Response:
        return _give(request, await self._service.readiness(self._group(request), _seconds(request)))

    async def _changes(self, request: web.Request) -> web.Response:
        since = request.query.get("since", "0")
        if not re.fullmatch(r"[0-9]{1,15}", since):
            raise _Malformed(f"since wants the number of a change, found {since!r}")
        return _give(request, await self._service.changes(self._group(request), int(since), _seconds(request)))

    async def _rooms(self, request: web.Request) -> web.Response:
        asked = await _parse(request, DpRanks)
        self._group(request).rooms.register(asked.rooms)
        return _give(request, DpRanks(rooms=()))

    async def _query(self, request: web.Request) -> web.Response:
        asked = await _parse(request, RoomQuery)
        return _give(request, DpRanks(rooms=self._group(request).rooms.query(asked.rooms)))

    def _group(self, request: web.Request) -> Group:
        name = request.match_info["group"]
        if _GROUP.fullmatch(name) is None:
            raise NotFound(f"a group's name has letters, digits and . _ : -, at most 64 of them, found {name!r}")
        return self._service.group(name)


async def _read(request: web.Request) -> bytes:
    """The body, whole, within its limit of bytes and of time; aiohttp keeps it for the handler."""
    if not request.can_read_body or request.content.is_eof():
        return await request.read()
    try:
        return await asyncio.wait_for(request.read(), _BODY_SECONDS)
    except asyncio.TimeoutError:
        raise _Malformed(f"the body did not arrive within {_BODY_SECONDS:g} s") from None


async def _parse(request: web.Request, kind: type[_T]) -> _T:
    found = request.content_type
    if found not in (MSGPACK, JSON):
        raise _Unsupported(f"a body is {MSGPACK} or {JSON}, found {found}")
    return decode(kind, await request.read(), found)


def _seconds(request: web.Request) -> float:
    text = request.query.get("wait", "0")
    if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,6})?", text):
        raise _Malformed(f"wait wants seconds, found {text!r}")
    return float(text)


def _answer_type(request: web.Request) -> str:
    """What was asked for: msgpack by name, else JSON for a person with curl."""
    return MSGPACK if MSGPACK in request.headers.get("Accept", "") else JSON


def _raw(body: bytes, content_type: str, status: int = 200) -> web.Response:
    return web.Response(status=status, body=body, headers={"Content-Type": content_type})


def _give(request: web.Request, value: msgspec.Struct) -> web.Response:
    kind = _answer_type(request)
    return _raw(encode(value, kind), kind)


def _say(request: web.Request, status: int, problem: Problem) -> web.Response:
    kind = _answer_type(request)
    return _raw(encode(problem, kind), kind, status)
