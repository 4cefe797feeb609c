"""The pytest plugin: its options, what is skipped and why, expected failures, the report."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kit_run import Kit

BITS = "commplane_conformance.comm.test_bits"
LIFE = "commplane_conformance.comm.test_life"
ZERO = f"{BITS}::test_the_sum_of_negative_zeros_is_negative_zero"
ZERO_ID = "bits.py::test_the_sum_of_negative_zeros_is_negative_zero"
LITERAL = f"{LIFE}::test_the_api_number_is_a_literal"
LITERAL_ID = "life.py::test_the_api_number_is_a_literal"


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A file of expected failures, empty."""
    return tmp_path / "expected.txt"


def test_the_plugin_alone_loads_neither_commplane_nor_torch() -> None:
    code = "import sys, commplane_conformance.plugin; print(sorted({'commplane', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_the_kit_is_not_spread_over_workers(kit: Kit) -> None:
    run = kit("wrong_plugins:Honest", "-p", "spreads", "--numprocesses", "2")
    assert run.code == 4
    assert "wanted no pytest-xdist, found -n" in run.output


def test_without_a_backend_the_tests_refuse_to_run(kit: Kit) -> None:
    run = kit("wrong_plugins:Honest", backend="")
    assert run.code == 4
    assert "want --commplane-backend NAME, --commplane-engine NAME or --commplane-store NAME" in run.output


def test_an_unknown_backend_is_an_error_that_lists_what_there_is(kit: Kit) -> None:
    run = kit("wrong_plugins:Honest", backend="subjcet")
    assert run.code == 4
    assert "'subjcet'" in run.output and "subject" in run.output and "torch" in run.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--commplane-ranks", "two"), "wanted numbers of ranks from 2 up"),
        (("--commplane-ranks", "1,2"), "wanted numbers of ranks from 2 up"),
        (("--commplane-device", "cuda"), "serves device cpu, found --commplane-device cuda"),
        (("--commplane-expected-failures", "nothing.txt"), "'nothing.txt' does not exist"),
    ],
)
def test_a_wrong_option_is_one_sentence(kit: Kit, options: tuple[str, ...], words: str) -> None:
    run = kit("wrong_plugins:Honest", *options)
    assert run.code == 4
    assert words in run.output
    assert "Traceback" not in run.output


def test_the_head_and_the_report_say_what_was_tested(kit: Kit) -> None:
    run = kit("wrong_plugins:Honest", "--commplane-ranks", "2,3", tests=(LITERAL,))
    assert run.code == 0, run.output
    assert "subject from subject 1.0, comm API 1.3" in run.output
    assert (run.report["backend"], run.report["dist"], run.report["ranks"]) == ("subject", "subject 1.0", [2, 3])
    assert run.report["summary"] == {"passed": 1}
    assert run.report["tests"][LITERAL_ID]["clauses"] == ["S56"]


def test_what_is_declared_and_not_exercised_is_reported(kit: Kit) -> None:
    run = kit("wrong_plugins:Honest", "--commplane-ranks", "2", tests=(f"{ZERO}[float32-2-ranks]",))
    assert run.code == 0, run.output
    assert "dtype float32" not in run.report["unexercised"] and "capability all_reduce" not in run.report["unexercised"]
    assert {"dtype float16", "capability barrier", "op max"} <= set(run.report["unexercised"])
    assert "declared, but exercised by no test that passed: capability barrier" in run.output


def test_a_test_that_failed_exercises_nothing(kit: Kit) -> None:
    run = kit("wrong_plugins:AddsToZero", "--commplane-ranks", "2", tests=(f"{ZERO}[float32-2-ranks]",))
    assert run.code == 1
    assert {"dtype float32", "capability all_reduce"} <= set(run.report["unexercised"])
    assert "the sum of 1 float32 of -0.0" in run.report["tests"][f"{ZERO_ID}[float32-2-ranks]"]["reason"]


def test_skips_say_what_the_backend_lacks(kit: Kit) -> None:
    modules = tuple(f"commplane_conformance.comm.test_{name}" for name in ("fused", "bits", "symmetric"))
    run = kit("lean_plugins", "--commplane-ranks", "2", tests=modules)
    assert run.code == 0, run.output
    reasons = {entry.get("reason") for entry in run.report["tests"].values() if entry["outcome"] == "skipped"}
    assert "subject does not declare the capability symmetric_memory" in reasons
    assert "since comm API 1.1, subject is made for 1.0" in reasons
    assert "for numerics rank_order, subject declares unordered" in reasons
    assert all(reason in run.output for reason in reasons)


def test_what_would_prove_another_backend_is_skipped(kit: Kit) -> None:
    modules = tuple(f"commplane_conformance.comm.test_{name}" for name in ("groups", "all_reduce"))
    run = kit("half_plugins", "--commplane-ranks", "2", tests=modules)
    assert run.code == 0, run.output
    reason = {name.partition("[")[0]: entry.get("reason") for name, entry in run.report["tests"].items()}
    float32 = "the test uses float32, which subject does not declare"
    limits = "no call of this case is within the limits that subject declares"
    assert reason["groups.py::test_several_communicators_interleaved"] == float32
    assert reason["all_reduce.py::test_any_shape"] == limits
    assert run.outcome("all_reduce.py::test_any_layout[float16-sum-2-ranks]") == "passed"
    assert "messages below 4096 or above 8192 bytes went to other backends" in run.output


def test_a_test_whose_calls_all_went_to_another_backend_is_skipped(kit: Kit) -> None:
    run = kit("least_plugins", "--commplane-ranks", "2", tests=("commplane_conformance.comm.test_hot_path",))
    assert run.code == 0, run.output
    assert {entry["outcome"] for entry in run.report["tests"].values()} == {"skipped"}
    assert "no call of this case is within the limits that subject declares" in run.output


def test_an_expected_failure_does_not_fail_the_run(kit: Kit, listed: Path) -> None:
    listed.write_text(f"# known\n\n{ZERO_ID}  # the accumulator begins at 0.0\n")
    run = kit("wrong_plugins:AddsToZero", "--commplane-ranks", "2", "--commplane-expected-failures", str(listed), tests=(ZERO,))
    assert run.code == 0, run.output
    entry = run.report["tests"][f"{ZERO_ID}[float32-2-ranks]"]
    assert (entry["outcome"], entry["reason"]) == ("expected failure", "the accumulator begins at 0.0")


def test_an_expected_failure_that_passes_fails_the_run(kit: Kit, listed: Path) -> None:
    listed.write_text(f"{ZERO_ID}[float32-2-ranks]  # was fixed long ago\n")
    run = kit("wrong_plugins:Honest", "--commplane-ranks", "2", "--commplane-expected-failures", str(listed), tests=(ZERO,))
    assert run.code == 1
    assert run.outcome(f"{ZERO_ID}[float32-2-ranks]") == "failed" and run.outcome(f"{ZERO_ID}[float64-2-ranks]") == "passed"
    assert "was fixed long ago" in run.output


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("bits.py::test_of_nothing  # gone", "no test of the kit answers to: bits.py::test_of_nothing"),
        ("bitz.py::test_of_nothing  # gone", "bitz.py::test_of_nothing"),
        (f"{ZERO_ID}[float77-2-ranks]  # gone", "float77-2-ranks"),
        ("bits.py::test_of_nothing[9-ranks]  # gone", "test_of_nothing"),
        (f"{ZERO_ID}", "say why it fails"),
        (f"{ZERO_ID}  # one\n{ZERO_ID}  # two", "is there twice"),
    ],
)
def test_a_line_that_is_wrong_is_an_error(kit: Kit, listed: Path, line: str, words: str) -> None:
    listed.write_text(f"{line}\n")
    run = kit("wrong_plugins:Honest", "--commplane-ranks", "2", "--commplane-expected-failures", str(listed))
    assert run.code == 4
    assert words in run.output


def test_a_line_for_what_this_run_leaves_out_is_left_alone(kit: Kit, listed: Path) -> None:
    listed.write_text(f"faults.py::test_a_killed_rank  # another module\n{ZERO_ID}[float32-9-ranks]  # another size\n")
    run = kit("wrong_plugins:Honest", "--commplane-ranks", "2", "--commplane-expected-failures", str(listed), tests=(ZERO,))
    assert run.code == 0, run.output


def test_the_file_may_be_named_in_the_configuration(kit: Kit, tmp_path: Path) -> None:
    kit("wrong_plugins:Honest", backend="")  # makes the folder
    (tmp_path / "empty" / "pytest.ini").write_text("[pytest]\ncommplane_expected_failures = known.txt\n")
    (tmp_path / "empty" / "known.txt").write_text("bits.py::test_of_nothing  # gone\n")
    run = kit("wrong_plugins:Honest", "--commplane-ranks", "2")
    assert run.code == 4 and "bits.py::test_of_nothing" in run.output


def test_a_backend_that_cannot_be_built_says_so_in_every_test_and_starts_once(kit: Kit) -> None:
    run = kit("wrong_probe", "--commplane-ranks", "2", tests=(ZERO,))
    assert run.code == 1
    assert "only rank 0 has it" in run.output
    assert {entry["outcome"] for entry in run.report["tests"].values()} == {"failed"}


def below(pid: int) -> dict[int, str]:
    """The state, such as T for stopped, of each process that descends from `pid`."""
    lines = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            lines[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
    found: dict[int, str] = {}
    while more := [p for p, words in lines.items() if p not in found and int(words[1]) in (pid, *found)]:
        found.update({p: lines[p][0] for p in more})
    return found


def lives(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.timeout(180)
def test_ranks_end_with_a_pytest_that_is_killed_also_a_stopped_one(tmp_path: Path) -> None:
    test = "commplane_conformance.comm.test_faults::test_a_stopped_rank"
    options = ["-p", "no:cacheprovider", "--commplane-backend", "torch", "--commplane-ranks", "2"]
    command = [sys.executable, "-m", "pytest", "--pyargs", test, *options]
    # In a session of its own, so that no terminal ends what is stopped.
    kit = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while "T" not in (ranks := below(kit.pid)).values():
            assert kit.poll() is None, "the run ended before a rank was stopped"
            time.sleep(0.05)
    finally:
        kit.kill()
        kit.wait()
    while left := [pid for pid in ranks if lives(pid)]:  # until the deadline of the test
        time.sleep(0.05)
    assert len(ranks) >= 3 and not left
