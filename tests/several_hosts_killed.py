"""Two hosts of two ranks, of which one is killed: ``several_hosts_killed.py HOST FOLDER``, in a network of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from commplane.testing.hosts import agents, namespaces

if __name__ == "__main__":
    victim, folder = int(sys.argv[1]), Path(sys.argv[2])
    script = Path(__file__).with_name("several_hosts_ranks.py")
    with namespaces(2) as hosts:
        running = agents(hosts, 2, [str(script), "loses", f"{folder}/rank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list(folder.glob("rank.up*"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        hosts[victim].kill()
        survivors = [folder / f"rank{r}" for r in range(4) if r // 2 != victim]
        while not all(s.exists() for s in survivors) and time.monotonic() < deadline:
            time.sleep(0.05)
        for agent in running:
            agent.kill()
            agent.wait()
