"""One rank of the port sync's measurement: prints the port it has bound, the one it got, and the seconds of each round."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from commplane_disagg.port import bind_listener, sync_bootstrap_port

__all__ = ["main"]


def main(path: str, ranks: int, rounds: int, rank: int) -> str:
    """Collective over `ranks` processes that share the file at `path`."""
    import torch.distributed as dist

    store = dist.FileStore(path, ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    seconds, port = [], 0
    with bind_listener("127.0.0.1") as bound:
        for number in range(rounds + 1):
            dist.barrier()
            begun = time.perf_counter()
            port = sync_bootstrap_port(bound.port, nnodes=ranks)
            if number:  # the first one sets up connections
                seconds.append(time.perf_counter() - begun)
        own = bound.port
    dist.destroy_process_group()
    return " ".join([str(own), str(port), *(f"{value:.6f}" for value in seconds)])


if __name__ == "__main__":
    sys.stdout.write(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])) + "\n")
