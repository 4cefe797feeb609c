"""Play one case again: `python agreement_replay.py 'JSON that the test printed'`. Prints what each rank did."""

from __future__ import annotations

import sys

from agreement_claims import judge, shown
from agreement_ranks import play
from agreement_scenario import Scenario

if __name__ == "__main__":
    case = play(Scenario.from_json(sys.argv[1]))
    print("\n".join(shown(case)))
    print("took place:", {f"{f.phase} {f.how} on rank {f.rank}": step for f, step in case.fired.items()})
    judge(case)
    print("every claim holds")
