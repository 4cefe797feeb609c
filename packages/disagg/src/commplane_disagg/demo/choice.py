"""Which engine all ranks of both sides use where the user names none: shared memory if every pair can map it, else TCP."""

from __future__ import annotations

import itertools

from torch.distributed import Store

from commplane.api import TransferContext
from commplane_disagg.demo.job import Job
from commplane_disagg.demo.parts import told
from commplane_disagg.engines.choose import Choice, End, choose, mapping_refusal
from commplane_disagg.engines.shm import SharedMemory

__all__ = ["engine_for"]

_BUILT_IN = ("shm", "tcp")
_POOL = 4096


def engine_for(job: Job, store: Store) -> Choice:
    """The same on every rank. Collective over both sides: each rank maps a small pool of each rank of the other side.

    Raises:
        PeerError: a rank did not say what it found.
    """
    if job.options.engine:
        return Choice(job.options.engine)
    sizes = {"prefill": job.options.prefill_tp, "decode": job.options.decode_tp}
    here = f"{job.side}/{job.rank}"
    engine = SharedMemory()
    engine.open(TransferContext(here, job.host, job.options.timeout))
    try:
        engine.register(engine.allocate(_POOL))
        store.set(f"offer of {here}", engine.metadata().hex())
        other = "decode" if job.side == "prefill" else "prefill"
        for peer in (f"{other}/{rank}" for rank in range(sizes[other])):
            found = mapping_refusal(bytes.fromhex(told(store, f"offer of {peer}")), peer, job.options.timeout)
            store.set(f"{here} maps {peer}", found or "")
        refusals = {"prefill": "", "decode": ""}
        for one, two in itertools.product(range(sizes["prefill"]), range(sizes["decode"])):
            for side, key in (("prefill", f"prefill/{one} maps decode/{two}"), ("decode", f"decode/{two} maps prefill/{one}")):
                refusals[side] = refusals[side] or told(store, key)
    finally:
        engine.close()  # everybody has tried: their answers are read
    ends = [End(side, _BUILT_IN, refusal or None) for side, refusal in refusals.items()]
    return choose(ends[0], ends[1], _BUILT_IN)
