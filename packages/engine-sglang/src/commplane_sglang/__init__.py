"""commplane in SGLang: an entry point of ``sglang.srt.plugins``, loaded by SGLang itself.

Importing this loads neither torch nor SGLang.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """What SGLang calls in each of its processes: hook it, or say why not.

    Local. Where it raises, which SGLang logs, the ranks still learn of it in the vote at their first group.

    Raises:
        PluginCompatibilityError: the installed SGLang is not as wanted, or not one that this adapter knows; nothing of it was
            touched but the creation of groups, where this rank will say so.
    """
    from commplane_sglang.plugin import register as now

    now()
