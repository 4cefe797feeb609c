"""Two distributions that claim one name: reported with both names, and nobody else is affected."""

from __future__ import annotations

import pytest
from dists import Wheels, register, spec

from commplane.api import BackendSpec, hookimpl
from commplane.cli.plugins import plugin_report
from commplane.errors import CommplaneWarning, PluginConflict, PluginError
from commplane.plugins import Kind, PluginHost


def test_two_distributions_with_one_plugin_name_are_both_left_out_and_named_when_it_is_asked_for(
    wheels: Wheels,
) -> None:
    wheels.backend("first-dist", "mine")
    wheels.backend("second-dist", "mine")
    wheels.backend("good-dist", "good")
    with pytest.warns(CommplaneWarning, match="first-dist 1.0 and second-dist 1.0"):
        host = wheels.discover()
    assert set(host.backends()) == {"good", "hierarchical", "torch", "torch_symm"}
    assert {p.kind for p in host.problems} == {Kind.CONFLICT}
    host.require(["good"])
    with pytest.raises(PluginConflict) as caught:
        host.require(["mine"])
    text = str(caught.value)
    assert "first-dist 1.0" in text and "second-dist 1.0" in text and "COMMPLANE_PLUGINS=-mine" in text


def test_plugins_that_clash_in_name_are_not_imported(wheels: Wheels) -> None:
    wheels.module("poison_module", "raise AssertionError('it was imported')\n")
    wheels.add("first-dist", {"mine": "poison_module"})
    wheels.add("second-dist", {"mine": "poison_module"})
    with pytest.warns(CommplaneWarning):
        host = wheels.discover()
    assert {p.kind for p in host.problems} == {Kind.CONFLICT}


def test_two_plugins_that_register_one_backend_name_both_lose_it_and_keep_their_others(wheels: Wheels) -> None:
    wheels.backend("first-dist", "shared", "one", plugin="first")
    wheels.backend("second-dist", "shared", "two", plugin="second")
    with pytest.warns(CommplaneWarning, match="two distributions provide backend 'shared'"):
        host = wheels.discover()
    assert set(host.backends()) == {"one", "two", "hierarchical", "torch", "torch_symm"}
    host.require(["one", "two"])
    with pytest.raises(PluginConflict) as caught:
        host.require(["shared"])
    assert "first-dist 1.0" in str(caught.value) and "second-dist 1.0" in str(caught.value)


def test_a_third_plugin_does_not_inherit_a_name_that_two_others_lost(wheels: Wheels) -> None:
    for which in ("first", "second", "third"):
        wheels.backend(f"{which}-dist", "shared", plugin=which)
    with pytest.warns(CommplaneWarning):
        host = wheels.discover()
    assert set(host.backends()) == {"hierarchical", "torch", "torch_symm"}
    with pytest.raises(PluginConflict) as caught:
        host.require(["shared"])
    assert all(f"{which}-dist" in str(caught.value) for which in ("first", "second", "third"))


def test_leaving_one_rival_out_gives_the_other_the_name(wheels: Wheels) -> None:
    wheels.backend("first-dist", "shared", plugin="first")
    wheels.backend("second-dist", "shared", plugin="second")
    host = wheels.discover({"plugins": "-second"})
    assert host.backends()["shared"].dist == "first-dist"


def test_a_third_party_backend_called_torch_is_refused_and_cores_own_stays(wheels: Wheels) -> None:
    wheels.backend("usurper-dist", "torch", "other", plugin="usurper")
    with pytest.warns(CommplaneWarning, match="usurper-dist"):
        host = wheels.discover()
    assert host.backends()["torch"].dist == "commplane"
    assert "other" in host.backends()
    assert [(p.plugin, p.kind) for p in host.problems] == [("usurper", Kind.CONFLICT)]
    host.require(["torch", "other"])


def test_a_third_party_plugin_called_torch_is_a_conflict_that_names_both_and_cores_own_stays(wheels: Wheels) -> None:
    wheels.backend("usurper-dist", "other", plugin="torch")
    with pytest.warns(CommplaneWarning, match="usurper-dist"):
        host = wheels.discover()
    assert set(host.backends()) == {"hierarchical", "torch", "torch_symm"}
    (problem,) = host.problems
    assert problem.kind is Kind.CONFLICT
    assert "commplane" in problem.summary and "usurper-dist" in problem.summary
    assert ["torch", "commplane", host.versions["torch"][1]] in host.fingerprint()


def test_one_plugin_that_names_a_backend_twice_is_not_called_two_distributions(wheels: Wheels) -> None:
    wheels.module("twice_module", register(spec("mine"), spec("mine")))
    wheels.add("twice-dist", {"mine": "twice_module"})
    with pytest.warns(CommplaneWarning) as caught:
        host = wheels.discover()
    assert set(host.backends()) == {"hierarchical", "torch", "torch_symm"}
    assert "two distributions" not in str(caught[0].message)


def of(name: str, device: str, options: str = "{}") -> str:
    return spec(name).replace("device='cpu', ", f"device={device!r}, options={options}")


@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "xpu", "cpu")])
def test_one_plugin_may_give_a_name_to_one_backend_for_each_device(wheels: Wheels, devices: tuple[str, ...]) -> None:
    wheels.module("twins_module", register(*(of("mine", d) for d in devices)))
    wheels.add("twins-dist", {"mine": "twins_module"})
    host = wheels.discover()
    assert host.problems == []
    assert [r.spec.device for r in host.every(BackendSpec) if r.spec.name == "mine"] == sorted(devices)  # type: ignore[attr-defined]
    assert {d: host.backends(d)["mine"].spec.device for d in devices} == {d: d for d in devices}  # type: ignore[attr-defined]
    provided = next(p["provides"] for p in plugin_report(host)["plugins"] if p["name"] == "mine")
    assert provided == [f"backend mine ({d})" for d in sorted(devices)]


@pytest.mark.parametrize("devices", [("cpu", "any"), ("any", "cuda"), ("cuda", "cuda"), ("cpu", "cuda", "any")])
def test_backends_of_one_name_whose_devices_overlap_are_a_conflict_of_their_plugin(
    wheels: Wheels, devices: tuple[str, ...]
) -> None:
    wheels.module("twins_module", register(*(of("mine", d) for d in devices), spec("other")))
    wheels.add("twins-dist", {"twins": "twins_module"})
    with pytest.warns(CommplaneWarning, match="provides backend 'mine' twice"):
        host = wheels.discover()
    assert set(host.backends()) == {"other", "hierarchical", "torch", "torch_symm"}
    with pytest.raises(PluginConflict, match="provides backend 'mine' twice"):
        host.require(["mine"])


def test_two_distributions_that_share_a_name_for_different_devices_are_still_a_conflict(wheels: Wheels) -> None:
    for dist, device in (("first-dist", "cpu"), ("second-dist", "cuda")):
        wheels.module(f"module_of_{device}", register(of("mine", device)))
        wheels.add(dist, {f"plugin_{device}": f"module_of_{device}"})
    with pytest.warns(CommplaneWarning, match="two distributions provide backend 'mine'"):
        host = wheels.discover()
    assert set(host.backends()) == {"hierarchical", "torch", "torch_symm"}


def test_options_of_one_name_are_those_of_all_its_devices_together(wheels: Wheels) -> None:
    wheels.module("twins_module", register(of("mine", "cpu", "{'a': 1, 'b': 2}"), of("mine", "cuda", "{'b': 2, 'c': 'x'}")))
    wheels.add("twins-dist", {"mine": "twins_module"})
    host = wheels.discover({"mine": {"a": 5, "c": "y"}})
    assert host.options()["mine"] == {"a": 1, "b": 2, "c": "x"}
    assert host.config.options["mine"] == {"a": 5, "b": 2, "c": "y"}


@pytest.mark.parametrize("other", ["3", "2.0", "'2'", "True"])
def test_an_option_with_another_default_on_another_device_is_a_conflict_that_names_it(wheels: Wheels, other: str) -> None:
    wheels.module("twins_module", register(of("mine", "cpu", "{'b': 1 + 1}"), of("mine", "cuda", f"{{'b': {other}}}")))
    wheels.add("twins-dist", {"mine": "twins_module"})
    with pytest.warns(CommplaneWarning, match="one default of option 'b' for all devices, found 2 for cpu"):
        host = wheels.discover()
    assert set(host.backends()) == {"hierarchical", "torch", "torch_symm"}


class Observer:
    """A plugin that counts how often it hears of a plan."""

    def __init__(self) -> None:
        self.heard = 0

    @hookimpl
    def commplane_plan_committed(self, communicator: object) -> None:
        self.heard += 1


@pytest.mark.parametrize("name", ["first", "second"], ids=["same name", "another name"])
def test_registering_a_plugin_again_is_refused_and_the_first_registration_stays(name: str) -> None:
    host, plugin = PluginHost(), Observer()
    host.register(plugin, "first")
    with pytest.raises(PluginError):
        host.register(plugin, name)
    host.notify("commplane_plan_committed", communicator=None)
    assert plugin.heard == 1


def test_another_plugin_under_a_taken_name_is_refused_and_the_first_stays() -> None:
    host, first, second = PluginHost(), Observer(), Observer()
    host.register(first, "mine")
    with pytest.raises(PluginError):
        host.register(second, "mine")
    host.notify("commplane_plan_committed", communicator=None)
    assert (first.heard, second.heard) == (1, 0)
