"""``torch.distributed.init_process_group("commplane")``: torch's process groups over agreed plans.

Nothing has to be imported: where the wheel is installed, `import torch` makes the name known (torch 2.5 and later; earlier ones,
or with ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``, want ``import commplane.c10d``).

Collectives that a communicator has go through its plan; the others, and dtypes and ops that the plan has not, go to Gloo for
tensors on CPU and to NCCL for those on CUDA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from _commplane_autoload import register

if TYPE_CHECKING:
    import torch.distributed as dist

    from commplane.runtime import Communicator, Plane

__all__ = ["communicator_of", "create", "plane_of", "register"]


def create(options: Any, backend_options: Any = None) -> dist.ProcessGroup:
    """Make one process group, as torch asks. Collective over the group.

    Args:
        options: torch's `_DistributedBackendOptions`.
        backend_options: what the user gave as ``pg_options``; handed to NCCL where it is of its kind.
    """
    from commplane.c10d.creation import create_group

    return create_group(options, backend_options)


def communicator_of(group: dist.ProcessGroup | None = None, device: str = "cpu") -> Communicator:
    """The communicator behind a process group, for its plan and for what torch has no call for. Local; the group closes it.

    On ``cuda`` it exists from the first collective on a CUDA tensor on.

    Raises:
        CommunicatorError: the group is not of this backend, is closed, or has no communicator for the device yet.
    """
    from commplane.c10d.creation import communicator_behind

    return communicator_behind(group, device)


def plane_of(group: dist.ProcessGroup | None = None) -> Plane:
    """The plane that a process group stands on, for its facts and settings. Local; the last group on it closes it.

    Raises:
        CommunicatorError: the group is not of this backend.
    """
    from commplane.c10d.creation import ours

    return ours(group).ground.plane


register()
