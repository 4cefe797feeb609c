"""The hooks in vLLM, each around what vLLM does itself.

They are on the group and not on a device communicator of our own: captures are opened on the group, and vLLM wants to find its
own device communicators there.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from commplane.engines import Groups, Served, calls, lost
from commplane.errors import PluginCompatibilityError

from .seams import ENGINE, PURPOSES

__all__ = ["groups", "register"]

groups = Groups(ENGINE, PURPOSES, logging.getLogger("commplane_vllm"))


def register() -> None:
    """`commplane_vllm.register`."""
    groups.problem = ENGINE.problem()
    if groups.problem is not None:
        raise PluginCompatibilityError(groups.problem)
    from vllm.distributed.parallel_state import GroupCoordinator

    for name, hook in _hooks().items():
        original = getattr(GroupCoordinator, name)
        if not calls(original, hook):  # else vLLM loads its plugins again
            setattr(GroupCoordinator, name, _around(original, hook))


def _hooks() -> dict[str, Callable[..., Any]]:
    return {
        "__init__": create,
        "_all_reduce_out_place": all_reduce_out_of_place,
        "graph_capture": graph_capture,
        "destroy": destroy,
    }


def _around(original: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    return hooked


def create(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Around ``GroupCoordinator.__init__``. Collective over the group, and over all ranks at the first one.

    Groups that vLLM makes beside torch's default group (elastic expert parallelism) have a constructor of their own, and stay
    vLLM's.
    """
    original(self, *args, **kwargs)
    if groups.problem is None:
        text = lost(type(self), _hooks())  # another plugin may have put its own over them
        groups.problem = text and f"{text}: {ENGINE.leave_out}"
    served = groups.attach(self)
    if served is not None:
        prepare(served)


def prepare(served: Served) -> None:
    """Workspaces for the largest batch, where vLLM has said what it will run; captures come later. Collective over the group."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is None or config.model_config is None:
        return
    tokens = config.scheduler_config.max_num_batched_tokens
    served.prepare(tokens, config.model_config.get_hidden_size(), config.model_config.dtype)


def all_reduce_out_of_place(original: Callable[..., torch.Tensor], self: Any, input_: torch.Tensor) -> torch.Tensor:
    """Around ``GroupCoordinator._all_reduce_out_place``, which vLLM's operator and its eager code call."""
    call = groups.all_reduce(self, input_)
    return original(self, input_) if call is None else call(input_)


@contextmanager
def graph_capture(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
    """Around ``GroupCoordinator.graph_capture``: every communicator captures while vLLM captures any group."""
    with groups.capture(), original(self, *args, **kwargs) as context:
        yield context


def destroy(original: Callable[..., None], self: Any) -> None:
    """Around ``GroupCoordinator.destroy``. Collective over the group."""
    try:
        groups.detach(self)
    finally:
        original(self)
