"""Can this group communicate through shared memory? Local, no side effects but loading the native library."""

from __future__ import annotations

from commplane.api import Facts, ProbeRequest, Unusable, Usable, Verdict

__all__ = ["probe"]


def probe(request: ProbeRequest, facts: Facts) -> Verdict:
    """All ranks map the same shared memory, and the native library loads here."""
    if not facts.same_host(request.ranks):
        return Unusable(
            f"the group spans hosts, and shared memory does not ({facts.describe_hosts(request.ranks)}); "
            f"groups inside a host keep it"
        )
    try:
        from commplane_custom_ar import _native

        chosen = request.options["isa"]
        isa = _native.isa() if chosen == "auto" else chosen
        binding = _native.load(request.options["binding"]).binding
    except (ImportError, OSError) as error:
        return Unusable(f"the native library does not load: {error}")
    return Usable({"isa": isa, "binding": binding, "oversubscribed": facts.oversubscribed(request.ranks)})
