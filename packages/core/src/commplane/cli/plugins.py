"""``commplane plugins``: what is installed here, and what of it can be used."""

from __future__ import annotations

import argparse
import json
import warnings
from collections import Counter
from typing import Any

from commplane.api import BackendSpec, PageStoreSpec, SyncSpec, TransferSpec
from commplane.config import Config
from commplane.plugins import Kind, PluginHost, core_version

__all__ = ["add_commands", "plugin_report"]

_KINDS = {"backend": BackendSpec, "transfer engine": TransferSpec, "page store": PageStoreSpec, "cache sync": SyncSpec}


def add_commands(commands: Any) -> None:
    """Define ``plugins``."""
    parser = commands.add_parser("plugins", help="list installed plugins, what they provide and what is wrong with them")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="print tracebacks of plugins that failed to load")
    parser.set_defaults(call=_plugins)


def plugin_report(host: PluginHost) -> dict[str, Any]:
    """Plugins, what they provide, and problems, as JSON."""
    provided: dict[str, list[str]] = {}
    for word, kind in _KINDS.items():
        entries = host.every(kind)
        count = Counter(r.spec.name for r in entries)
        for r in entries:
            device = f" ({r.spec.device})" if isinstance(r.spec, BackendSpec) and count[r.spec.name] > 1 else ""
            provided.setdefault(r.plugin, []).append(f"{word} {r.spec.name}{device}")
    return {
        "commplane": core_version(),
        "plugins": [
            {"name": name, "dist": dist, "version": version, "provides": provided.get(name, [])}
            for name, (dist, version) in sorted(host.versions.items())
        ],
        "problems": [
            {
                "plugin": p.plugin,
                "title": p.title,
                "kind": p.kind.value,
                "summary": p.summary,
                "mismatches": [{"wanted": m.wanted, "found": m.found, "fix": m.fix} for m in p.mismatches],
                "traceback": p.traceback,
            }
            for p in host.problems
        ],
    }


def _plugins(options: argparse.Namespace) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is warned of elsewhere is the content of this report
        host = PluginHost.discover(Config.load())
    report = plugin_report(host)
    broken = any(p.kind is not Kind.DENIED for p in host.problems)
    if options.json:
        print(json.dumps(report, indent=2))
        return 3 if broken else 0
    print(f"commplane {report['commplane']}")
    for p in report["plugins"]:
        print(f"  {p['name']:<14} {p['dist']} {p['version']:<10} {', '.join(p['provides']) or 'provides nothing'}")
    for problem in host.problems:
        lines = problem.lines()
        print(f"  {problem.plugin:<14} {problem.kind.value}: {lines[0]}")
        for line in lines[1:]:
            print(f"    {line}")
        if options.verbose and problem.traceback:
            print("    " + problem.traceback.rstrip().replace("\n", "\n    "))
    return 3 if broken else 0
