"""Settings of backends: a table, a flat variable or a nested argument, checked once the backends are known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from commplane.config import Config
from commplane.errors import ConfigError

DECLARED: Mapping[str, Mapping[str, Any]] = {
    "custom_ar": {"chunk_bytes": 65536, "isa": "auto", "spin": True, "factor": 1.5},
    "other": {"slots": 4},
}


def load(
    tmp_path: Path, file: str = "", environ: Mapping[str, str] | None = None, argument: Mapping[str, Any] | None = None
) -> Config:
    path = tmp_path / "commplane.toml"
    path.write_text(file)
    return Config.load(argument, {"COMMPLANE_CONFIG": str(path), **(environ or {})})


def test_what_nobody_sets_has_the_declared_default() -> None:
    assert Config().with_options(DECLARED).options == DECLARED


def test_a_table_a_flat_variable_and_a_nested_argument_name_the_same_option(tmp_path: Path) -> None:
    ways = [
        load(tmp_path, file="[custom_ar]\nchunk_bytes = 8\n"),
        load(tmp_path, environ={"COMMPLANE_CUSTOM_AR_CHUNK_BYTES": "8"}),
        load(tmp_path, argument={"custom_ar": {"chunk_bytes": 8}}),
        load(tmp_path, argument={"custom_ar.chunk_bytes": 8}),
    ]
    assert [c.with_options(DECLARED).options["custom_ar"]["chunk_bytes"] for c in ways] == [8] * 4


@pytest.mark.parametrize("file", [False, True], ids=["no file", "file"])
@pytest.mark.parametrize("environ", [False, True], ids=["no variable", "variable"])
@pytest.mark.parametrize("argument", [False, True], ids=["no argument", "argument"])
def test_of_any_set_of_sources_the_last_one_wins(tmp_path: Path, file: bool, environ: bool, argument: bool) -> None:
    config = load(
        tmp_path,
        file="[custom_ar]\nchunk_bytes = 1\n" if file else "",
        environ={"COMMPLANE_CUSTOM_AR_CHUNK_BYTES": "2"} if environ else None,
        argument={"custom_ar": {"chunk_bytes": 3}} if argument else None,
    ).with_options(DECLARED)
    wanted = 3 if argument else 2 if environ else 1 if file else 65536
    assert config.options["custom_ar"]["chunk_bytes"] == wanted


def test_the_source_of_an_option_is_known(tmp_path: Path) -> None:
    config = load(tmp_path, environ={"COMMPLANE_OTHER_SLOTS": "5"}).with_options(DECLARED)
    assert config.sources["other.slots"] == "environment variable COMMPLANE_OTHER_SLOTS"


@pytest.mark.parametrize(
    ("option", "raw", "value"),
    [
        ("chunk_bytes", "12", 12),
        ("isa", "avx2", "avx2"),
        ("spin", "0", False),
        ("factor", "2", 2.0),
        ("factor", 2, 2.0),
    ],
)
def test_an_option_has_the_type_of_its_default(option: str, raw: Any, value: Any) -> None:
    config = Config.load({"custom_ar": {option: raw}}, environ={}).with_options(DECLARED)
    found = config.options["custom_ar"][option]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("option", "raw", "wanted"),
    [
        ("chunk_bytes", "64K", "int such as 65536"),
        ("chunk_bytes", 1.5, "int such as 65536"),
        ("chunk_bytes", True, "int such as 65536"),
        ("isa", 5, "str such as 'auto'"),
        ("spin", "maybe", "bool such as True"),
        ("factor", "x", "float such as 1.5"),
        ("factor", True, "float such as 1.5"),
        ("factor", [1.0], "float such as 1.5"),
    ],
)
def test_an_option_of_the_wrong_type_names_setting_source_wanted_and_found(option: str, raw: Any, wanted: str) -> None:
    config = Config.load({"custom_ar": {option: raw}}, environ={})
    with pytest.raises(ConfigError) as caught:
        config.with_options(DECLARED)
    assert str(caught.value) == f"setting 'custom_ar.{option}' from argument: wanted {wanted}, found {raw!r}"


@pytest.mark.parametrize(
    ("file", "environ", "argument", "unknown", "source", "near"),
    [
        ("timeot = 1\n", {}, {}, "'timeot'", "file ", "'timeout'"),
        ("[custom_ar]\nchunk_byte = 1\n", {}, {}, "'custom_ar.chunk_byte'", "file ", "'custom_ar.chunk_bytes'"),
        ("[custm_ar]\nisa = 'x'\n", {}, {}, "'custm_ar.isa'", "file ", "'custom_ar.isa'"),
        ("", {"COMMPLANE_TIMEOT": "1"}, {}, "'COMMPLANE_TIMEOT'", "environment variable", "'COMMPLANE_TIMEOUT'"),
        (
            "",
            {"COMMPLANE_CUSTOM_AR_CHUNK_BYTE": "1"},
            {},
            "'COMMPLANE_CUSTOM_AR_CHUNK_BYTE'",
            "environment variable",
            "'COMMPLANE_CUSTOM_AR_CHUNK_BYTES'",
        ),
        ("", {"COMMPLANE_CONFG": "x"}, {}, "'COMMPLANE_CONFG'", "environment variable", "'COMMPLANE_CONFIG'"),
        ("", {}, {"backend": "a"}, "'backend'", "argument", "'backends'"),
        ("", {}, {"custom_ar": {"is": "x"}}, "'custom_ar.is'", "argument", "'custom_ar.isa'"),
        ("", {}, {"nothing_like_it": 1}, "'nothing_like_it'", "argument", "'"),
    ],
)
def test_an_unknown_key_is_refused_with_its_source_and_the_nearest_valid_name(
    tmp_path: Path, file: str, environ: dict[str, str], argument: dict[str, Any], unknown: str, source: str, near: str
) -> None:
    config = load(tmp_path, file, environ, argument)
    with pytest.raises(ConfigError) as caught:
        config.with_options(DECLARED)
    text = str(caught.value)
    assert text.startswith(f"unknown setting {unknown} from {source}")
    assert f"did you mean {near}" in text


def test_an_unknown_table_is_refused_also_when_it_is_empty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="custm_ar"):
        load(tmp_path, file="[custm_ar]\n").with_options(DECLARED)


def test_the_refusal_of_a_key_lists_all_valid_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, file="x = 1\n").with_options(DECLARED)
    for name in ("timeout", "backends", "custom_ar.chunk_bytes", "other.slots"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("file", "environ"),
    [("[gone]\nx = 1\n", {}), ("", {"COMMPLANE_GONE_X": "1"})],
    ids=["table", "variable"],
)
def test_settings_of_a_plugin_that_is_installed_but_not_loaded_are_let_through(
    tmp_path: Path, file: str, environ: dict[str, str]
) -> None:
    config = load(tmp_path, file, environ).with_options(DECLARED, absent=["gone"])
    assert config.options == DECLARED
    with pytest.raises(ConfigError):
        load(tmp_path, file, environ).with_options(DECLARED)


def test_two_ranks_that_set_an_option_from_different_sources_have_one_digest(tmp_path: Path) -> None:
    one = load(tmp_path, file="[other]\nslots = 5\n").with_options(DECLARED)
    other = load(tmp_path, environ={"COMMPLANE_OTHER_SLOTS": "5"}).with_options(DECLARED)
    assert one.digest == other.digest
