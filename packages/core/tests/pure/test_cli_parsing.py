"""What the commands read from their arguments."""

from __future__ import annotations

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commplane.api import Collective
from commplane.bench.report import human_bytes
from commplane.cli import bench, doctor, main, plugins
from commplane.cli.parse import parse_size
from commplane.errors import ConfigError


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


def test_bench_without_arguments_is_an_in_place_all_reduce_sum() -> None:
    options = parse("bench")
    assert options.sizes is None and options.dtypes is None  # so that --overhead can have other ones
    assert options.collectives == [Collective.ALL_REDUCE]
    assert (options.op, options.pin, options.out_of_place, options.overhead, options.hidden) == ("sum", None, False, False, 4096)


def test_bench_reads_collectives_once_each_in_the_order_given() -> None:
    options = parse("bench", "--collectives", "barrier, all_reduce,barrier", "--op", "max", "--pin", "both")
    assert options.collectives == [Collective.BARRIER, Collective.ALL_REDUCE]
    assert (options.op, options.pin) == ("max", "both")


def test_bench_knows_every_collective_but_the_one_that_tune_measures() -> None:
    known = [c for c in Collective if c is not Collective.ALL_REDUCE_RMS_NORM_QUANT]
    assert parse("bench", "--collectives", ",".join(known)).collectives == known
    with pytest.raises(SystemExit):
        parse("bench", "--collectives", "all_reduce_rms_norm_quant")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--overhead", "--plot", "x.png"], "--overhead measures all_reduce sum as a table, found --plot"),
        (["--overhead", "--collectives", "barrier", "--op", "max"], "found --collectives, --op: leave it out"),
        (["--overhead", "--out-of-place"], "found --out-of-place"),
        (["--overhead", "--graph"], "found --graph"),
        (["--startup", "--device", "cpu", "--graph"], "found --device, --graph: leave it out"),
        (["--collectives", "barrier", "--plot", "x.png"], "a barrier has none"),
        (["--json", "no/such/folder.json"], "folder of 'no/such/folder.json' does not exist"),
    ],
)
def test_what_bench_cannot_do_is_said_before_any_rank_starts(arguments: list[str], words: str) -> None:
    options = parse("bench", *arguments)
    with pytest.raises(ConfigError, match=words):
        options.call(options)


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "--sizes", "many"],
        ["bench", "--ranks", "0"],
        ["bench", "--ranks", "two"],
        ["bench", "--rounds", "0"],
        ["bench", "--collectives", "all_to_all"],
        ["bench", "--collectives", ","],
        ["bench", "--sizes", ","],
        ["bench", "--backends", ","],
        ["bench", "--op", "prod"],
        ["bench", "--pin", "yes"],
        ["bench", "--hidden", "0"],
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
