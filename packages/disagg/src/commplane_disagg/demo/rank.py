"""The process of one rank: ``python -m commplane_disagg.demo.rank PARENT FD``, its job on standard input, its outcome to FD."""

from __future__ import annotations

import logging
import os
import sys
import traceback

import msgspec

from commplane_disagg.demo.job import Job, Outcome
from commplane_disagg.demo.network import with_parent

__all__ = ["main"]


def main(parent: int, descriptor: int) -> int:
    """Run one rank: its exit code."""
    with_parent(parent)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    job = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Job)
    try:
        import torch

        from commplane_disagg.demo import decode, prefill

        torch.set_num_threads(1)  # several ranks share this machine
        outcome = (prefill if job.side == "prefill" else decode).run(job)
    except Exception as error:  # whatever it is, the process that started the ranks shows it
        traceback.print_exc()
        outcome = Outcome(error=type(error).__name__, message=str(error))
    os.pwrite(descriptor, msgspec.msgpack.encode(outcome), 0)
    return 1 if outcome.error else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
