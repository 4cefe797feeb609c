"""What a run of the kit said, for the tests of the kit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """What a run of the kit said: its exit code, its report as JSON (empty where it ended before the tests), and its output."""

    code: int
    report: dict[str, Any]
    output: str

    def outcome(self, test: str) -> str:
        """Of one test, by its id in the kit."""
        assert test in self.report["tests"], f"no test {test} among {list(self.report['tests'])}"
        return str(self.report["tests"][test]["outcome"])


Kit = Callable[..., Run]
