"""Settings of a store: checked names, and values of the type of their default, also when they come as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from commplane.errors import ConfigError

__all__ = ["read_options"]

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def read_options(store: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` with what was given; a default of None takes any value.

    Raises:
        ConfigError: a name that the store does not know, or a value of another type.
    """
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise ConfigError(f"{store}: wanted options among {', '.join(sorted(defaults))}, found {', '.join(unknown)}")
    return {name: _typed(store, name, given.get(name, default), default) for name, default in defaults.items()}


def _typed(store: str, name: str, value: Any, default: Any) -> Any:
    kind = type(default)
    if default is None or type(value) is kind:
        return value
    if kind is bool:
        word = str(value).lower()
        if word in _TRUE + _FALSE:
            return word in _TRUE
    elif kind in (int, float):
        if not isinstance(value, bool):
            try:
                return kind(value)
            except (TypeError, ValueError):
                pass  # said below, with the names
    elif kind is str and hasattr(value, "__fspath__"):
        return str(value)
    raise ConfigError(f"{store}: wanted option {name} of type {kind.__name__}, found {value!r}")
