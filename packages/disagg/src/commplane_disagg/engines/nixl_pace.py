"""How long to wait between two calls into a library that works only while it is called, so as to lose no time and take no core.

NIXL does not say whether a call found something to do, but how long it took does: an idle one takes one to six microseconds, one
that moved bytes twenty and more (NIXL 1.5.1, UCX over TCP). After a call that was busy the next one comes at once, and so for a
short while after; then the pauses grow.
"""

from __future__ import annotations

import time

__all__ = ["Pace"]

_BUSY_SECONDS = 15e-6
"""A call that takes longer has found something to do. One that is wrongly taken for such costs `spin` of a core."""
_FIRST_PAUSE = 20e-6


class Pace:
    """Of one thread. NIXL's calls let go of Python's global lock, so a pause of zero need not; ``time.sleep(0)`` takes 75 us.

    Args:
        longest: the longest pause in seconds.
        spin: seconds after the last busy call in which there are no pauses.
    """

    def __init__(self, longest: float, spin: float) -> None:
        self._longest, self._spin = longest, spin
        self._pause = 0.0
        self._spin_until = 0.0

    def busy(self) -> None:
        """There is something to do now, or soon."""
        self._spin_until = time.perf_counter() + self._spin
        self._pause = 0.0

    def after(self, begun: float) -> float:
        """Seconds until the next call, after one that began at `begun` (`time.perf_counter`) and has just ended."""
        now = time.perf_counter()
        if now - begun > _BUSY_SECONDS:
            self.busy()
        if now < self._spin_until:
            return 0.0
        self._pause = min(2 * self._pause + _FIRST_PAUSE, self._longest)
        return self._pause
