"""Expected failures: a file in the backend's own repository that says which tests fail, and why.

One line each: the id of a test, then ``#`` and the reason. ``faults.py::test_a_killed_rank`` is that test in all its cases;
``faults.py::test_a_killed_rank[2-ranks]`` is one case. Every line is strict: a test that is listed and passes is a failure, and a
line that no test answers to is an error, so the file cannot outlive what it describes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import pytest

__all__ = ["ExpectedFailuresError", "id_of", "read_expected", "reason_for", "unknown"]


class ExpectedFailuresError(Exception):
    """The file of expected failures is wrong; the text says where."""


def id_of(item: pytest.Item) -> str:
    """The id of a test inside the kit, whatever folder it lies in: ``faults.py::test_x[2-ranks]``."""
    return f"{item.path.name.removeprefix('test_')}::{item.nodeid.partition('::')[2]}"


def read_expected(path: Path) -> dict[str, str]:
    """Reason by id, as written.

    Raises:
        ExpectedFailuresError: a line without a reason, or an id that is there twice.
    """
    if not path.is_file():
        raise ExpectedFailuresError(f"file of expected failures {str(path)!r} does not exist")
    out: dict[str, str] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, reason = (part.strip() for part in line.partition("  #"))
        if not reason:
            raise ExpectedFailuresError(f"{path}:{number}: wanted 'ID  # reason', found {line!r}: say why it fails")
        if name in out:
            raise ExpectedFailuresError(f"{path}:{number}: {name!r} is there twice")
        out[name] = reason
    return out


def reason_for(expected: Mapping[str, str], name: str) -> str | None:
    """Why the test with the id `name` is expected to fail, or None."""
    return expected.get(name, expected.get(name.partition("[")[0]))


def unknown(expected: Iterable[str], names: Collection[str], modules: Collection[str], ranks: Collection[int]) -> list[str]:
    """Those lines that no test answers to, as far as this run can tell.

    Args:
        expected: the ids of the file.
        names: ids of the tests that were collected.
        modules: the modules of the kit, such as ``bits.py``: a line for one of them that was not collected is left alone.
        ranks: sizes of groups of this run: a line for a case with another size is left alone.
    """
    collected = {name.partition("::")[0] for name in names}
    there = set(names) | {name.partition("[")[0] for name in names}

    def is_unknown(line: str) -> bool:
        module, case = line.partition("::")[0], re.search(r"\[.*?(\d+)-ranks\]$", line)
        if module in modules and (module not in collected or (case is not None and int(case[1]) not in ranks)):
            return line.partition("[")[0] not in there and module in collected
        return line not in there

    return [line for line in expected if is_unknown(line)]
