"""The group's device as the current one of a thread, for as long as backends build, prove themselves, prepare and close.

CUDA has a current device for each thread, the first one in a new thread, whatever the user has set in another. Core puts back
what was current, and leaves it alone in collectives: what a user calls runs on the device and the stream that the user has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

from commplane.notice import notice

__all__ = ["on_device", "on_device_if_possible", "settle"]


def on_device(device: str) -> AbstractContextManager[object]:
    """`device`, such as ``"cuda:1"``, is the current one inside; nothing is done for one that is not CUDA's. Local."""
    if not device.startswith("cuda"):
        return nullcontext()
    import torch

    return torch.cuda.device(torch.device(device))


@contextmanager
def on_device_if_possible(device: str) -> Iterator[None]:
    """`on_device` for what has to happen all the same where the device is lost. Local."""
    with ExitStack() as stack:
        try:
            stack.enter_context(on_device(device))
        except RuntimeError as error:
            notice(f"{device} could not be made the current device: {error}")
        yield


def settle(device: str) -> None:
    """Wait for all that was launched on `device`, by whatever stream. Local; raises what a kernel has failed with."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(torch.device(device))
