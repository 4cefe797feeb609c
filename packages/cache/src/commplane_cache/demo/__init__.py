"""``commplane-cache demo``: a real model on several processes, the same conversations without and with the cache.

`stream` makes the conversations, `engine` serves them on one rank, `rank` is the process of a rank, `launch` starts the
processes, `report` and `chart` show what came of it, `faults` spoils the storage of a rank.
"""

from __future__ import annotations
