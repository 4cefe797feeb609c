"""The range of FlashInfer is read from this wheel's metadata and held against what is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from commplane_flashinfer import versions
from commplane_flashinfer.probe import missing_module

pytestmark = pytest.mark.timeout(30)
WANTED = Requirement("flashinfer-python>=0.7.2")


def test_the_range_is_that_of_the_extra_in_the_metadata_of_this_distribution() -> None:
    found = versions.required()
    assert found is not None
    assert str(found.specifier) == ">=0.7.2"


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ("0.7.1", "wanted flashinfer-python>=0.7.2, found 0.7.1: pip install 'flashinfer-python>=0.7.2'"),
        (None, "wanted flashinfer-python>=0.7.2, found no metadata of it: pip install 'flashinfer-python>=0.7.2'"),
        ("unknown", "wanted flashinfer-python>=0.7.2, found 'unknown', which is no version: pip install"),
        ("0.7.2rc1", "wanted flashinfer-python>=0.7.2, found 0.7.2rc1: pip install"),
    ],
)
def test_another_version_is_refused_with_what_was_wanted_and_the_fix(found: str | None, text: str) -> None:
    assert (versions.refusal(WANTED, found) or "").startswith(text)


@pytest.mark.parametrize("found", ["0.7.2", "0.7.2.post1", "0.8.0.dev3", "1.0"])
def test_versions_in_the_range_are_served(found: str) -> None:
    assert versions.refusal(WANTED, found) is None


def test_without_metadata_of_its_own_it_says_so() -> None:
    def missing(name: str) -> Sequence[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    assert versions.required(missing) is None
    assert versions.required(lambda name: ["numpy", "not a requirement!!"]) is None
    assert "install commplane-flashinfer as a wheel" in (versions.refusal(None, "0.7.2") or "")


@pytest.mark.parametrize("name", ["torch", "flashinfer", "cuda.bindings", "pynvml"])
def test_what_flashinfer_cannot_be_imported_without_is_named(name: str) -> None:
    reason = missing_module(lambda asked: None if asked == name else asked)
    assert reason is not None
    assert reason.startswith(f"wanted the module {name}, found none: pip install ")


def test_a_package_that_is_not_there_hides_no_error() -> None:
    def find(name: str) -> object:
        if name == "cuda.bindings":
            raise ModuleNotFoundError("No module named 'cuda'")
        return name

    assert "cuda-bindings" in (missing_module(find) or "")


def test_a_stand_in_for_a_module_is_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", ModuleType("pynvml"))  # as some put one there; it has no spec
    reason = missing_module(lambda name: importlib.util.find_spec(name) if name == "pynvml" else name)
    assert reason == "wanted the module pynvml, found none: pip install nvidia-ml-py"
