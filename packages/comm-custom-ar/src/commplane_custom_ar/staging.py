# SPDX-License-Identifier: Apache-2.0
"""The group's segment with a communicator on it, and how a larger one takes its place."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from commplane.api import BuildContext, Workspace
from commplane_custom_ar import _native
from commplane_custom_ar._native import Comm, Segment
from commplane_custom_ar.codes import EBUSY, RING_SLOTS
from commplane_custom_ar.segments import map_together

__all__ = ["Staging", "StagingWorkspace", "build"]


@dataclass
class Staging:
    """A segment with a communicator on it. `chunk`: bytes that one step carries."""

    segment: Segment
    comm: Comm
    chunk: int

    def close(self) -> None:
        """Unmap. A call of another thread is made to end first; it raises in that thread."""
        deadline = time.monotonic() + 5.0
        while True:
            try:
                self.comm.close()
                break
            except _native.NativeError as error:
                if error.status != EBUSY or time.monotonic() > deadline:
                    raise
                self.comm.abort()
                time.sleep(0.001)
        self.segment.close()


class StagingWorkspace(Workspace):
    """Larger staging, built beside the present one and taken into use when every rank has built it."""

    backend = "custom_ar"

    def __init__(self, take: Callable[[Staging], None], staging: Staging) -> None:
        self.nbytes = staging.chunk * RING_SLOTS
        self._take = take
        self._staging: Staging | None = staging

    def commit(self) -> None:
        """Take it into use; the one before goes. From here on the backend owns it."""
        staging, self._staging = self._staging, None
        if staging is not None:
            self._take(staging)

    def close(self) -> None:
        """Before `commit`: it was built in vain. After it: nothing, the backend closes what it uses."""
        staging, self._staging = self._staging, None
        if staging is not None:
            staging.close()


def build(context: BuildContext, chunk: int) -> Staging:
    """Staging for chunks of `chunk` bytes, in a segment of its own. Collective."""
    nbytes = chunk * RING_SLOTS
    layout = _native.layout(context.world_size, nbytes)
    own = layout.offsets[context.rank]
    segment = map_together(context.bootstrap, "staging", layout.total, own, layout.part_bytes)
    try:
        comm = Comm(
            segment,
            rank=context.rank,
            world_size=context.world_size,
            staging_bytes=nbytes,
            chunk_bytes=chunk,
            oversubscribed=context.facts.oversubscribed(context.ranks),
            timeout_s=context.timeout,
        )
    except BaseException:
        segment.close()
        raise
    return Staging(segment, comm, chunk)
