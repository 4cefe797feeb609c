"""The shared token: who knows it may register, read and speak on a channel; it never travels.

A request carries ``Authorization: commplane-hmac TIME:NONCE:MAC`` with a MAC over method, path with query, content type, body,
time and nonce. The server takes each nonce once, and only while the time lies within its window; so a recorded request cannot be
sent again to the same server. After a restart the server has forgotten the nonces of the last `WINDOW` seconds: what could be
replayed then is a registration that was true shortly before, and its lease ends by itself. Answers carry a MAC over status,
content type, body and the request's nonce, so whoever takes over the registry's port, or stands in between, cannot make up rows.
Nothing is encrypted: the token keeps strangers out, it hides nothing. Peers on a channel prove the token to each other with
`challenge` and `answer`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from commplane.errors import ConfigError

__all__ = [
    "ENVIRONMENT",
    "SCHEME",
    "WINDOW",
    "Refused",
    "Signer",
    "Verifier",
    "answer",
    "challenge",
    "metrics_token",
    "read_token",
]

ENVIRONMENT = "COMMPLANE_DISAGG_TOKEN"
SCHEME = "commplane-hmac"
WINDOW = 30.0
"""Seconds by which the clocks of the two machines may differ, the time on the way included."""

_SHORTEST = 16


def read_token(path: str | Path | None = None) -> bytes:
    """The shared token: of a file, else of the environment variable `ENVIRONMENT`. White space around it does not count.

    Raises:
        ConfigError: there is none, it has less than 16 bytes, or others may read the file.
    """
    if path is not None:
        where = f"the token file {path}"
        try:
            mode, token = Path(path).stat().st_mode, Path(path).read_bytes().strip()
        except OSError as error:
            raise ConfigError(f"{where} cannot be read: {error.strerror or error}") from error
        if stat.S_ISREG(mode) and mode & 0o007:
            raise ConfigError(f"{where} can be read by everybody (mode {mode & 0o777:04o}): chmod 600 it")
    else:
        where, token = ENVIRONMENT, os.environ.get(ENVIRONMENT, "").strip().encode()
        if not token:
            raise ConfigError(
                f"the registry wants a shared token, found none: set {ENVIRONMENT} to the same text on all ranks, name a token "
                "file, or switch authentication off explicitly"
            )
    if len(token) < _SHORTEST:
        raise ConfigError(
            f"{where} wants a token of at least {_SHORTEST} bytes, found {len(token)}: "
            "python -c 'import secrets; print(secrets.token_urlsafe())' makes one"
        )
    return token


def metrics_token(token: bytes) -> str:
    """The bearer token with which a scraper reads ``/metrics``. It is derived from the shared one and opens nothing else."""
    return hmac.new(token, b"commplane-disagg metrics", hashlib.sha256).hexdigest()


def challenge() -> bytes:
    """Random bytes for a peer to `answer`."""
    return secrets.token_bytes(32)


def answer(token: bytes, asked: bytes, speaker: str) -> bytes:
    """The proof that `speaker` knows the token. Compare with `hmac.compare_digest`.

    Args:
        token: the shared one.
        asked: what both ends drew with `challenge`, one after the other, so that neither alone decides what is signed.
        speaker: the answering side's role, such as ``"decode"``; it stops an answer from being sent back as one's own.
    """
    return hmac.new(token, b"commplane-disagg channel\0" + speaker.encode() + b"\0" + asked, hashlib.sha256).digest()


def _mac(token: bytes, method: str, path: str, content_type: str, body: bytes, moment: str, nonce: str) -> str:
    head = "\n".join((method, path, content_type, moment, nonce, ""))
    return hmac.new(token, head.encode() + hashlib.sha256(body).digest(), hashlib.sha256).hexdigest()


def _answer_mac(token: bytes, nonce: str, status: int, content_type: str, body: bytes) -> str:
    head = f"answer\n{nonce}\n{status}\n{content_type}\n".encode()
    return hmac.new(token, head + hashlib.sha256(body).digest(), hashlib.sha256).hexdigest()


class Signer:
    """Makes the header of one request, and checks the answer's. Thread-safe."""

    def __init__(self, token: bytes, now: Callable[[], float] = time.time) -> None:
        self._token, self._now = token, now

    def header(self, method: str, path: str, content_type: str, body: bytes) -> str:
        """The value of ``Authorization``, good for one try: each one needs its own."""
        moment, nonce = f"{self._now():.3f}", secrets.token_hex(16)
        return f"{SCHEME} {moment}:{nonce}:{_mac(self._token, method, path, content_type, body, moment, nonce)}"

    def authentic(self, header: str, answer: str | None, status: int, content_type: str, body: bytes) -> bool:
        """Whether `answer`, the value of ``Authentication-Info``, was made with the token for the request of `header`."""
        nonce = header.rpartition(" ")[2].split(":")[1]
        wanted = f"{SCHEME} {_answer_mac(self._token, nonce, status, content_type, body)}"
        return answer is not None and hmac.compare_digest(answer.encode("utf-8", "replace"), wanted.encode())


class Refused(Exception):
    """A request is not authentic; `reason` is a word for the metrics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Verifier:
    """Checks headers, and takes each nonce once. One thread calls it."""

    def __init__(self, token: bytes, now: Callable[[], float] = time.time, window: float = WINDOW) -> None:
        self._token, self._now, self._window = token, now, window
        self._seen: set[str] = set()
        self._order: deque[tuple[float, str]] = deque()
        self._metrics = f"Bearer {metrics_token(token)}".encode()

    def metrics(self, header: str | None) -> bool:
        """Whether `header` is the scraper's."""
        return header is not None and hmac.compare_digest(header.encode("utf-8", "replace"), self._metrics)

    def check(self, header: str | None, method: str, path: str, content_type: str, body: bytes) -> str:
        """The nonce of the request, if it is authentic and new.

        Raises:
            Refused: it is not.
        """
        if header is None:
            raise Refused("missing", f"{method} {path} wants an Authorization header made with the shared token, found none")
        scheme, _, rest = header.partition(" ")
        moment, _, tail = rest.partition(":")
        nonce, _, mac = tail.partition(":")
        if scheme != SCHEME or not (8 <= len(nonce) <= 64 and nonce.isalnum() and len(moment) <= 24 and moment.isascii()):
            raise Refused("malformed", f"the Authorization header wants '{SCHEME} TIME:NONCE:MAC', found another form")
        wanted = _mac(self._token, method, path, content_type, body, moment, nonce)
        if not hmac.compare_digest(wanted.encode(), mac.encode("utf-8", "replace")):
            raise Refused("mac", "the request was signed with another token, or changed on its way")
        try:
            away = self._now() - float(moment)
        except ValueError:
            raise Refused("malformed", f"the time of the Authorization header wants seconds, found {moment!r}") from None
        if not abs(away) <= self._window:  # also refuses nan
            raise Refused(
                "time",
                f"the request's clock is {away:.1f} s behind the server's, at most {self._window:g} s either way are allowed",
            )
        self._once(nonce, float(moment))
        return nonce

    def answer(self, nonce: str, status: int, content_type: str, body: bytes) -> str:
        """The value of ``Authentication-Info`` for the answer to the request of `nonce`."""
        return f"{SCHEME} {_answer_mac(self._token, nonce, status, content_type, body)}"

    def _once(self, nonce: str, moment: float) -> None:
        now = self._now()
        while self._order and self._order[0][0] < now:
            self._seen.discard(self._order.popleft()[1])
        if nonce in self._seen:
            raise Refused("replay", "the request was sent before: each try wants a nonce of its own")
        self._seen.add(nonce)
        # A nonce may be forgotten when its request is too old to be taken; one queued behind a later one just stays longer.
        self._order.append((moment + self._window, nonce))
