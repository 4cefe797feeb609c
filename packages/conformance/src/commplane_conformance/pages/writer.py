"""The process that is killed while it writes: ``python -m commplane_conformance.pages.writer JSON``."""

from __future__ import annotations

import json
import sys

from commplane.api import PageStore, StoreContext
from commplane_conformance.pages.book import keys_of, put
from commplane_conformance.provider import load

__all__ = ["main"]


def _say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def main(text: str) -> None:
    """Open, say ``0``, put batch after batch and say how many pages are acknowledged, close when the input ends."""
    asked = json.loads(text)
    store: PageStore = load(asked["factory"])()
    store.open(StoreContext(asked["page_bytes"], asked["namespace"], asked["timeout"], asked["options"]))
    keys = keys_of(asked["seed"], asked["count"])
    _say("0")
    for start in range(0, len(keys), asked["batch"]):
        some = keys[start : start + asked["batch"]]
        done = put(store, some, asked["page_bytes"])
        if not all(done.ok):
            sys.exit(f"put failed: {done.error}")
        _say(str(start + len(some)))
    sys.stdin.read()  # until the test lets go of it, or has ended itself
    store.close()


if __name__ == "__main__":
    main(sys.argv[1])
