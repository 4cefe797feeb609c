"""The engine ``tcp``: any host, several streams a peer, straight from one pool into the other.

`wire` has the bytes, `receiving` the end whose pool is written, `sending` the end that writes, `engine` both in one.
"""

from __future__ import annotations

from commplane_disagg.engines.tcp.engine import Tcp

__all__ = ["Tcp"]
