"""Plugins by entry point. One that fails is logged and left out, in this process alone: what the adapter has to live with."""

import logging
import os
from importlib.metadata import entry_points

from sglang.srt.plugins.hook_registry import HookRegistry


def load_plugins():
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    for point in entry_points(group="sglang.srt.plugins"):
        if allowed and point.name not in allowed.split(","):
            continue
        try:
            point.load()()
        except Exception:
            logging.getLogger("sglang").exception("plugin %s failed", point.name)
    HookRegistry.apply_hooks()
