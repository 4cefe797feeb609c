"""The page of settings says what the code does."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from commplane.config import FILE_VARIABLE, PREFIX, Config

SETTINGS = {f.name: f for f in fields(Config) if "parse" in f.metadata}


def page() -> str:
    packages = next(p for p in Path(__file__).resolve().parents if p.name == "packages")
    return (packages.parent / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")


def rows() -> dict[str, list[str]]:
    """The cells of the table of core's settings, by setting."""
    part = page().partition("\n## Core\n")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| `")]
    return {cells[0].strip("`"): cells for cells in lines}


def shown(default: Any) -> str:
    """A default as the page writes it: as TOML would, or the word unset."""
    if default is None:
        return "unset"
    return f"`{json.dumps(list(default) if isinstance(default, tuple) else default)}`"


def test_the_table_holds_every_setting_and_no_other_in_the_order_of_the_code() -> None:
    assert list(rows()) == list(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_has_its_variable_its_default_and_who_must_agree(name: str) -> None:
    cells, setting = rows()[name], SETTINGS[name]
    assert cells[1] == f"`{PREFIX}{name.upper()}`"
    assert cells[3] == shown(setting.default)
    assert cells[4] == ("no" if setting.metadata["per_rank"] else "yes")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_explained(name: str) -> None:
    assert f"\n**`{name}`**: " in page()


def test_the_variable_that_names_the_file_is_there() -> None:
    assert f"`{FILE_VARIABLE}`" in page()


def test_the_example_file_is_read_as_the_page_says(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", page(), flags=re.DOTALL)
    file = tmp_path / "settings.toml"
    file.write_text(example, encoding="utf-8")
    config = Config.load(environ={FILE_VARIABLE: str(file)}).with_options({"custom_ar": {"chunk_bytes": 65536}})
    assert (config.backends, config.timeout) == (("custom_ar",), 10.0)
    assert config.options["custom_ar"]["chunk_bytes"] == 131072
