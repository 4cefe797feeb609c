"""Hosts in rows: what a peer on another machine could not reach is refused, or rewritten where the rank asked for it."""

from __future__ import annotations

import ipaddress
import re

from commplane_disagg.registry.refusals import BadAddress

__all__ = ["is_wildcard", "reachable_host", "url_host"]

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,254}}$){_LABEL}(?:\.{_LABEL})*\.?")
"""Of labels of 1 to 63 characters: who asks the resolver for any other gets a UnicodeError, on each peer that reads the row."""
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def reachable_host(host: str, peer: str | None, rewrite: bool) -> str:
    """The host that a row is stored with.

    Args:
        host: as the rank gave it.
        peer: the address that its request came from, if it is known.
        rewrite: put `peer` in the place of a wildcard, and of a loopback address that the rank did not come from.

    Raises:
        BadAddress: it is a wildcard, a multicast or link-local address, no address at all, or loopback of another machine.
    """
    caller = _parse(peer.partition("%")[0]) if peer else None
    address = _parse(host)
    problem = _problem(host, address, caller)
    if problem is None:
        return str(address) if address is not None else host
    if rewrite and caller is not None and (is_wildcard(host) or (address is not None and address.is_loopback)):
        return str(caller)
    hint = "" if rewrite else ", or ask for the address that the request came from (peer_address)"
    raise BadAddress(f"a row wants an address that peers reach, found {host!r}: {problem}; give this machine's own{hint}")


def is_wildcard(host: str) -> bool:
    """Whether `host` means every address of a machine: right to bind, wrong to tell anybody."""
    address = _parse(host)
    return host in ("", "*") or (address is not None and address.is_unspecified)


def url_host(host: str) -> str:
    """`host` as it stands in a URL or beside a port: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def _problem(host: str, address: _Address | None, caller: _Address | None) -> str | None:
    if is_wildcard(host):
        return "that is a wildcard"
    if address is None:
        if _NAME.fullmatch(host) is None or re.fullmatch(r"[0-9.]+", host):
            return "that is neither an address nor a host name"
        if host.rstrip(".").lower() == "localhost" and caller is not None and not caller.is_loopback:
            return f"the rank registered from {caller}, where localhost is another machine than for its peers"
        return None
    if address.is_multicast or (isinstance(address, ipaddress.IPv4Address) and str(address) == "255.255.255.255"):
        return "that is not one machine's address"
    if address.is_link_local:
        return "a link-local address means another machine on each link"
    if address.is_loopback and caller is not None and not caller.is_loopback:
        return f"the rank registered from {caller}, and loopback is another machine for its peers"
    return None


def _parse(host: str) -> _Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)  # a dual-stack socket shows IPv4 peers as ::ffff:a.b.c.d
    return mapped if mapped is not None else address
