"""Two prefill ranks and two decode ranks as processes, each pair with a real sync round; what `run_processes` calls."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import commplane
from commplane.errors import CommplaneError
from commplane_disagg.ends import Address, DecodeEnd, KvLayout, PrefillEnd, PrefillReplica
from commplane_disagg.engines.shm import SharedMemory
from commplane_disagg.ranks import Grid, Kv, holding
from commplane_disagg.rooms import Status

KV, GRID = Kv(layers=2, heads=4), Grid(tp=2)


def rank_main(store: Any, rank: int, world_size: int, victim: int) -> dict[str, Any]:
    """Global ranks 0 and 1 prefill, 2 and 3 decode. Room 1 goes well; in room 2 the `victim`, if any, is killed by itself."""
    side, number = ("prefill", rank) if rank < 2 else ("decode", rank - 2)
    out: dict[str, Any] = {"results": [], "error": None}
    plane = commplane.init(store=store, rank=rank, world_size=world_size, config={"timeout": 60, "backends": ["torch"]})
    rounds = plane.sync_round(side, ranks=[0, 1] if side == "prefill" else [2, 3], specs=["disagg_rooms"], timeout=5)
    layout = KvLayout.page_major(pages=4, layers=(0, 2), heads=holding(KV, GRID, number).heads, tokens=2, row=16)
    kind = PrefillEnd if side == "prefill" else DecodeEnd
    end = kind(
        name=f"{side}/{number}",
        kv=KV,
        grid=GRID,
        rank=number,
        layout=layout,
        engine=SharedMemory(),
        engine_name="shm",
        capabilities=("quiet",),
        rounds=rounds,
        token=None,
        timeout=20,
        silence=2.0,
        lost_after=0.5,
        drain_timeout=0.5,
    )
    pool = end.open()
    if isinstance(end, PrefillEnd):
        pool[:] = bytes([65 + number]) * len(pool)
        store.set(f"port/{number}", str(end.port))
    source = PrefillReplica(GRID, {r: Address(f"prefill/{r}", "127.0.0.1", int(store.get(f"port/{r}"))) for r in range(2)})
    until = time.monotonic() + 40

    def run(room: int) -> None:
        while not any(r["room"] == room for r in out["results"]) or end.status(room) is not None:
            if time.monotonic() > until:
                raise TimeoutError(f"room {room} is {end.status(room)}")
            if room == 2 and rank == victim and end.status(2) == Status.WAITING:
                os.kill(os.getpid(), signal.SIGKILL)
            for result in end.step(0.002).results:
                out["results"].append({"room": result.room, "ok": result.ok, "error": str(result.error or "")})
                out["kind"] = type(result.error).__name__

    try:
        for room in (1, 2):
            if isinstance(end, DecodeEnd):
                end.receive(room, [room, 0] if room == 2 else [3], source)
            elif room == 1:
                end.send(room, [2])
            else:
                end.open_room(room)
                if victim < 0:
                    end.send(room, [1, 2])
            run(room)
        out["page"] = bytes(pool[3 * layout.page_bytes :]).decode()
    except CommplaneError as error:
        out["error"], out["kind"] = str(error), type(error).__name__
    finally:
        end.close()
    if victim < 0:
        rounds.close()
        plane.close()
    return out
