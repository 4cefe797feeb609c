"""What is in this repository: packages, read from their own pyproject.toml, and the dependency groups of the root.

python tools/workspace.py group NAME    prints the requirements of a dependency group, one a line
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:  # before anything is installed: pip brings a reader along
    from pip._vendor import tomli as tomllib

__all__ = ["ROOT", "Package", "group", "packages"]

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Package:
    """One folder under packages/.

    Attributes:
        folder: where it is.
        dist: name of the distribution.
        version: its version.
        plugins: names of its entry points for commplane; empty for core, and for adapters, which are plugins of their engine.
        module: its import name.
    """

    folder: Path
    dist: str
    version: str
    plugins: tuple[str, ...]
    module: str


def _read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def packages() -> list[Package]:
    """All packages, core first."""
    found = []
    for path in sorted((ROOT / "packages").glob("*/pyproject.toml")):
        project = _read(path)["project"]
        plugins = project.get("entry-points", {}).get("commplane.plugins", {})
        module = next(p.parent.name for p in sorted((path.parent / "src").glob("*/__init__.py")))
        found.append(Package(path.parent, project["name"], project["version"], tuple(plugins), module))
    return sorted(found, key=lambda p: (p.dist != "commplane", p.dist))


def group(name: str) -> list[str]:
    """Requirements of a dependency group of the root pyproject.toml, included groups resolved."""
    groups = _read(ROOT / "pyproject.toml")["dependency-groups"]
    out: list[str] = []
    for entry in groups[name]:
        out.extend(group(entry["include-group"]) if isinstance(entry, dict) else [entry])
    return list(dict.fromkeys(out))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "group":
        sys.exit(__doc__)
    print("\n".join(group(sys.argv[2])))
