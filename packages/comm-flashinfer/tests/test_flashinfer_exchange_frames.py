"""What an exchange keeps of a step that failed holds nothing of who asked."""

from __future__ import annotations

import gc
import weakref

import pytest

from commplane.errors import CommunicatorError
from commplane.plugins import PluginHost
from commplane.runtime import Plane
from commplane.testing import run_threads
from commplane_flashinfer.exchange import Exchange

pytestmark = pytest.mark.timeout(60)


class Held:
    """Stands for a tensor."""


def asked(exchange: Exchange) -> weakref.ref[Held]:
    """Votes with something in the frame; that, weakly."""
    held = Held()
    found = weakref.ref(held)
    with pytest.raises(CommunicatorError, match="no memory"):
        exchange.agree("no memory")
    return found


def test_the_frames_of_who_was_told_of_a_failure_go_when_they_return() -> None:
    """Without the garbage collector: nobody knows when that runs."""

    def rank_main(plane: Plane) -> list[bool]:
        bootstrap = plane.communicator("tp")._bootstrap
        exchange = Exchange(bootstrap, "a build")
        return [asked(exchange)() is None for _ in range(2)]

    gc.collect()
    gc.disable()
    try:
        results = run_threads(2, rank_main, plugins=lambda _rank: PluginHost(), config=lambda _rank: {"timeout": 20})
    finally:
        gc.enable()
    assert results == [[True, True]] * 2
