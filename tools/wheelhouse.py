"""Build the wheels of the packages into a folder, once each.

python tools/wheelhouse.py FOLDER [DIST ...]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from workspace import Package, packages

__all__ = ["build_wheel", "build_wheels"]


def build_wheel(package: Package, folder: Path, python: str = sys.executable) -> Path:
    """Build one wheel into `folder`, replacing an older one of the same distribution; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = [python, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", scratch, str(package.folder)]
        subprocess.run(command, check=True)
        (built,) = Path(scratch).glob("*.whl")
        for old in folder.glob(f"{package.dist.replace('-', '_')}-[0-9]*.whl"):
            old.unlink()
        target = folder / built.name
        target.write_bytes(built.read_bytes())
    return target


def build_wheels(folder: Path, dists: list[str] | None = None) -> list[Path]:
    """Build the wheels of `dists`, or of all packages."""
    return [build_wheel(p, folder) for p in packages() if not dists or p.dist in dists]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for path in build_wheels(Path(sys.argv[1]), sys.argv[2:]):
        print(f"built {path}")
