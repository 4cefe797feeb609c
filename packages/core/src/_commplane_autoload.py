"""What `import torch` runs, by the entry point ``torch.backends``: torch.distributed learns the name ``commplane``.

Outside of the package, so that it costs next to nothing where nobody asks for the backend: `commplane` itself is imported when
the first process group is made.
"""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["create", "register"]

NAME = "commplane"


def create(options: Any, backend_options: Any = None) -> Any:
    """What torch calls to make one process group; see `commplane.c10d.create`."""
    from commplane.c10d import create as make

    return make(options, backend_options)


def register() -> None:
    """Register the backend. Local, idempotent; never raises, because `import torch` would fail with it."""
    try:
        import torch.distributed as dist

        if dist.is_available() and NAME.upper() not in dist.Backend._plugins:
            dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu", "cuda"])
    except Exception as error:
        sys.stderr.write(f"commplane: the torch.distributed backend is not registered: {type(error).__name__}: {error}\n")
