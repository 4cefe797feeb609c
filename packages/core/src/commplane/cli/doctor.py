"""``commplane doctor`` and ``commplane explain``: what runs here, what does not, and why. The same text on every rank."""

from __future__ import annotations

import argparse
import hashlib
import json
import warnings
from collections.abc import Callable
from typing import Any

from commplane.api import Collective, QuantFormat, ReduceOp
from commplane.cli.launch import add_ranks_option, in_ranks
from commplane.cli.parse import DTYPE_ALIASES, parse_size
from commplane.cli.plugins import plugin_report
from commplane.errors import AgreementError
from commplane.plugins import Kind
from commplane.runtime import Plane, init

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Define ``doctor`` and ``explain``."""
    doctor = commands.add_parser("doctor", help="plugins, facts, the plan of a group of all ranks, and every refusal")
    add_ranks_option(doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(call=lambda options: _report(options, _doctor))
    explain = commands.add_parser("explain", help="what would run for one call, what not, and why")
    explain.add_argument("collective", nargs="?", default="all_reduce", choices=[str(c) for c in Collective])
    explain.add_argument("--bytes", type=parse_size, default=8192, metavar="SIZE", help="such as 8192 or 8K (default 8192)")
    explain.add_argument("--dtype", default="float32", help="such as bfloat16 or bf16 (default float32)")
    ops = [str(v) for v in (*ReduceOp, *QuantFormat)]
    explain.add_argument("--op", choices=ops, help="reduction (default sum), or format of a quantised norm (default fp8_static)")
    explain.add_argument("--graph", action="store_true", help="for a call that is made while a graph is captured")
    add_ranks_option(explain)
    explain.add_argument("--json", action="store_true", help="print JSON")
    explain.set_defaults(call=lambda options: _report(options, _explain))


Report = tuple[dict[str, Any], str, int]


def _report(options: argparse.Namespace, make: Callable[[argparse.Namespace, Plane], Report]) -> int:
    """Make the report on every rank, check that all made the same, print it once."""
    code = in_ranks(options)
    if code is not None:
        return code
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every refusal is in the report, with its reason
        with init() as plane:
            data, text, code = make(options, plane)
            # What a broken plugin raised may hold an address or a path of the rank; all the rest must be equal.
            same = {k: v for k, v in data.items() if k != "plugins"}
            digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
            digests = plane.gather(digest, what="comparison of reports")
            if len(set(digests)) > 1:
                raise AgreementError(f"ranks made different reports: {dict(enumerate(digests))}; this is a bug of commplane")
            if plane.rank == 0:
                print(json.dumps(data, indent=2) if options.json else text, flush=True)
    return code


def _doctor(_options: argparse.Namespace, plane: Plane) -> Report:
    comm = plane.communicator("doctor")
    plugins = plugin_report(plane.plugins)
    facts = [plane.facts[r].to_json() for r in sorted(plane.facts)]
    data = {
        "world_size": plane.world_size,
        "rendezvous": plane.origin,
        "plugins": plugins,
        "config": plane.config.shared(),
        "config_digest": plane.config.digest,
        "facts": facts,
        "hosts": [list(h) for h in plane.facts.hosts(comm.ranks)],
        "plan": comm.plan.to_json() | {"digest": comm.plan.digest},
    }
    lines = [f"commplane {plugins['commplane']}, {plane.world_size} ranks, rendezvous: {plane.origin}", "plugins"]
    for p in plugins["plugins"]:
        lines.append(f"  {p['name']:<12} {p['dist']} {p['version']}: {', '.join(p['provides']) or 'nothing'}")
    for p in plugins["problems"]:
        lines.append(f"  {p['plugin']:<12} {p['kind']}: {p['title']}: {p['summary']}")
    lines.append("facts")
    lines.append(f"  shared memory: {plane.facts.describe_hosts(comm.ranks)}")
    for f in plane.facts.values():
        lines.append(
            f"  rank {f.rank}: {f.host} pid {f.pid}, {len(f.cores)} cores, memory {_gib(f.memory_limit)}, "
            f"/dev/shm free {_gib(f.shm_free)}, torch {f.torch}, python {f.python}, {f.machine}, "
            f"devices {', '.join(f.devices) or 'none'}"
        )
    changed = {k: v for k, v in plane.config.shared().items() if k in plane.config.sources}
    lines.append(f"settings {plane.config.digest}: " + (", ".join(f"{k}={v}" for k, v in changed.items()) or "all defaults"))
    lines.append(str(comm.plan))
    broken = any(p.kind is not Kind.DENIED for p in plane.plugins.problems)
    comm.close()
    return data, "\n".join(lines), 3 if broken else 0


def _gib(value: int | None) -> str:
    return "unknown" if value is None else f"{value / 2**30:.1f} GiB"


def _explain(options: argparse.Namespace, plane: Plane) -> Report:
    comm = plane.communicator("explain")
    dtype = DTYPE_ALIASES.get(options.dtype, options.dtype)
    op = options.op or str(Collective(options.collective).variants[0])
    answer = comm.plan.explain(options.collective, nbytes=options.bytes, dtype=dtype, op=op, graph=options.graph)
    comm.close()
    return answer.to_json(), str(answer), 0 if answer.chosen else 3
