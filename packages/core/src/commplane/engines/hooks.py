"""Whether a hook is where it was put: an engine may not have applied it, and another plugin may have come after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["calls", "lost"]


def calls(function: Any, hook: Callable[..., Any]) -> bool:
    """Whether `function` is `hook`, or a wrapper that has it in its closure, or one around such a wrapper. Local.

    That there is a ``__wrapped__`` says nothing by itself: decorators of the engine leave one too, `contextmanager` for one.
    """
    while function is not None:
        if function is hook or any(_content(cell) is hook for cell in getattr(function, "__closure__", None) or ()):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def lost(scope: type, hooks: Mapping[str, Callable[..., Any]]) -> str | None:
    """Which of `hooks`, by name of the method of `scope`, would not be called, in one clause; None if all would. Local."""
    names = [name for name, hook in hooks.items() if not calls(getattr(scope, name, None), hook)]
    if not names:
        return None
    return f"wanted hooks on {scope.__name__}.{', '.join(names)}, found that they are not there"


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that was not set yet
        return None
