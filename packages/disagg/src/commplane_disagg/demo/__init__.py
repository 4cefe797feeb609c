"""``commplane-disagg demo``: two prefill nodes and one decode node on this machine, with a real model.

`network` gives each node an address, in a network namespace where that is allowed; `launch` starts the ranks; `prefill` and
`decode` are what a rank of each side does; `report` compares and shows.
"""

from __future__ import annotations
