"""Every hook of commplane. Hooks are called at discovery, build, capture and close, never per operation.

A plugin implements any subset, marked with ``commplane.api.hookimpl``. An implementation may accept a subset of the arguments.
Where a hook is *collective*, each rank of the group calls it at the same point, plugins in the order of their names.

.. code-block:: text

    discover   commplane_configure, commplane_register_*
    agree      commplane_select_backend
    build      commplane_build_communicator, commplane_init_workspace, commplane_plan_committed
    capture    commplane_capture_begin, commplane_capture_end
    faults     commplane_fault
    close      commplane_communicator_closed
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from commplane.api.markers import hookspec

if TYPE_CHECKING:
    from commplane.api import (
        BackendSpec,
        Bootstrap,
        BuildContext,
        CommBackend,
        PageStoreSpec,
        ProbeRequest,
        Requirement,
        SyncSpec,
        TransferSpec,
        Workspace,
    )
    from commplane.config import Config

__all__ = [
    "commplane_build_communicator",
    "commplane_capture_begin",
    "commplane_capture_end",
    "commplane_communicator_closed",
    "commplane_configure",
    "commplane_fault",
    "commplane_init_workspace",
    "commplane_plan_committed",
    "commplane_register_cache_sync",
    "commplane_register_comm_backends",
    "commplane_register_page_stores",
    "commplane_register_transfer_engines",
    "commplane_select_backend",
    "commplane_sync_bootstrap",
]


@hookspec(historic=True)
def commplane_configure(config: Config) -> None:
    """Take notice of the resolved settings. Local.

    Historic: a plugin registered later is called at once with the same value.
    """


@hookspec
def commplane_register_comm_backends() -> list[BackendSpec]:  # type: ignore[empty-body]
    """Describe the backends this plugin provides. Local, must not import torch or load native code.

    Returns:
        Specs; the name of each must be unique among all installed plugins, but that one plugin may give several of one name
        for different devices.
    """


@hookspec
def commplane_register_cache_sync() -> list[SyncSpec]:  # type: ignore[empty-body]
    """Declare numbers that are agreed in every sync round of a group. Local.

    Must be equal on all ranks, which `Plane.sync_round` checks.
    """


@hookspec
def commplane_register_page_stores() -> list[PageStoreSpec]:  # type: ignore[empty-body]
    """Describe the storage tiers this plugin provides. Local."""


@hookspec
def commplane_register_transfer_engines() -> list[TransferSpec]:  # type: ignore[empty-body]
    """Describe the KV transfer engines this plugin provides. Local."""


@hookspec(firstresult=True)
def commplane_sync_bootstrap(bootstrap: Bootstrap, value: Any) -> Any:
    """Make one value, such as a port or an address, equal on all ranks. Collective over `bootstrap`.

    Core's own implementation, called last, gives every rank the leader's value.
    """


@hookspec(firstresult=True)
def commplane_select_backend(request: ProbeRequest, candidates: Sequence[str]) -> Sequence[str] | None:
    """Order the backends that every rank found usable; None leaves the order as it is. Local.

    Site policy. Backends left out are not built; core's own ``torch`` stays last whatever is answered. Every rank must
    answer alike: the resulting plan is compared, and a difference is an `AgreementError` on all ranks.
    """


@hookspec(firstresult=True)
def commplane_build_communicator(spec: BackendSpec, context: BuildContext) -> CommBackend | None:
    """Construct the backend object of `spec`; core's own implementation, called last, imports its factory. Local.

    Core opens what is returned. The place for wrappers: a plugin may implement this with ``hookimpl(wrapper=True)`` and
    return an object around the real one, to trace calls or to inject faults. Nobody pays when it is absent.
    """


@hookspec
def commplane_init_workspace(  # type: ignore[empty-body]
    communicator: Any, requirements: Sequence[Requirement]
) -> list[Workspace]:
    """Build what `requirements` need, before capture. Collective over the communicator.

    Called by `Communicator.prepare`. Core's own implementation asks each backend of the plan. If any rank raises, every rank
    closes what was built in this call and raises.

    Args:
        communicator: the `commplane.runtime.Communicator` to build for.
        requirements: what was declared; equal on all ranks.

    Returns:
        What was built; the communicator owns and closes it.
    """


@hookspec
def commplane_plan_committed(communicator: Any) -> None:
    """A communicator is ready; its `plan` says what runs. Local, result ignored."""


@hookspec
def commplane_capture_begin(communicator: Any) -> None:
    """A capture of `communicator` starts. Local, result ignored."""


@hookspec
def commplane_capture_end(communicator: Any, error: BaseException | None) -> None:
    """A capture of `communicator` ended; `error` is what this rank is about to raise, or None. Local, result ignored."""


@hookspec
def commplane_fault(communicator: Any, error: BaseException) -> None:
    """`communicator` was poisoned by `error`; later calls raise at once. Local, result ignored."""


@hookspec
def commplane_communicator_closed(communicator: Any) -> None:
    """`communicator` was closed. Local, result ignored."""
