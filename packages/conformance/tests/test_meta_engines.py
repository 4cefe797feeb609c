"""The kit finds what it is there to find in transfer engines, and an honest one passes; its options for them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from honest_engine import CAUGHT_BY
from kit_run import Kit

import commplane_conformance

QUICK = ("WritesBeside", "TellsTwice", "WritesWhatIsInside")


def node(test: str) -> tuple[str, str]:
    """The argument for pytest, and the id in the kit."""
    module, _, name = test.partition("::")
    return f"commplane_conformance.transfer.test_{module}::{name}", f"{module}.py::{name}"


@pytest.mark.timeout(150)
@pytest.mark.parametrize("engine", [pytest.param(e, marks=[] if e in QUICK else [pytest.mark.long]) for e in CAUGHT_BY])
def test_a_wrong_engine_fails_the_test_that_is_meant_for_it(kit: Kit, engine: str) -> None:
    argument, name = node(CAUGHT_BY[engine])
    run = kit(f"engine_plugins:{engine}", tests=(argument,), kind="engine")
    for left in Path("/dev/shm").glob("subject-*-*"):
        if re.fullmatch(r"subject-\d+-\d+", left.name):
            left.unlink(missing_ok=True)
    assert run.code == 1 and run.outcome(name) == "failed", run.output
    assert re.search(r"docs/write-an-engine\.md, T\d+", run.output)


@pytest.mark.long
@pytest.mark.timeout(170)
def test_an_honest_engine_passes_these(kit: Kit) -> None:
    names = [node(test) for test in CAUGHT_BY.values()]
    run = kit("engine_plugins:HonestEngine", tests=tuple(argument for argument, _ in names), kind="engine")
    assert run.code == 0, run.output
    assert {run.outcome(name) for _, name in names} == {"passed"}
    assert (run.report["engine"], run.report["unexercised"]) == ("subject", [])


@pytest.mark.long
@pytest.mark.timeout(600)
def test_an_honest_engine_passes_all(kit: Kit) -> None:
    run = kit("engine_plugins:HonestEngine", kind="engine")
    assert run.code == 0, run.output


@pytest.mark.timeout(60)
def test_only_the_tests_of_its_kind_are_collected(kit: Kit) -> None:
    run = kit("engine_plugins:HonestEngine", "--collect-only", "-q", kind="engine")
    assert run.code == 0, run.output
    assert "transfer/test_bytes.py" in run.output
    assert "comm/" not in run.output and "pages/" not in run.output


@pytest.mark.timeout(60)
def test_a_test_of_another_kind_that_is_named_is_not_run(kit: Kit) -> None:
    named = ("commplane_conformance.comm.test_bits", "commplane_conformance.transfer.test_refusals::test_a_second_pool")
    run = kit("engine_plugins:HonestEngine", tests=named, kind="engine")
    assert run.code == 0, run.output
    assert run.report["summary"] == {"passed": 1}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--commplane-store", "other"), "found --commplane-engine and --commplane-store"),
        (("--commplane-option", "streams"), "wanted KEY=VALUE, such as streams=2, found 'streams'"),
        (("--commplane-option", "no_such=1"), "engine 'subject' cannot be opened here: there is no option no_such"),
    ],
)
def test_a_wrong_option_is_one_sentence(kit: Kit, options: tuple[str, ...], words: str) -> None:
    run = kit("engine_plugins:HonestEngine", *options, kind="engine")
    assert run.code == 4
    assert words in run.output and "Traceback" not in run.output


@pytest.mark.timeout(60)
def test_an_unknown_engine_is_an_error_that_lists_what_there_is(kit: Kit) -> None:
    run = kit("engine_plugins:HonestEngine", backend="subjcet", kind="engine")
    assert run.code == 4
    assert "did you mean 'subject'?" in run.output


@pytest.mark.timeout(100)
def test_an_expected_failure_of_an_engine(kit: Kit, tmp_path: Path) -> None:
    argument, name = node(CAUGHT_BY["TellsTwice"])
    listed = tmp_path / "expected.txt"
    listed.write_text(f"{name}  # every fiftieth\n")
    run = kit("engine_plugins:TellsTwice", "--commplane-expected-failures", str(listed), tests=(argument,), kind="engine")
    assert run.code == 0, run.output
    assert run.outcome(name) == "expected failure"


def test_every_test_of_engines_cites_a_clause_that_the_page_has() -> None:
    kit = Path(commplane_conformance.__file__).parent / "transfer"
    page = Path(__file__).parents[3] / "docs" / "write-an-engine.md"
    if not page.is_file():
        pytest.skip(f"wants the repository's page {page.name}: run it in a checkout")
    there = set(re.findall(r"\*\*(T\d+)\*\*", page.read_text()))
    cited = set()
    for module in sorted(kit.glob("test_*.py")):
        for node_ in ast.parse(module.read_text()).body:
            if isinstance(node_, ast.FunctionDef) and node_.name.startswith("test_"):
                calls = [d for d in node_.decorator_list if isinstance(d, ast.Call) and getattr(d.func, "id", "") == "clause"]
                clauses = {a.value for call in calls for a in call.args if isinstance(a, ast.Constant)}
                assert clauses, f"{module.name}::{node_.name} cites no clause"
                cited |= clauses
    assert cited == there
