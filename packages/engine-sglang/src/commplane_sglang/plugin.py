"""The hooks in SGLang, each around what SGLang does itself."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from commplane.engines import Groups, lost
from commplane.errors import PluginCompatibilityError, UnsupportedOperation

from .seams import CREATE, ENGINE, PURPOSES, REGISTRY

__all__ = ["groups", "register"]

groups = Groups(ENGINE, PURPOSES, logging.getLogger("commplane_sglang"))


def register() -> None:
    """`commplane_sglang.register`."""
    groups.problem = ENGINE.problem()
    if groups.problem is None:
        _hook(CREATE.module + ".GroupCoordinator", _hooks())
        return
    if ENGINE.has(REGISTRY) and ENGINE.has(CREATE):  # enough to tell the other ranks
        _hook(CREATE.module + ".GroupCoordinator", {"__init__": create})
    raise PluginCompatibilityError(groups.problem)


def _hooks() -> dict[str, Callable[..., Any]]:
    return {
        "__init__": create,
        "all_reduce": all_reduce,
        "_all_reduce_out_place": all_reduce_out_of_place,
        "_all_reduce_in_place": all_reduce_in_place,
        "graph_capture": graph_capture,
        "destroy": destroy,
    }


def _hook(scope: str, hooks: dict[str, Callable[..., Any]]) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for name, hook in hooks.items():
        HookRegistry.register(f"{scope}.{name}", hook, HookType.AROUND)


def create(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Around ``GroupCoordinator.__init__``. Collective over the group, and over all ranks at the first one."""
    given = inspect.signature(original).bind_partial(self, *args, **kwargs).arguments
    joins = given.get("recovered_rank") or given.get("rank_offset")
    if joins and groups.idle:
        original(self, *args, **kwargs)
        return  # ranks that run do not vote again; those with a communicator find its old rank gone, and raise
    if joins:
        raise UnsupportedOperation(
            "[commplane-sglang] wanted all ranks to start together, found one that joins a running job (elastic expert "
            f"parallelism): {ENGINE.leave_out}"
        )
    original(self, *args, **kwargs)
    if groups.problem is None:
        groups.problem = _not_applied(type(self), _hooks()) or _hook_the_runner(self.device)
    groups.attach(self)


def _not_applied(scope: type, hooks: Mapping[str, Callable[..., Any]]) -> str | None:
    """SGLang logs a hook that it could not apply and goes on: which of `hooks`, if any. Local."""
    text = lost(scope, hooks)
    return text and f"{text} (see the log of SGLang): {ENGINE.leave_out}"


def _hook_the_runner(device: torch.device) -> str | None:
    """Hook what comes before a capture; what went wrong, if anything. Local, idempotent.

    Not together with the others: the runner's module is not for processes that have no groups. SGLang runs that step on CUDA
    alone, so elsewhere a runner that was not imported is left alone.
    """
    name = "sglang.srt.model_executor.runner.base_runner"
    if device.type != "cuda" and name not in sys.modules:
        return None
    try:
        runner = importlib.import_module(name).BaseRunner
    except ImportError as error:
        return f"wanted to import {name}, found {type(error).__name__}: {error}"
    hooks = {"_pre_initialize_flashinfer_allreduce_workspace": pre_initialize}
    if _not_applied(runner, hooks) is None:
        return None
    from sglang.srt.plugins.hook_registry import HookRegistry

    _hook(f"{name}.BaseRunner", hooks)
    HookRegistry.apply_hooks()
    return _not_applied(runner, hooks)


def all_reduce(original: Callable[..., torch.Tensor], self: Any, input_: torch.Tensor) -> torch.Tensor:
    """Around ``GroupCoordinator.all_reduce``. Like SGLang's own: in place on CPU, on CUDA into a new tensor.

    A trace goes through SGLang's operators, which call the two methods below.
    """
    if torch.compiler.is_compiling():
        return original(self, input_)
    call = groups.all_reduce_(self, input_) if input_.is_cpu else groups.all_reduce(self, input_)
    return original(self, input_) if call is None else call(input_)


def all_reduce_out_of_place(
    original: Callable[..., torch.Tensor], self: Any, input_: torch.Tensor, outplace_all_reduce_method: str
) -> torch.Tensor:
    """Around ``GroupCoordinator._all_reduce_out_place``, which SGLang's operator calls."""
    call = groups.all_reduce(self, input_)
    return original(self, input_, outplace_all_reduce_method) if call is None else call(input_)


def all_reduce_in_place(original: Callable[..., None], self: Any, input_: torch.Tensor) -> None:
    """Around ``GroupCoordinator._all_reduce_in_place``, which SGLang's operator calls."""
    call = groups.all_reduce_(self, input_)
    if call is None:
        original(self, input_)
    else:
        call(input_)


@contextmanager
def graph_capture(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
    """Around ``GroupCoordinator.graph_capture``: every communicator captures while SGLang captures any group."""
    with groups.capture(), original(self, *args, **kwargs) as context:
        yield context


def pre_initialize(original: Callable[..., None], self: Any) -> None:
    """Around the step of SGLang's runner that makes workspaces before graphs are captured."""
    from sglang.srt.runtime_context import get_schedule, max_prefill_buffer_tokens

    runner = self.model_runner
    tokens = max_prefill_buffer_tokens() or get_schedule().max_prefill_tokens
    for served in groups.served:
        served.prepare(tokens, runner.model_config.hidden_size, runner.dtype)
    original(self)


def destroy(original: Callable[..., None], self: Any) -> None:
    """Around ``GroupCoordinator.destroy``. Collective over the group."""
    try:
        groups.detach(self)
    finally:
        original(self)
