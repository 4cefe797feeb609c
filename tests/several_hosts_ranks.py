"""What a rank of a job over several hosts does, started by torchrun: ``several_hosts_ranks.py plans|loses OUT``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

import commplane
from commplane.api import Collective, ParallelLayout
from commplane.errors import PeerError


def plans(plane: commplane.Plane) -> dict[str, object]:
    """Groups inside a host, across hosts, and over all: what runs where, and that the sums are right."""
    layout = ParallelLayout(world_size=4, tensor=4, data=2)
    made = plane.groups(layout, ["world", "attention_tp", "dp"])
    said: dict[str, object] = {"hosts": [list(h) for h in plane.facts.hosts(range(4))]}
    for family, comm in made.items():
        said[family] = [comm.plan.explain(str(Collective.ALL_REDUCE), nbytes=n, dtype="float32").chosen for n in (64, 1 << 20)]
        for size in (16, 500_001):
            out = comm.all_reduce(torch.full((size,), float(1 << plane.rank)))
            wanted = float(sum(1 << r for r in comm.ranks))
            assert bool((out == wanted).all()), f"{family} of {size}: found {out.unique().tolist()}, wanted {wanted}"
    said["way"] = made["world"].plan.explain("all_reduce", nbytes=64, dtype="float32").algorithm
    return said


def loses(plane: commplane.Plane, out: Path) -> dict[str, object]:
    """All-reduces until a host is killed from outside."""
    comm = plane.communicator("tp")
    tensor = torch.ones(100_000)
    comm.all_reduce_(tensor)
    Path(f"{out}.up{plane.rank}").write_text("")
    began = time.monotonic()
    try:
        while time.monotonic() - began < 60:
            comm.all_reduce_(tensor.fill_(1.0))
    except PeerError as error:
        return {"backend": comm.plan.backends[0], "missing": list(error.missing_ranks), "text": str(error)}
    return {"text": "nobody was missed for 60 s"}


if __name__ == "__main__":
    what, out = sys.argv[1], Path(sys.argv[2])
    plane = commplane.init(config={"timeout": 30.0, "hierarchical": {"patience": 1.0}})
    answer = plans(plane) if what == "plans" else loses(plane, out)
    Path(f"{out}{plane.rank}.part").write_text(json.dumps(answer))
    Path(f"{out}{plane.rank}.part").replace(f"{out}{plane.rank}")
    if what == "plans":
        plane.close()
    else:
        time.sleep(3)  # agents end a job with its first rank: the others have this long to say what they saw
