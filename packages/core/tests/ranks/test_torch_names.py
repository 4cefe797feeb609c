"""What core takes from torch by name."""

from __future__ import annotations

import importlib

import pytest
import torch

from commplane.cli.parse import DTYPE_ALIASES


@pytest.mark.parametrize(("alias", "name"), DTYPE_ALIASES.items())
def test_every_dtype_alias_stands_for_a_dtype_of_torch(alias: str, name: str) -> None:
    assert isinstance(getattr(torch, name), torch.dtype)
    assert alias != name


@pytest.mark.parametrize(
    "module",
    [
        "commplane.agree.canary",
        "commplane.backends.torch_dist",
        "commplane.ops",
        "commplane.ops.fake",
        "commplane.ops.gradients",
        "commplane.ops.kernels",
        "commplane.ops.library",
    ],
)
def test_modules_that_need_torch_export_what_they_say(module: str) -> None:
    loaded = importlib.import_module(module)
    assert [name for name in loaded.__all__ if not hasattr(loaded, name)] == []
