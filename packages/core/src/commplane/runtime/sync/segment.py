"""A piece of shared memory that the ranks of a host map together, and whose name is gone before it is used."""

from __future__ import annotations

import mmap
import os

from commplane.agree import Setback, StoreBootstrap, joint_verdict, setback
from commplane.api.shm import SHM_DIRECTORY, owned_name, sweep

__all__ = ["map_together"]


def map_together(bootstrap: StoreBootstrap, what: str, nbytes: int, timeout: float) -> mmap.mmap | str:
    """Create `nbytes` of zeros on group rank 0 and map them on all ranks, or on none. Collective; all ranks share a host.

    The name lives until all ranks have voted and is then removed by every rank: any of them may be killed meanwhile. If all are,
    the next commplane process of this user removes it.

    Args:
        bootstrap: control plane of the ranks.
        what: is mapped, for errors.
        nbytes: size of the segment.
        timeout: seconds that one wait may take.

    Returns:
        The mapping, which the caller closes; or why some rank has none, in a text that is equal on all ranks.

    Raises:
        PeerError: a rank did not come.
    """
    name = owned_name("sync") if bootstrap.rank == 0 else None
    memory: mmap.mmap | None = None
    problem: Setback | None = None
    agreed = False
    try:
        if name is not None:
            try:
                _create(name, nbytes)
            except OSError as error:
                problem = setback(error)
        name = bootstrap.broadcast(name, what=f"{what}: name of the segment", timeout=timeout)
        if problem is None:
            try:
                memory = _map(str(name), nbytes)
            except (OSError, ValueError) as error:
                # The leader says why it could not create; what the others find then is no reason of its own.
                problem = Setback(setback(error).text, derived=isinstance(error, (FileNotFoundError, ValueError)))
        reasons = joint_verdict(bootstrap, what, problem, timeout)
        agreed = reasons is None
    finally:
        if name is not None:
            (SHM_DIRECTORY / name).unlink(missing_ok=True)
        if not agreed:
            if memory is not None:
                memory.close()
            sweep()  # the leader may have been killed before anybody knew the name
    if reasons is not None:
        return reasons
    assert memory is not None
    return memory


def _create(name: str, nbytes: int) -> None:
    fd = os.open(SHM_DIRECTORY / name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, nbytes)  # a file system that is full is an error here, not a SIGBUS at the first write
    finally:
        os.close(fd)


def _map(name: str, nbytes: int) -> mmap.mmap:
    fd = os.open(SHM_DIRECTORY / name, os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(fd, nbytes)
    finally:
        os.close(fd)
