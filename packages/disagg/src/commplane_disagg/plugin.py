"""The entry point. Importing it loads neither torch nor any engine."""

from __future__ import annotations
