"""Ask each backend whether it can serve a group. Local: nothing here communicates."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from commplane.agree.bounded import call_bounded
from commplane.agree.build import setback
from commplane.agree.clock import REAL, Clock
from commplane.api import BackendSpec, Deadline, Facts, ProbeRequest, Unusable, Usable, Verdict
from commplane.plugins import Registered
from commplane.select import static_refusal

__all__ = ["own_options", "probe_all"]


def own_options(spec: BackendSpec, options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What `spec` declares of the resolved settings of its name, which backends for other devices may share. Pure."""
    given = options.get(spec.name, {})
    return {name: given.get(name, default) for name, default in spec.options.items()}


def probe_all(
    backends: Mapping[str, Registered],
    request: ProbeRequest,
    options: Mapping[str, Mapping[str, Any]],
    facts: Facts,
    timeout: float,
    clock: Clock = REAL,
) -> dict[str, dict[str, Any]]:
    """The verdict of each backend, as JSON, with its spec and where it came from. Local; all of it within `timeout`."""
    out = {}
    deadline = Deadline(timeout, clock.now)
    for name, registered in backends.items():
        spec = registered.spec
        assert isinstance(spec, BackendSpec)
        own = ProbeRequest(request.key, request.rank, own_options(spec, options))
        verdict = _probe(spec, own, facts, max(deadline.remaining(), 0.01), clock)
        out[name] = {
            "spec": spec.to_json(),
            "dist": f"{registered.dist or registered.plugin} {registered.version}",
            "usable": isinstance(verdict, Usable),
            "reason": verdict.reason if isinstance(verdict, Unusable) else "",
            "facts": {key: str(value) for key, value in verdict.facts.items()} if isinstance(verdict, Usable) else {},
        }
    return out


def _probe(spec: BackendSpec, request: ProbeRequest, facts: Facts, timeout: float, clock: Clock) -> Verdict:
    refusal = static_refusal(spec, request.key)
    if refusal is not None:
        return Unusable(refusal)

    def call() -> Verdict:
        module, _, attribute = spec.probe.partition(":")
        verdict = getattr(importlib.import_module(module), attribute)(request, facts)
        if not isinstance(verdict, (Usable, Unusable)):
            raise TypeError(f"probe {spec.probe!r} must answer Usable or Unusable, found {verdict!r}")
        return verdict

    try:
        return call_bounded(call, timeout, "probe", clock=clock)
    except Exception as error:  # a probe that fails is a verdict, and a vote of the whole group
        return Unusable(f"probe failed: {setback(error).text}")
