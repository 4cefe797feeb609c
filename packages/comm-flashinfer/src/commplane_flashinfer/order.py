"""One communicator, one order of streams, which FlashInfer leaves to its callers.

Two kernels on one workspace at the same time corrupt its counters, and two that wait on the GPU for their peers may hold the room
that the peers of the other one want.

A call on another stream than the last is ordered behind it with an event. In a capture the event becomes an edge of the graph,
where both streams are in it. What no call sees, the replays of a graph, the caller has to order: replays and eager calls that
share a communicator have to be on one stream or behind events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    import torch

__all__ = ["CudaStreams", "StreamOrder", "Streams"]

_NONE: Final = -1  # no stream has this number
_DEFAULT: Final = 0  # the device's default stream; the only one on CPU


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

        if stream == _DEFAULT:  # cannot be captured; to ask it while a stream captures that it waits for is an error in CUDA
            return False
        with torch.cuda.stream(self._torch(stream)):
            return torch.cuda.is_current_stream_capturing()

    def after(self, stream: int, earlier: int) -> None:
        """Make `stream` wait for what `earlier` has been given so far."""
        import torch

        with torch.cuda.device(self._device):
            self._torch(stream).wait_stream(self._torch(earlier))

    def _torch(self, stream: int) -> torch.cuda.Stream:
        import torch

        if stream == _DEFAULT:  # ExternalStream takes 0 for no stream, and gives another one of its pool each time
            return torch.cuda.default_stream(self._device)
        return torch.cuda.ExternalStream(stream, device=self._device)  # type: ignore[no-untyped-call]


class StreamOrder:
    """The last streams that a communicator was called on, with whatever dtype. Local.

    Attributes:
        fast: the stream on which a call needs nothing: that of the last eager call. -1 for none, and while a capture may be open,
            so that every call in one comes to `follow`.
    """

    def __init__(self, streams: Streams) -> None:
        self.fast = _NONE
        self._streams = streams
        self._eager = self._captured = _NONE
        self._open = False

    def capture(self, is_open: bool) -> None:
        """A capture of the plane begins, or has ended."""
        self._open = is_open
        self.fast = self._captured = _NONE

    def follow(self, stream: int) -> bool:
        """Order `stream` behind the last one; for every call whose stream is not `fast`. Queues at most an event.

        Returns:
            Whether a capture is open, so that a graph may replay the call.
        """
        streams = self._streams
        captured = streams.capturing(stream)
        if not captured:
            # To wait for one that captures would draw this stream into the capture, and what it captured does not run now.
            if self._eager not in (_NONE, stream) and not streams.capturing(self._eager):
                streams.after(stream, self._eager)
            self._eager, self.fast = stream, _NONE if self._open else stream
            return self._open
        # What ran eagerly is no part of the capture: whoever captures has synchronised, and orders the replays.
        if self._captured not in (_NONE, stream) and streams.capturing(self._captured):
            streams.after(stream, self._captured)
        self._captured, self.fast = stream, _NONE
        return True
