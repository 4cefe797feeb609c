"""Settings: where they come from, which one wins, and what is refused."""

from __future__ import annotations

import re
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


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> dict[str, str]:
        path = tmp_path / "commplane.toml"
        path.write_text(text)
        return {"COMMPLANE_CONFIG": str(path)}

    return write


def test_without_any_source_every_setting_has_its_default() -> None:
    config = Config.load(environ={})
    assert config == Config()
    assert (config.timeout, config.backends, config.numerics, config.device) == (30.0, (), "any", "auto")
    assert config.sources == {}


def test_argument_wins_over_environment_over_file_over_default(write: Any) -> None:
    file = write("timeout = 1\nnumerics = 'rank_order'\ndevice = 'cuda'\n")
    environ = file | {"COMMPLANE_TIMEOUT": "2", "COMMPLANE_DEVICE": "cpu"}
    config = Config.load({"timeout": 3}, environ)
    assert (config.timeout, config.device, config.numerics, config.run_timeout) == (3.0, "cpu", "rank_order", None)


def test_each_value_says_where_it_came_from(write: Any) -> None:
    file = write("timeout = 1\nnumerics = 'rank_order'\n")
    config = Config.load({"device": "cpu"}, file | {"COMMPLANE_TIMEOUT": "2"})
    assert config.sources == {
        "timeout": "environment variable COMMPLANE_TIMEOUT",
        "numerics": f"file {file['COMMPLANE_CONFIG']}",
        "device": "argument",
    }


def test_the_process_environment_is_read_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMPLANE_TIMEOUT", "7")
    monkeypatch.delenv("COMMPLANE_CONFIG", raising=False)
    assert Config.load().timeout == 7.0


def test_variables_of_others_are_left_alone() -> None:
    assert Config.load(environ={"TIMEOUT": "x", "commplane_timeout": "x", "_COMMPLANE_TIMEOUT": "x"}) == Config()


@pytest.mark.parametrize(
    ("key", "raw", "value"),
    [
        ("backends", "a, b,,", ("a", "b")),
        ("backends", ["a", "b"], ("a", "b")),
        ("plugins", "-a,b", ("-a", "b")),
        ("timeout", "0.5", 0.5),
        ("timeout", 5, 5.0),
        ("startup_timeout", None, None),
        ("skip_compat_check", "yes", True),
        ("skip_compat_check", "off", False),
        ("skip_compat_check", "", False),
        ("skip_compat_check", 1, True),
        ("trace_hooks", True, True),
        ("host_alias", "rack-1", "rack-1"),
        ("flight_records", "0", 0),
        ("flight_records", 64, 64),
        ("flight_dir", "records", "records"),
        ("flight_dir", Path("records"), "records"),
        ("flight_dir", "", None),
    ],
)
def test_a_value_is_read_in_every_spelling_it_may_have(key: str, raw: Any, value: Any) -> None:
    assert getattr(Config.load({key: raw}, environ={}), key) == value


@pytest.mark.parametrize(
    ("key", "raw", "wanted"),
    [
        ("timeout", "soon", "a number of seconds above 0"),
        ("timeout", 0, "a number of seconds above 0"),
        ("timeout", -1, "a number of seconds above 0"),
        ("timeout", "nan", "a number of seconds above 0"),
        ("timeout", "inf", "a number of seconds above 0"),
        ("timeout", True, "a number of seconds above 0"),
        ("timeout", None, "a number of seconds above 0"),
        ("startup_timeout", "never", "a number of seconds above 0"),
        ("run_timeout", [1], "a number of seconds above 0"),
        ("backends", 5, "a list of names, such as a,b"),
        ("backends", ["a", 5], "a list of names, such as a,b"),
        ("backends", {"custom_ar": {}}, "a list of names, such as a,b"),
        ("plugins", None, "a list of names, such as a,b"),
        ("numerics", "exact", "one of any, rank_order"),
        ("device", "tpu", "one of auto, cpu, cuda"),
        ("device", ["cpu"], "one of auto, cpu, cuda"),
        ("skip_compat_check", "maybe", "1 or 0"),
        ("trace_hooks", 2, "1 or 0"),
        ("flight_records", -1, "a whole number from 0 to 1000000"),
        ("flight_records", "1000001", "a whole number from 0 to 1000000"),
        ("flight_records", 2.5, "a whole number from 0 to 1000000"),
        ("flight_records", True, "a whole number from 0 to 1000000"),
        ("flight_records", None, "a whole number from 0 to 1000000"),
        ("flight_dir", 5, "text"),
    ],
)
def test_a_wrong_value_names_setting_source_wanted_and_found(key: str, raw: Any, wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.load({key: raw}, environ={})
    assert str(caught.value) == f"setting {key!r} from argument: wanted {wanted}, found {raw!r}"


def test_a_wrong_value_in_the_environment_names_the_variable() -> None:
    with pytest.raises(ConfigError, match=r"setting 'timeout' from environment variable COMMPLANE_TIMEOUT: .* found 'x'"):
        Config.load(environ={"COMMPLANE_TIMEOUT": "x"})


def test_a_wrong_value_in_the_file_names_the_file(write: Any) -> None:
    environ = write("timeout = 'x'\n")
    with pytest.raises(ConfigError, match=f"setting 'timeout' from file {re.escape(environ['COMMPLANE_CONFIG'])}: "):
        Config.load(environ=environ)


def test_a_wrong_value_that_a_later_source_would_replace_is_still_refused() -> None:
    with pytest.raises(ConfigError, match="COMMPLANE_TIMEOUT"):
        Config.load({"timeout": 3}, {"COMMPLANE_TIMEOUT": "x"})


def test_a_missing_file_is_refused_with_the_variable_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml' named by COMMPLANE_CONFIG cannot be read"):
        Config.load(environ={"COMMPLANE_CONFIG": str(tmp_path / "none.toml")})


def test_a_folder_as_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="named by COMMPLANE_CONFIG cannot be read"):
        Config.load(environ={"COMMPLANE_CONFIG": str(tmp_path)})


def test_bad_toml_is_refused_with_its_place(write: Any) -> None:
    with pytest.raises(ConfigError, match=r"commplane\.toml' named by COMMPLANE_CONFIG is not valid TOML: .*line 2"):
        Config.load(environ=write("timeout = 1\ntimeout =\n"))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        Config.load(environ={"COMMPLANE_CONFIG": str(path)})


def test_start_up_and_running_use_the_general_timeout_until_they_have_their_own() -> None:
    assert (Config(timeout=5.0).startup, Config(timeout=5.0).run) == (5.0, 5.0)
    own = Config(timeout=5.0, startup_timeout=60.0, run_timeout=1.0)
    assert (own.startup, own.run) == (60.0, 1.0)


def test_shared_holds_what_must_be_equal_and_not_what_belongs_to_one_rank() -> None:
    shared = Config.load({"host_alias": "a", "trace_hooks": True}, environ={}).with_options(DECLARED).shared()
    assert "host_alias" not in shared and "trace_hooks" not in shared
    assert shared["timeout"] == 30.0
    assert shared["custom_ar.chunk_bytes"] == 65536
    assert shared["backends"] == []


@pytest.mark.parametrize(
    "argument",
    [
        {"backends": "a"},
        {"plugins": "-a"},
        {"timeout": 5},
        {"startup_timeout": 5},
        {"run_timeout": 5},
        {"numerics": "rank_order"},
        {"device": "cpu"},
        {"skip_compat_check": True},
        {"custom_ar": {"chunk_bytes": 1}},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_the_digest_changes_with_each_shared_value(argument: dict[str, Any]) -> None:
    changed = Config.load(argument, environ={}).with_options(DECLARED)
    assert changed.digest != Config().with_options(DECLARED).digest


def test_the_digest_does_not_depend_on_the_order_in_which_backends_were_found() -> None:
    backwards = {name: dict(reversed(list(options.items()))) for name, options in reversed(list(DECLARED.items()))}
    assert Config().with_options(backwards).digest == Config().with_options(DECLARED).digest


@pytest.mark.parametrize("argument", [{"host_alias": "a"}, {"trace_hooks": True}, {"flight_records": 0}, {"flight_dir": "a"}])
def test_the_digest_does_not_change_with_a_value_of_one_rank(argument: dict[str, Any]) -> None:
    assert Config.load(argument, environ={}).digest == Config().digest


def test_the_digest_depends_on_values_and_not_on_their_source() -> None:
    assert Config.load({"timeout": 5}, environ={}).digest == Config.load(environ={"COMMPLANE_TIMEOUT": "5.0"}).digest


@pytest.mark.parametrize(
    ("plugins", "allowed"),
    [
        ("", "abc"),
        ("a", "a"),
        ("a,b", "ab"),
        ("-a", "bc"),
        ("-a,-b", "c"),
        ("a,-b", "a"),
        ("a,-a", ""),
    ],
)
def test_the_plugin_list_allows_or_denies(plugins: str, allowed: str) -> None:
    config = Config.load({"plugins": plugins}, environ={})
    assert "".join(name for name in "abc" if config.allows(name)) == allowed
