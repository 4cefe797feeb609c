"""Two distributions that claim one name: reported with both names, and nobody else is affected."""

from __future__ import annotations

import pytest
from dists import Wheels, register, spec

from commplane.api import hookimpl
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
    assert set(host.backends()) == {"good", "torch"}
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
    assert set(host.backends()) == {"one", "two", "torch"}
    host.require(["one", "two"])
    with pytest.raises(PluginConflict) as caught:
        host.require(["shared"])
    assert "first-dist 1.0" in str(caught.value) and "second-dist 1.0" in str(caught.value)


def test_a_third_plugin_does_not_inherit_a_name_that_two_others_lost(wheels: Wheels) -> None:
    for which in ("first", "second", "third"):
        wheels.backend(f"{which}-dist", "shared", plugin=which)
    with pytest.warns(CommplaneWarning):
        host = wheels.discover()
    assert set(host.backends()) == {"torch"}
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
    assert set(host.backends()) == {"torch"}
    (problem,) = host.problems
    assert problem.kind is Kind.CONFLICT
    assert "commplane" in problem.summary and "usurper-dist" in problem.summary
    assert ["torch", "commplane", host.versions["torch"][1]] in host.fingerprint()


def test_one_plugin_that_names_a_backend_twice_is_not_called_two_distributions(wheels: Wheels) -> None:
    wheels.module("twice_module", register(spec("mine"), spec("mine")))
    wheels.add("twice-dist", {"mine": "twice_module"})
    with pytest.warns(CommplaneWarning) as caught:
        host = wheels.discover()
    assert set(host.backends()) == {"torch"}
    assert "two distributions" not in str(caught[0].message)


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
