"""How two ends show each other that they know the shared token, without sending it.

Each proof covers both nonces, who says it and its identity, so it fits neither another connection nor the other direction. What
is said afterwards is neither encrypted nor signed: the token keeps strangers from connecting, a network that others can change
needs a tunnel.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

__all__ = ["nonce", "prove", "proves"]


def nonce() -> bytes:
    """A number that was never used before."""
    return secrets.token_bytes(32)


def prove(token: bytes | None, role: str, acceptor: bytes, dialer: bytes, identity: bytes) -> bytes:
    """The proof of who speaks as `role`; empty without a token."""
    if token is None:
        return b""
    key = hashlib.sha256(b"commplane-disagg channel\0" + token).digest()
    parts = [role.encode(), acceptor, dialer, identity]
    return hmac.digest(key, b"".join(len(p).to_bytes(4, "big") + p for p in parts), "sha256")


def proves(proof: bytes, token: bytes | None, role: str, acceptor: bytes, dialer: bytes, identity: bytes) -> bool:
    """Whether a proof is right; everything is where there is no token."""
    return token is None or hmac.compare_digest(proof, prove(token, role, acceptor, dialer, identity))
