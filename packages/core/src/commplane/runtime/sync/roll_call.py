"""Who is missing, asked over the control plane once a round has failed."""

from __future__ import annotations

from commplane.agree import StoreBootstrap
from commplane.errors import CommplaneError, PeerError

__all__ = ["RollCall"]


class RollCall:
    """Finds the missing ranks where the transport cannot name them, or knows those of its own host only.

    Every rank whose round fails comes here, at the latest at its own deadline. Who has not come when the time is over is
    missing. Over the store, so it is slow, and it is used once: a round that has failed is not used again.

    Args:
        bootstrap: control plane of the round, which nothing else uses any more.
    """

    def __init__(self, bootstrap: StoreBootstrap) -> None:
        self._bootstrap = bootstrap

    def missing(self, timeout: float) -> tuple[int, ...] | None:
        """Global ranks that are missing, empty if all have come; None if that could not be found out. Collective.

        Args:
            timeout: seconds to wait for the others.
        """
        self._bootstrap.begin("roll call")
        try:
            self._bootstrap.barrier(what="roll call", timeout=timeout)
        except PeerError as error:
            return error.missing_ranks or None
        except CommplaneError:  # inside a capture, or the store is lost: the round's own error has to do
            return None
        return ()
