"""What a run of the kit found: the outcome of each test, and what the subject declares that no test exercised."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from commplane_conformance import marks
from commplane_conformance.expected import id_of, reason_for, unknown
from commplane_conformance.subject import AnySubject

__all__ = ["Report"]


class Report:
    """Collects while the tests run.

    Args:
        subject: what is under test.
        expected: reasons of expected failures by id.
    """

    def __init__(self, subject: AnySubject, expected: Mapping[str, str]) -> None:
        self.subject = subject
        self.kit = version("commplane-conformance")
        self._expected = expected
        self._tests: dict[str, dict[str, Any]] = {}
        self._exercised: set[str] = set()

    def collected(self, item: pytest.Item) -> None:
        """A test of the kit is there, whether it will run or not."""
        self._tests[id_of(item)] = {"outcome": "not run", "clauses": marks.clauses_of(item)}

    def expected_reason(self, item: pytest.Item) -> str | None:
        """Why `item` is expected to fail, or None."""
        return reason_for(self._expected, id_of(item))

    def unknown_expectations(self) -> list[str]:
        """Expected failures that name no test."""
        modules = [path.name.removeprefix("test_") for path in (Path(__file__).parent / self.subject.folder).glob("test_*.py")]
        return unknown(self._expected, self._tests, modules, self.subject.ranks)

    def record(self, item: pytest.Item, outcome: pytest.TestReport) -> None:
        """One phase of a test has ended."""
        entry = self._tests[id_of(item)]
        if hasattr(outcome, "wasxfail"):
            entry.update(outcome="expected failure", reason=outcome.wasxfail)
        elif outcome.skipped:
            text = outcome.longrepr[2] if isinstance(outcome.longrepr, tuple) else str(outcome.longrepr)
            entry.update(outcome="skipped", reason=text.removeprefix("Skipped: "))
        elif outcome.failed:
            crash = getattr(outcome.longrepr, "reprcrash", None)
            text = outcome.longreprtext if crash is None else crash.message
            entry.update(outcome="failed", reason=text, seconds=round(outcome.duration, 3))
        elif outcome.when == "call":
            entry.update(outcome="passed", seconds=round(outcome.duration, 3))
            self._exercise(item)

    def _exercise(self, item: pytest.Item) -> None:
        self._exercised.update(f"capability {c}" for c in marks.needs_of(item))
        self._exercised.update(self.subject.exercised(item))

    def unexercised(self) -> list[str]:
        """What the subject declares and no test that passed has used."""
        return [what for what in self.subject.declared() if what not in self._exercised]

    def lines(self) -> list[str]:
        """For the end of the run."""
        counts = Counter(entry["outcome"] for entry in self._tests.values())
        out = [f"{self.subject.describe()}: {', '.join(f'{n} {outcome}' for outcome, n in sorted(counts.items()))}"]
        skips = Counter(entry["reason"] for entry in self._tests.values() if entry["outcome"] == "skipped")
        out += [f"skipped {n}: {reason}" for reason, n in sorted(skips.items())]
        out += self.subject.notes()
        out += [f"declared, but exercised by no test that passed: {what}" for what in self.unexercised()]
        return out

    def write(self, path: Path) -> None:
        """As JSON."""
        found = {
            "kit": self.kit,
            **self.subject.to_json(),
            "summary": dict(Counter(entry["outcome"] for entry in self._tests.values())),
            "unexercised": self.unexercised(),
            "tests": self._tests,
        }
        path.write_text(json.dumps(found, indent=1) + "\n")
