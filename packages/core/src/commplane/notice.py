"""Warnings that are given in the middle of a joint step, where raising on one rank would leave the others waiting."""

from __future__ import annotations

import logging
import warnings

from commplane.errors import CommplaneWarning

__all__ = ["notice"]


def notice(text: str, stacklevel: int = 2) -> None:
    """Warn with `CommplaneWarning`; where the user made warnings errors, log the text as an error instead. Never raises."""
    try:
        warnings.warn(text, CommplaneWarning, stacklevel=stacklevel + 1)
    except CommplaneWarning:
        logging.getLogger("commplane").error("%s", text)
