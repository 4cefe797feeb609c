"""What the commands read from their arguments and print for people and for programs."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commplane.bench import Row, table
from commplane.bench.report import human_bytes
from commplane.cli import bench, doctor, main, plugins
from commplane.cli.parse import parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("64", 64),
        ("64B", 64),
        ("8K", 8192),
        ("8k", 8192),
        ("8KB", 8192),
        ("64KiB", 65536),
        ("64 KiB", 65536),
        (" 1M ", 1 << 20),
        ("1MB", 1 << 20),
        ("2G", 2 << 30),
    ],
)
def test_a_size_is_read_in_powers_of_1024(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "K", "1.5K", "-1", "64Q", "8KK", "0x10", "1e3"])
def test_what_is_no_size_is_refused_with_what_is_wanted_and_found(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        parse_size(text)
    assert str(caught.value) == f"wanted a size such as 64, 8K or 1M, found {text!r}"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (64, "64 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1536 B"),
        (65536, "64 KiB"),
        (1 << 30, "1 GiB"),
    ],
)
def test_bytes_are_shown_in_the_largest_unit_that_divides_them(nbytes: int, text: str) -> None:
    assert human_bytes(nbytes) == text


@given(st.integers(0, 1 << 40))
def test_what_is_shown_reads_back_as_the_same_size(nbytes: int) -> None:
    assert parse_size(human_bytes(nbytes)) == nbytes


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for module in (bench, doctor, plugins):
        module.add_commands(commands)
    return parser.parse_args(arguments)


def test_bench_reads_lists_of_sizes_and_dtypes() -> None:
    options = parse("bench", "--sizes", "64, 8K,1M,", "--dtypes", "bf16, fp32,half,int8")
    assert options.sizes == [64, 8192, 1 << 20]
    assert options.dtypes == ["bfloat16", "float32", "float16", "int8"]


def test_bench_without_arguments_measures_the_sizes_that_its_help_names() -> None:
    options = parse("bench")
    assert (options.sizes[0], options.sizes[-1]) == (64, 16 << 20)
    assert options.dtypes == ["float32", "bfloat16"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "--sizes", "many"],
        ["bench", "--ranks", "0"],
        ["bench", "--ranks", "two"],
        ["bench", "--rounds", "0"],
        ["explain", "all_to_all"],
        ["explain", "--op", "prod"],
        ["explain", "--bytes", "many"],
        ["nonsense"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2_and_says_why(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_the_command_without_a_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


ROW = Row(
    backend="custom_ar",
    mode="staged",
    op="all_reduce",
    dtype="float32",
    bytes=65536,
    ranks=2,
    device="cpu",
    graph=False,
    median_us=12.5,
    p99_us=20.25,
    iterations=100,
    vs_torch=3.24,
)
TORCH = replace(ROW, backend="torch", median_us=40.5, vs_torch=1.0)


def test_a_row_as_json_has_exactly_these_keys() -> None:
    assert json.loads(json.dumps(ROW.to_json())) == {
        "backend": "custom_ar",
        "mode": "staged",
        "op": "all_reduce",
        "dtype": "float32",
        "bytes": 65536,
        "ranks": 2,
        "device": "cpu",
        "graph": False,
        "median_us": 12.5,
        "p99_us": 20.25,
        "iterations": 100,
        "vs_torch": 3.24,
    }


def test_the_table_has_a_column_a_backend_and_a_line_a_size() -> None:
    small = replace(ROW, bytes=64, median_us=1.5, vs_torch=None)
    title, head, *lines = table([TORCH, ROW, small]).splitlines()
    assert title == "all_reduce sum, float32, 2 ranks, cpu: median us a call (times torch)"
    assert head.split() == ["bytes", "torch", "custom_ar", "staged"]
    assert [line.split() for line in lines] == [["64", "KiB", "40.50", "12.50", "(3.2x)"], ["64", "B", "-", "1.50"]]


def test_the_table_keeps_its_columns_in_line() -> None:
    _title, *lines = table([TORCH, ROW, replace(ROW, mode="symmetric"), replace(TORCH, bytes=64)]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_each_dtype_has_a_table_of_its_own_with_only_its_own_columns() -> None:
    one, other = table([TORCH, ROW, replace(TORCH, dtype="int8")]).split("\n\n")
    assert "float32" in one and "custom_ar" in one
    assert "int8" in other and "custom_ar" not in other
    assert table([]) == ""
