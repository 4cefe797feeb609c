"""The torchrun jobs whose results the tests here look at: one for most of them, because importing the clients takes seconds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clients_torchrun import run_job

DEFAULT = (
    "asked:llama",
    "asked:qwen2",
    "asked:qwen3",
    "asked:mixtral",
    "asked:qwen3_moe",
    "bfloat16:llama",
    "trained:qwen3",
    "accelerated",
)
LONG = ("compiled:llama", "compiled:qwen3", "trained:llama", "trained:mixtral", "bfloat16:qwen3_moe")

SECONDS = {DEFAULT: 150.0, LONG: 500.0}
"""That a job may take. Most of the first is importing transformers, twice, of the other compiling."""

Results = Callable[[str], list[dict[str, Any]]]


def _wanted(part: str) -> str:
    return "accelerate" if part == "accelerated" else "transformers"


def _there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank has of a part; the job that has it runs when the first of its parts is asked for."""
    found: dict[str, list[dict[str, Any]]] = {}

    def of(part: str) -> list[dict[str, Any]]:
        package = _wanted(part)
        if not _there(package):
            pytest.skip(f"wants {package}: pip install {package}")
        job = DEFAULT if part in DEFAULT else LONG
        if part not in found:
            folder: Path = tmp_path_factory.mktemp("clients")
            ranks = run_job(folder, [p for p in job if _there(_wanted(p))], SECONDS[job])
            for p in (p for p in job if _there(_wanted(p))):
                found[p] = [{**rank[p], "plan": rank["plan"]} for rank in ranks]
        return found[part]

    return of
