"""The entry point. Importing it loads neither torch nor any store."""

from __future__ import annotations
