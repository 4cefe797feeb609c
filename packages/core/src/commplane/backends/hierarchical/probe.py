"""Has this group two levels? Local, from facts alone: no torch."""

from __future__ import annotations

import importlib.util

from commplane.api import Facts, ProbeRequest, Unusable, Usable, Verdict
from commplane.backends.hierarchical.shape import describe

__all__ = ["probe"]


def probe(request: ProbeRequest, facts: Facts) -> Verdict:
    """More than one host, and more than one rank on some of them."""
    hosts = facts.hosts(request.ranks)
    if len(hosts) == 1:
        return Unusable("the group is inside one host, which has one level")
    if len(hosts) == request.world_size:
        return Unusable(f"no host has more than one rank of the group ({describe(hosts)})")
    if importlib.util.find_spec("torch") is None:
        return Unusable("torch is not installed: pip install commplane[torch]")
    return Usable({"hosts": describe(hosts)})
