"""The pytest plugin: options, what is run for which backend, expected failures, the report.

Loaded in every pytest run of an environment that has this wheel, so importing it loads nothing but pytest: not commplane either,
which may be the very thing that is broken there. Without ``--commplane-backend``, ``--commplane-engine`` or ``--commplane-store``
it only defines its options and markers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from commplane_conformance.report import Report
    from commplane_conformance.subject import AnySubject

SUBJECT: pytest.StashKey[AnySubject] = pytest.StashKey()
REPORT: pytest.StashKey[Report] = pytest.StashKey()

_HERE = Path(__file__).parent
_RANKS = (2, 3, 4)
_FOLDERS = {"backend": "comm", "engine": "transfer", "store": "pages"}
"""Option -> where the tests of that kind are."""

_MARKERS = {
    "clause(*numbers)": "clauses that the test proves, such as S13 of docs/semantics.md",
    "needs(*capabilities)": "the subject has to declare these, else the test is skipped",
    "needs_dtype(name)": "the backend has to declare this dtype, which the test uses, else the test is skipped",
    "numerics(kind)": "the backend has to promise this class of numerics, else the test is skipped",
    "since(major, minor)": "the subject has to be made for this API or a later one, else the test is skipped",
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


def _option(text: str) -> tuple[str, Any]:
    key, sep, value = text.partition("=")
    if not (sep and key):
        raise argparse.ArgumentTypeError(f"wanted KEY=VALUE, such as streams=2, found {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("commplane", "commplane conformance")
    group.addoption("--commplane-backend", metavar="NAME", help="the installed backend that is to prove itself")
    group.addoption("--commplane-engine", metavar="NAME", help="the installed transfer engine that is to prove itself")
    group.addoption("--commplane-store", metavar="NAME", help="the installed page store that is to prove itself")
    group.addoption(
        "--commplane-option",
        metavar="KEY=VALUE",
        type=_option,
        action="append",
        default=[],
        help="a setting of the engine or store, its value as JSON or as text; may be repeated",
    )
    group.addoption("--commplane-ranks", metavar="LIST", type=_ranks, default=_RANKS, help="sizes of the groups (default 2,3,4)")
    group.addoption(
        "--commplane-hosts",
        metavar="N",
        type=int,
        default=1,
        help="hosts that the ranks of a backend are spread over, told apart by the setting host_alias (default 1)",
    )
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
    asked = {kind: config.getoption(f"commplane_{kind}") for kind in _FOLDERS}
    asked = {kind: name for kind, name in asked.items() if name is not None}
    if not asked:
        return
    if len(asked) > 1:
        found = " and ".join(f"--commplane-{kind}" for kind in asked)
        raise pytest.UsageError(f"one run of the kit proves one thing, wanted one of its options, found {found}")
    if config.getoption("dist", "no") != "no" or hasattr(config, "workerinput"):
        raise pytest.UsageError("the kit starts processes of its own, wanted no pytest-xdist, found -n: leave it out or add -n 0")
    from commplane.errors import CommplaneError
    from commplane_conformance.expected import ExpectedFailuresError, read_expected
    from commplane_conformance.report import Report

    try:
        subject = _find(config, *next(iter(asked.items())))
        path = _expected_file(config)
        expected = {} if path is None else read_expected(path)
    except (CommplaneError, ExpectedFailuresError) as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[SUBJECT] = subject
    config.stash[REPORT] = Report(subject, expected)


def _find(config: pytest.Config, kind: str, name: str) -> AnySubject:
    full, options = config.getoption("commplane_full"), dict(config.getoption("commplane_option"))
    if kind == "backend":
        from commplane_conformance.subject import find_subject

        if options:
            raise pytest.UsageError("--commplane-option is for an engine or a store; a backend's are settings of commplane")
        hosts = config.getoption("commplane_hosts")
        if hosts < 1:
            raise pytest.UsageError(f"--commplane-hosts wants 1 or more, found {hosts}")
        return find_subject(name, config.getoption("commplane_ranks"), config.getoption("commplane_device"), full, hosts)
    from commplane_conformance.provider import find_engine, find_store

    return (find_engine if kind == "engine" else find_store)(name, options, full)


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


def _of_another_kind(path: Path, subject: AnySubject) -> bool:
    others = (_HERE / folder for folder in _FOLDERS.values() if folder != subject.folder)
    return any(folder in (path, *path.parents) for folder in others)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    subject = config.stash.get(SUBJECT, None)
    return True if subject is not None and _of_another_kind(collection_path, subject) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if _of_the_kit(item)]
    if not ours:
        return
    report = config.stash.get(REPORT, None)
    if report is None:
        raise pytest.UsageError(
            "the tests of commplane_conformance want --commplane-backend NAME, --commplane-engine NAME or --commplane-store NAME"
        )
    from commplane_conformance import marks

    others = [item for item in ours if _of_another_kind(item.path, report.subject)]  # those that were named themselves
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
        ours = [item for item in ours if item not in others]
    needs = marks.Needs(report.subject)
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
            outcome.sections.append(("commplane conformance", f"{report.subject.page}, {', '.join(clauses)}"))
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
