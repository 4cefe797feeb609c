"""The process of one rank of the demo: ``python -m commplane_cache.demo.rank CONFIGURATION.json``.

It meets the others, builds its part of the model and of the cache, serves the stream once for each pass, and leaves what came
of it, or the error that ended it, in the file that its configuration names.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from commplane.errors import CommplaneError, PeerError
from commplane_cache.demo.job import Job

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


def main(configuration: str) -> int:
    """Run one rank: its exit code."""
    job = Job.read(Path(configuration))
    _end_with(job.parent)
    said: dict[str, Any] = {}
    try:
        from commplane_cache.demo.serve import serve

        said["passes"] = serve(job)
    except Exception as error:  # whatever it is, the process that started the ranks shows it
        if not isinstance(error, CommplaneError):  # those say what is wrong in one sentence
            traceback.print_exc()
        said.update(error=type(error).__name__, message=str(error))
        if isinstance(error, PeerError):
            said["missing"] = list(error.missing_ranks)
    partial = Path(f"{job.out}.part")
    partial.write_text(json.dumps(said))
    partial.rename(job.out)
    return 1 if "error" in said else 0


def _end_with(parent: int) -> None:
    """Have the kernel end this process when `parent` has ended, however that ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
    if os.getppid() != parent:  # it ended before the kernel was asked
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
