"""The settings of the backend, read and checked. Pure: from equal settings every rank makes the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from commplane.errors import ConfigError
from commplane_flashinfer import capacity

__all__ = ["DEFAULTS", "Settings"]

DEFAULTS: dict[str, bool | int | float | str] = {
    # auto, or one at every size where it is possible, for comparisons: one_shot or two_shot.
    "algorithm": "auto",
    # Largest message of a 16-bit type in bytes: larger ones go to another backend. Not looked at where max_tokens is set.
    "max_bytes": 8 << 20,
    # Instead of max_bytes: the most tokens of a step, and the largest hidden size of all models that use the group.
    "max_tokens": 0,
    "hidden": 0,
    # Largest message of float32 in bytes, which has a workspace of its own.
    "float32_max_bytes": 1 << 20,
    # What the workspaces hold when the backend opens, in bytes of a message; 0 for all of the above. Where it is less, a larger
    # message is an error until prepare has been called for it.
    "open_bytes": 0,
    # What the workspaces of one communicator may take of a device's memory; settings that need more are refused.
    "max_workspace_bytes": 1 << 30,
    # Programmatic dependent launch.
    "pdl": True,
    # Run without NVLink between all GPUs, where the kernels lose by far.
    "any_topology": False,
    # FlashInfer's kernels for NVLink multicast, which this release does not call: true is refused.
    "multicast": False,
}


@dataclass(frozen=True)
class Settings:
    """What the settings come to.

    Attributes:
        most: elements of the largest message of the 16-bit types, and of float32 (``most[True]``).
        at_open: elements that the workspaces hold when the backend opens.
        any_topology: whether GPUs without NVLink will do.
    """

    most: tuple[int, int]
    at_open: tuple[int, int]
    any_topology: bool

    @classmethod
    def of(cls, options: Mapping[str, Any], world_size: int, who: str) -> Settings:
        """Read `options` for a group of `world_size` ranks.

        Raises:
            ConfigError: a setting is out of its range, or the workspaces would take more than they may.
        """

        def wrong(name: str, wanted: str, hint: str = "") -> ConfigError:
            return ConfigError(f"{who} setting {name}: wanted {wanted}, found {options[name]!r}{hint}")

        if options["multicast"]:
            raise wrong(
                "multicast",
                "false",
                ": this release calls only kernels that need no NVLink multicast, a resource of the whole host",
            )
        if options["algorithm"] not in ("auto", "one_shot", "two_shot"):
            raise wrong("algorithm", "auto, one_shot or two_shot")
        for name in ("max_tokens", "hidden", "open_bytes"):
            if options[name] < 0:
                raise wrong(name, "0 or more")
        tokens, hidden = options["max_tokens"], options["hidden"]
        if bool(tokens) != bool(hidden):
            name = "hidden" if tokens else "max_tokens"
            raise wrong(name, "more than 0", f": {'max_tokens' if tokens else 'hidden'} is set, and they are a product")
        if not tokens and options["max_bytes"] < 4096:
            raise wrong("max_bytes", "4096 or more")
        if options["float32_max_bytes"] < 4096:
            raise wrong("float32_max_bytes", "4096 or more")
        if 0 < options["open_bytes"] < 4096:
            raise wrong("open_bytes", "0 for all, or 4096 and more: the backend is tried before it is used")
        wanted = (tokens * hidden or options["max_bytes"] // 2, options["float32_max_bytes"] // 4)
        most = (capacity.rounded(wanted[0]), capacity.rounded(wanted[1]))
        for elements, itemsize, name in (
            (most[0], 2, "max_tokens" if tokens else "max_bytes"),
            (most[1], 4, "float32_max_bytes"),
        ):
            limit = capacity.largest(world_size, itemsize)
            if elements > limit:
                raise wrong(
                    name,
                    f"messages of at most {limit * itemsize} bytes among {world_size} ranks",
                    f" ({elements * itemsize} bytes): the kernels count offsets in 32 bits",
                )
        needed = sum(capacity.physical(world_size, n, size) for n, size in zip(most, (2, 4), strict=True))
        if needed > options["max_workspace_bytes"]:
            raise wrong(
                "max_workspace_bytes",
                f"at least {needed} bytes for messages of {most[0] * 2} bytes, and {most[1] * 4} bytes of float32",
                ": raise it, or lower max_bytes, max_tokens or float32_max_bytes",
            )
        opened = options["open_bytes"]
        at_open = most if not opened else (min(most[0], _rounded(opened, 2)), min(most[1], _rounded(opened, 4)))
        return cls(most, at_open, options["any_topology"])


def _rounded(nbytes: int, itemsize: int) -> int:
    return capacity.rounded(-(-nbytes // itemsize))
