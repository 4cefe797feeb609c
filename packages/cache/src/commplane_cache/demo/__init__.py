"""``commplane-cache demo``: a real model on several processes, the same conversations without and with the cache.

On a rank: `stream` makes the conversations of `text`, `engine` serves them, `cached` gets its pages from the cache, `parts` and
`storage` set up groups, model, cache and store, `serve` runs the passes of a `job`, `rank` is the process, `blame` finds who was
lost first, `faults` spoils the storage of a rank. Around the ranks: `scratch`, `launch`, `report`, `chart`.
"""

from __future__ import annotations
