"""The pytest plugin: options, what is run for which backend, expected failures, the report.

Loaded in every pytest run of an environment that has this wheel, so importing it loads nothing but pytest: not commplane either,
which may be the very thing that is broken there. Without ``--commplane-backend`` it only defines its options and markers.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from commplane_conformance.report import Report
    from commplane_conformance.subject import Subject

SUBJECT: pytest.StashKey[Subject] = pytest.StashKey()
REPORT: pytest.StashKey[Report] = pytest.StashKey()

_HERE = Path(__file__).parent
_RANKS = (2, 3, 4)

_MARKERS = {
    "clause(*numbers)": "clauses of docs/semantics.md that the test proves, such as S13",
    "needs(*capabilities)": "the backend has to declare these, else the test is skipped",
    "needs_dtype(name)": "the backend has to declare this dtype, which the test uses, else the test is skipped",
    "numerics(kind)": "the backend has to promise this class of numerics, else the test is skipped",
    "since(major, minor)": "the backend has to be made for this comm API or a later one, else the test is skipped",
    "at_least(ranks)": "the smallest group that the test makes sense with",
}


def _ranks(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 2:
        raise argparse.ArgumentTypeError(f"wanted numbers of ranks from 2 up, such as 2,3,4, found {text!r}")
    return numbers


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("commplane", "commplane conformance")
    group.addoption("--commplane-backend", metavar="NAME", help="the installed backend that is to prove itself")
    group.addoption("--commplane-ranks", metavar="LIST", type=_ranks, default=_RANKS, help="sizes of the groups (default 2,3,4)")
    group.addoption(
        "--commplane-device", choices=["cpu", "cuda"], help="device of the tensors (default the backend's own, or cpu)"
    )
    group.addoption("--commplane-full", action="store_true", help="more sizes and rounds in each case")
    group.addoption("--commplane-report", metavar="FILE", type=Path, help="write the outcome of each test as JSON")
    group.addoption(
        "--commplane-expected-failures", metavar="FILE", type=Path, help="tests that fail and why, one 'ID  # reason' a line"
    )
    parser.addini("commplane_expected_failures", "file of expected failures, beside this file", default="")


def pytest_configure(config: pytest.Config) -> None:
    for name, text in _MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")
    name = config.getoption("commplane_backend")
    if name is None:
        return
    if config.getoption("dist", "no") != "no" or hasattr(config, "workerinput"):
        raise pytest.UsageError("the kit starts processes of its own, wanted no pytest-xdist, found -n: leave it out or add -n 0")
    from commplane.errors import CommplaneError
    from commplane_conformance.expected import ExpectedFailuresError, read_expected
    from commplane_conformance.report import Report
    from commplane_conformance.subject import find_subject

    try:
        subject = find_subject(
            name,
            config.getoption("commplane_ranks"),
            config.getoption("commplane_device"),
            config.getoption("commplane_full"),
        )
        path = _expected_file(config)
        expected = {} if path is None else read_expected(path)
    except (CommplaneError, ExpectedFailuresError) as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[SUBJECT] = subject
    config.stash[REPORT] = Report(subject, expected)


def _expected_file(config: pytest.Config) -> Path | None:
    given: Path | None = config.getoption("commplane_expected_failures")
    if given is not None:
        return given
    written = str(config.getini("commplane_expected_failures"))
    if not written:
        return None
    return (config.inipath.parent if config.inipath else config.rootpath) / written


def pytest_report_header(config: pytest.Config) -> list[str]:
    report = config.stash.get(REPORT, None)
    return [] if report is None else [f"commplane conformance {report.kit}: {report.subject.describe()}"]


def _of_the_kit(item: pytest.Item) -> bool:
    return _HERE in item.path.parents


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if _of_the_kit(item)]
    if not ours:
        return
    report = config.stash.get(REPORT, None)
    if report is None:
        raise pytest.UsageError("the tests of commplane_conformance want --commplane-backend NAME")
    from commplane_conformance import marks

    needs = marks.Needs(report.subject.spec)
    for item in ours:
        report.collected(item)
        reason = needs.refusal(item)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
            continue
        expected = report.expected_reason(item)
        if expected is not None:
            item.add_marker(pytest.mark.xfail(reason=expected, strict=True))
    lost = report.unknown_expectations()
    if lost:
        raise pytest.UsageError(f"expected failures that no test of the kit answers to: {', '.join(lost)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    outcome = yield
    report = item.config.stash.get(REPORT, None)
    if report is not None and _of_the_kit(item):
        from commplane_conformance import marks

        report.record(item, outcome)
        clauses = marks.clauses_of(item)
        if outcome.failed and clauses:
            outcome.sections.append(("commplane conformance", f"docs/semantics.md, {', '.join(clauses)}"))
    return outcome


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    report = config.stash.get(REPORT, None)
    if report is None or config.getoption("collectonly"):
        return
    terminalreporter.section("commplane conformance")
    for line in report.lines():
        terminalreporter.write_line(line)
    path: Path | None = config.getoption("commplane_report")
    if path is not None:
        report.write(path)
        terminalreporter.write_line(f"report in {path}")
