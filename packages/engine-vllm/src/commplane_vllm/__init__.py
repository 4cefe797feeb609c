"""commplane in vLLM: an entry point of ``vllm.general_plugins``, loaded by vLLM itself.

Importing this loads neither torch nor vLLM.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """What vLLM calls in each of its processes, sometimes more than once: hook it, or say why not. Local, idempotent.

    Raises:
        PluginCompatibilityError: the installed vLLM is not as wanted, or not one that this adapter knows; nothing of it was
            touched. vLLM does not start then.
    """
    from commplane_vllm.plugin import register as now

    now()
