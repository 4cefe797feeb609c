"""Was a plugin made for this core: the contract's version, and the plugin's own requirements re-read."""

from __future__ import annotations

import pytest
from dists import Wheels, register, spec

from commplane.api import BackendSpec, Capability, PageStoreSpec, SyncField, SyncSpec, TransferSpec, Vote
from commplane.api.versions import CACHE_API, COMM_API, TRANSFER_API, ApiVersion
from commplane.errors import CommplaneWarning, PluginCompatibilityError
from commplane.plugins import Kind, compat
from commplane.plugins.compat import check_api, check_requirements, contract_of


def backend(api: ApiVersion) -> BackendSpec:
    return BackendSpec(
        name="mine",
        api=api,
        factory="m:C",
        probe="m:p",
        capabilities={Capability.ALL_REDUCE},
        dtypes={"float32"},
        device="cpu",
    )


def test_each_kind_of_spec_belongs_to_one_contract() -> None:
    assert contract_of(backend((1, 0))) == ("comm", COMM_API)
    assert contract_of(TransferSpec(name="t", api=(1, 0), factory="m:C")) == ("transfer", TRANSFER_API)
    assert contract_of(PageStoreSpec(name="p", api=(1, 0), factory="m:C")) == ("cache", CACHE_API)
    assert contract_of(SyncSpec(name="s", api=(1, 0), fields=(SyncField("f", Vote.MIN),))) == ("cache", CACHE_API)


@pytest.mark.parametrize(
    ("api", "fits"),
    [((2, 3), True), ((2, 0), True), ((2, 4), False), ((3, 0), False), ((1, 3), False), ((1, 9), False)],
)
def test_the_major_must_be_equal_and_the_minor_not_newer(api: ApiVersion, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "COMM_API", (2, 3))
    assert (check_api(backend(api), "mine-dist") == []) is fits


def test_a_newer_plugin_is_told_to_upgrade_core_and_an_older_one_to_upgrade_itself() -> None:
    major, minor = COMM_API
    (newer,) = check_api(backend((major, minor + 1)), "mine-dist")
    assert (newer.wanted, newer.found) == (f"comm API {major}.{minor + 1}", f"comm API {major}.{minor}")
    assert newer.fix == "upgrade commplane, or install an older mine-dist"
    (older,) = check_api(backend((major - 1, 7)), "mine-dist")
    assert older.fix == f"upgrade mine-dist to a release made for comm API {major}"


def wants(line: str, **installed: str) -> list[tuple[str, str]]:
    return [(m.wanted, m.found) for m in check_requirements([line], lambda name: installed.get(name.replace("-", "_")))]


@pytest.mark.parametrize(
    ("line", "found", "fits"),
    [
        ("dep", "0.1", True),
        ("dep>=1.2", "1.2", True),
        ("dep>=1.2", "1.1.9", False),
        ("dep>=1.2,<2", "2.0", False),
        ("dep~=1.2", "1.9", True),
        ("dep==1.2.*", "1.2.7", True),
        ("dep!=1.2", "1.2", False),
        ("dep[fast]>=1.2", "1.2", True),
        ("dep>=1.2", "1.2+cu124", True),
        ("dep>=1.2", "1.3rc1", True),
    ],
)
def test_a_requirement_is_held_against_what_is_installed(line: str, found: str, fits: bool) -> None:
    assert (wants(line, dep=found) == []) is fits


@pytest.mark.parametrize(
    ("line", "found", "fits"),
    [
        ("commplane>=1.2", "1.2.0.dev3", True),
        ("commplane>=1.2", "1.2.0.dev3+g1234567", True),
        ("commplane>=1.2,<2", "2.0.dev1", False),
        ("commplane>=1.2", "1.1.9.dev3", False),
        ("commplane==1.2.*", "1.2.0.dev3", True),
    ],
)
def test_a_development_version_of_core_counts_as_the_release_it_leads_to(line: str, found: str, fits: bool) -> None:
    assert (wants(line, commplane=found) == []) is fits


@pytest.mark.parametrize(
    ("line", "found"), [("dep!=1.2rc1", "1.2rc1"), ("dep!=1.2.post1", "1.2.post1"), ("dep<=1.2", "1.2.post1")]
)
def test_a_version_that_is_ruled_out_is_not_let_in_under_the_name_of_its_release(line: str, found: str) -> None:
    assert len(wants(line, dep=found)) == 1


def test_a_requirement_of_an_extra_is_nobodys_until_somebody_asks_for_the_extra() -> None:
    assert wants("absent>=1; extra == 'fast'") == []


@pytest.mark.parametrize(
    ("marker", "counts"),
    [
        ("python_version >= '3'", True),
        ("python_version < '3'", False),
        ("os_name == 'posix'", True),
        ("os_name == 'nt'", False),
    ],
)
def test_a_marker_decides_whether_a_requirement_counts(marker: str, counts: bool) -> None:
    assert bool(wants(f"absent>=1; {marker}")) is counts


def test_a_mismatch_says_what_is_wanted_what_is_found_and_how_to_get_it() -> None:
    (old,) = check_requirements(["dep>=2"], lambda _name: "1.0")
    assert (old.wanted, old.found, old.fix) == ("dep>=2", "dep 1.0", 'pip install "dep>=2"')
    (absent,) = check_requirements(["dep>=2"], lambda _name: None)
    assert absent.found == "dep not installed"


def test_all_mismatches_are_reported_together() -> None:
    assert len(check_requirements(["a>=2", "b>=2", "c"], lambda _name: "1.0")) == 2


def test_a_line_that_is_no_requirement_is_a_mismatch_and_no_crash() -> None:
    (bad,) = check_requirements(["dep >=!"], lambda _name: "1.0")
    assert "valid Requires-Dist" in bad.wanted and "dep >=!" in bad.found


def test_an_installed_version_that_cannot_be_read_is_a_mismatch_and_no_crash() -> None:
    assert wants("dep>=1", dep="2013-unknown") == [("dep>=1", "dep 2013-unknown")]


# Through discovery, over real distributions.


def test_a_plugin_of_another_api_major_is_left_out_with_what_it_wanted_and_found(wheels: Wheels) -> None:
    wheels.module("future_module", register(spec("mine", api="(99, 0)")))
    wheels.add("future-dist", {"mine": "future_module"})
    wheels.backend("good-dist", "good")
    with pytest.warns(CommplaneWarning, match="mine from future-dist 1.0"):
        host = wheels.discover()
    assert set(host.backends()) == {"good", "hierarchical", "torch", "torch_symm"}
    with pytest.raises(PluginCompatibilityError) as caught:
        host.require(["mine"])
    text = str(caught.value)
    for part in ("mine from future-dist 1.0", "wanted  comm API 99.0", "found  comm API", "fix     upgrade commplane"):
        assert part in text


def test_a_plugin_loses_only_the_backends_whose_api_does_not_fit(wheels: Wheels) -> None:
    wheels.module("mixed_module", register(spec("old", api="(0, 1)"), spec("fits")))
    wheels.add("mixed-dist", {"mixed": "mixed_module"})
    with pytest.warns(CommplaneWarning):
        host = wheels.discover()
    assert set(host.backends()) == {"fits", "hierarchical", "torch", "torch_symm"}
    with pytest.raises(PluginCompatibilityError):
        host.require(["old"])


@pytest.mark.parametrize("requirement", ["commplane>=99", "dep-of-mine>=2", "absent-dep-of-mine"])
def test_a_plugin_whose_requirements_are_not_met_is_left_out_unimported(wheels: Wheels, requirement: str) -> None:
    wheels.add("dep-of-mine", version="1.0")
    wheels.module("poison_module", "raise AssertionError('it was imported')\n")
    wheels.add("mine-dist", {"mine": "poison_module"}, requires=[requirement])
    with pytest.warns(CommplaneWarning):
        host = wheels.discover()
    (problem,) = host.problems
    assert problem.kind is Kind.COMPATIBILITY
    assert [m.wanted for m in problem.mismatches] == [requirement]


def test_a_plugin_whose_requirements_are_met_is_loaded(wheels: Wheels) -> None:
    wheels.add("dep-of-mine", version="2.5")
    wheels.backend("mine-dist", "mine", requires=["commplane>=0.1", "dep-of-mine~=2.0", "absent-dep; extra == 'fast'"])
    assert "mine" in wheels.discover().backends()


def test_a_dependency_whose_version_cannot_be_read_does_not_stop_discovery(wheels: Wheels) -> None:
    wheels.add("dep-of-mine", version="2013-unknown")
    wheels.backend("mine-dist", "mine", requires=["dep-of-mine>=1"])
    wheels.backend("good-dist", "good")
    with pytest.warns(CommplaneWarning):
        host = wheels.discover()
    assert set(host.backends()) == {"good", "hierarchical", "torch", "torch_symm"}


@pytest.mark.parametrize("cause", ["api", "requirement"])
def test_the_check_can_be_skipped_and_a_warning_says_what_was_skipped(wheels: Wheels, cause: str) -> None:
    wheels.module("mine_module", register(spec("mine", api="(99, 0)" if cause == "api" else "(1, 0)")))
    wheels.add("mine-dist", {"mine": "mine_module"}, requires=["commplane>=99"] if cause == "requirement" else [])
    with pytest.warns(CommplaneWarning, match="COMMPLANE_SKIP_COMPAT_CHECK.*wanted .*99.*found") as caught:
        host = wheels.discover({"skip_compat_check": True})
    assert "mine" in host.backends()
    assert host.problems == []
    assert len(caught) == 1
