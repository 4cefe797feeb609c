"""One workspace, one order of streams: two kernels on it at the same time corrupt its counters, and FlashInfer lets them.

A call on another stream than the last is ordered behind it with an event. In a capture the event becomes an edge of the graph,
where both streams are in it. What no call sees, the replays of a graph, the caller has to order: replays and eager calls that
share a communicator have to be on one stream or behind events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

__all__ = ["CudaStreams", "StreamOrder", "Streams"]


class Streams(Protocol):
    """What is asked of streams, which go by their raw number."""

    def capturing(self, stream: int) -> bool:
        """Whether a capture is open on it."""

    def after(self, stream: int, earlier: int) -> None:
        """Make `stream` wait for what `earlier` has been given so far."""


class CudaStreams:
    """Streams of one device. A stream that was called on has to live until the next call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def capturing(self, stream: int) -> bool:
        """Whether a capture is open on it."""
        import torch

        with torch.cuda.stream(self._torch(stream)):
            return torch.cuda.is_current_stream_capturing()

    def after(self, stream: int, earlier: int) -> None:
        """Make `stream` wait for what `earlier` has been given so far."""
        import torch

        with torch.cuda.device(self._device):
            self._torch(stream).wait_stream(self._torch(earlier))

    def _torch(self, stream: int) -> torch.cuda.Stream:
        import torch

        return torch.cuda.ExternalStream(stream, device=self._device)  # type: ignore[no-untyped-call]


class StreamOrder:
    """The last streams of one workspace.

    Attributes:
        fast: the stream on which a call needs nothing: that of the last eager call. -1 for none, and while captures go on, so
            that every call in one comes to `follow`.
    """

    def __init__(self, streams: Streams) -> None:
        self.fast = -1
        self._streams = streams
        self._eager = self._captured = -1

    def follow(self, stream: int) -> None:
        """Order `stream` behind the last one; for every call whose stream is not `fast`. Local; queues at most an event."""
        streams = self._streams
        if not streams.capturing(stream):
            # To wait for one that captures would draw this stream into the capture, and what it captured does not run now.
            if self._eager not in (-1, stream) and not streams.capturing(self._eager):
                streams.after(stream, self._eager)
            self._eager = self.fast = stream
            return
        # What ran eagerly is no part of the capture: whoever captures has synchronised, and orders the replays.
        if self._captured not in (-1, stream) and streams.capturing(self._captured):
            streams.after(stream, self._captured)
        self._captured, self.fast = stream, -1
