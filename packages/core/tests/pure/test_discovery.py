"""Discovery over real metadata folders: what is found, what is loaded, and what is reported when a plugin is broken."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from dists import Wheels, register, spec

from commplane.api import BackendSpec, hookimpl
from commplane.config import Config
from commplane.errors import CommplaneWarning, PluginError, PluginLoadError, PluginNotFound
from commplane.plugins import Kind, PluginHost, find_candidates

# Finding, without importing anything.


def test_a_candidate_knows_its_distribution_and_what_it_requires(wheels: Wheels) -> None:
    wheels.add("mine-dist", {"mine": "no_such_module"}, version="2.1", requires=["commplane>=0.1", "dep; extra == 'x'"])
    (c,) = find_candidates(wheels.folders)
    assert (c.name, c.value, c.dist, c.version) == ("mine", "no_such_module", "mine-dist", "2.1")
    assert c.requires == ("commplane>=0.1", "dep; extra == 'x'")
    assert str(c) == "mine from mine-dist 2.1 (commplane.plugins: mine = no_such_module)"


def test_entry_points_of_other_groups_are_not_candidates(wheels: Wheels) -> None:
    info = wheels.add("tool")
    (info / "entry_points.txt").write_text("[console_scripts]\nmine = tool:main\n")
    assert find_candidates(wheels.folders) == []


def test_the_order_depends_on_names_and_not_on_the_file_system(wheels: Wheels) -> None:
    for dist, name, folder in [("zz", "a", "one"), ("aa", "c", "two"), ("mm", "b", "three"), ("ab", "a", "three")]:
        wheels.add(dist, {name: f"m_{dist}"}, folder=folder)
    orders = {tuple(map(str, find_candidates(folders))) for folders in itertools.permutations(wheels.folders)}
    assert len(orders) == 1
    assert [(c.name, c.dist) for c in find_candidates(wheels.folders)] == [
        ("a", "ab"),
        ("a", "zz"),
        ("b", "mm"),
        ("c", "aa"),
    ]


def test_a_distribution_seen_twice_is_one(wheels: Wheels) -> None:
    wheels.add("mine", {"mine": "m"}, folder="one")
    wheels.add("mine", {"mine": "m"}, folder="two")
    assert len(find_candidates([*wheels.folders, *wheels.folders])) == 1


def test_a_distribution_seen_twice_in_two_spellings_of_its_name_is_one(wheels: Wheels) -> None:
    wheels.add("My_Plugin", {"mine": "m"}, folder="one")
    wheels.add("my-plugin", {"mine": "m"}, folder="two")
    assert len(find_candidates(wheels.folders)) == 1


def test_of_two_versions_of_a_distribution_only_the_one_that_python_imports_counts(wheels: Wheels) -> None:
    wheels.add("mine", {"mine": "m.new"}, version="2.0", folder="first")
    wheels.add("mine", {"mine": "m.old", "dropped": "m.dropped"}, version="1.0", folder="second")
    first, second = wheels.folders
    assert [str(c) for c in find_candidates([first, second])] == ["mine from mine 2.0 (commplane.plugins: mine = m.new)"]


def test_a_metadata_folder_that_an_uninstall_left_behind_does_not_stop_discovery(wheels: Wheels) -> None:
    wheels.backend("good-dist", "good")
    wreck = wheels.add("wreck", {"wreck": "m"})
    (wreck / "METADATA").unlink()
    assert "good" in {c.name for c in find_candidates(wheels.folders)}


def test_a_distribution_with_unreadable_entry_points_does_not_stop_discovery(wheels: Wheels) -> None:
    wheels.backend("good-dist", "good")
    wreck = wheels.add("wreck")
    (wreck / "entry_points.txt").write_text("[commplane.plugins]\nno equals sign here\n")
    assert "good" in {c.name for c in find_candidates(wheels.folders)}


# Loading.


def test_a_host_of_its_own_sees_nothing_that_is_installed(wheels: Wheels) -> None:
    wheels.backend("mine-dist", "mine")
    host = PluginHost()
    assert (set(host.backends()), host.candidates, host.problems) == ({"hierarchical", "torch", "torch_symm"}, [], [])


def test_backends_come_from_every_plugin_in_the_order_of_names(wheels: Wheels) -> None:
    wheels.backend("zz", "b", "a")
    wheels.backend("aa", "c")
    host = wheels.discover()
    assert list(host.backends()) == ["a", "b", "c", "hierarchical", "torch", "torch_symm"]
    registered = host.backends()["a"]
    assert (registered.plugin, registered.dist, registered.version) == ("b", "zz", "1.0")
    assert host.problems == []


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import no_such_library_of_anybody\n", "ModuleNotFoundError"),
        ("raise ImportError('libfoo.so.1: cannot open shared object file')\n", "ImportError: libfoo.so.1"),
        ("raise RuntimeError('no driver')\n", "RuntimeError: no driver"),
        ("import sys\nsys.exit('wrong platform')\n", "SystemExit: wrong platform"),
        ("def broken(:\n", "SyntaxError"),
    ],
    ids=["missing import", "ImportError", "RuntimeError", "SystemExit", "SyntaxError"],
)
def test_a_plugin_that_cannot_be_imported_is_recorded_and_the_others_load(wheels: Wheels, source: str, error: str) -> None:
    wheels.backend("good-dist", "good")
    wheels.backend("zgood-dist", "zgood")
    wheels.module("broken_module", source)
    wheels.add("broken-dist", {"mine": "broken_module"})
    with pytest.warns(CommplaneWarning, match="leaves a plugin out: mine from broken-dist 1.0"):
        host = wheels.discover()
    assert set(host.backends()) == {"good", "zgood", "hierarchical", "torch", "torch_symm"}
    (problem,) = host.problems
    assert (problem.plugin, problem.kind) == ("mine", Kind.LOAD)
    assert error in problem.summary
    assert "Traceback" in problem.traceback and "broken_module" in problem.traceback
    with pytest.raises(PluginLoadError) as caught:
        host.require(["mine"])
    assert error in str(caught.value) and "Traceback" in str(caught.value)
    assert "COMMPLANE_PLUGINS=-mine" in str(caught.value)
    host.require(["good", "zgood", "torch"])


def test_an_entry_point_to_a_missing_module_is_recorded(wheels: Wheels) -> None:
    wheels.add("broken-dist", {"mine": "no_such_module_at_all"})
    with pytest.warns(CommplaneWarning):
        host = wheels.discover()
    assert [(p.plugin, p.kind) for p in host.problems] == [("mine", Kind.LOAD)]


def test_a_broken_plugin_is_warned_of_once(wheels: Wheels) -> None:
    wheels.add("broken-dist", {"mine": "no_such_module_at_all"})
    with pytest.warns(CommplaneWarning) as caught:
        wheels.discover()
    assert len(caught) == 1


def test_a_misspelt_hook_is_recorded_by_its_name(wheels: Wheels) -> None:
    wheels.backend("good-dist", "good")
    source = register(spec("mine")).replace("commplane_register_comm_backends", "commplane_register_comm_backend")
    wheels.module("misspelt_module", source)
    wheels.add("misspelt-dist", {"mine": "misspelt_module"})
    with pytest.warns(CommplaneWarning, match="commplane_register_comm_backend"):
        host = wheels.discover()
    assert [(p.plugin, p.kind) for p in host.problems] == [("mine", Kind.LOAD)]
    assert set(host.backends()) == {"good", "hierarchical", "torch", "torch_symm"}


def test_a_hook_with_an_argument_that_it_does_not_have_is_recorded_and_leaves_nothing_registered(
    wheels: Wheels,
) -> None:
    wheels.backend("good-dist", "zgood")
    source = register(spec("mine")) + "\n\n@hookimpl\ndef commplane_configure(configuration):\n    raise AssertionError\n"
    wheels.module("wrong_argument_module", source)
    wheels.add("wrong-dist", {"mine": "wrong_argument_module"})
    with pytest.warns(CommplaneWarning, match="configuration"):
        host = wheels.discover()
    assert set(host.backends()) == {"zgood", "hierarchical", "torch", "torch_symm"}


@pytest.mark.parametrize(
    "body",
    ["[1]", "['mine']", "'mine'", "5", "[None]", spec("mine"), "1 / 0", f"[{spec('no-name')}]", "{'mine': 1}"],
    ids=["number in list", "text in list", "text", "number", "None in list", "spec", "raises", "bad spec", "mapping"],
)
def test_a_register_hook_that_returns_garbage_is_recorded_and_the_others_load(wheels: Wheels, body: str) -> None:
    wheels.backend("good-dist", "good")
    wheels.module(
        "garbage_module",
        "from commplane.api import BackendSpec, hookimpl\n\n\n"
        f"@hookimpl\ndef commplane_register_comm_backends():\n    return {body}\n",
    )
    wheels.add("garbage-dist", {"mine": "garbage_module"})
    with pytest.warns(CommplaneWarning):
        host = wheels.discover()
    assert set(host.backends()) == {"good", "hierarchical", "torch", "torch_symm"}
    assert [(p.plugin, p.kind) for p in host.problems] == [("mine", Kind.LOAD)]


@pytest.mark.parametrize("body", ["5", spec("mine"), "['mine']"], ids=["number", "spec", "text in list"])
def test_the_report_of_garbage_names_the_hook_that_returned_it(wheels: Wheels, body: str) -> None:
    wheels.module(
        "garbage_module",
        "from commplane.api import BackendSpec, hookimpl\n\n\n"
        f"@hookimpl\ndef commplane_register_comm_backends():\n    return {body}\n",
    )
    wheels.add("garbage-dist", {"mine": "garbage_module"})
    with pytest.warns(CommplaneWarning, match="commplane_register_comm_backends"):
        wheels.discover()


def test_a_plugin_that_fails_leaves_no_hook_behind() -> None:
    class Broken:
        calls = 0

        @hookimpl
        def commplane_register_comm_backends(self) -> int:
            return 5

        @hookimpl
        def commplane_plan_committed(self, communicator: object) -> None:
            self.calls += 1

    host, broken = PluginHost(), Broken()
    with pytest.raises(PluginLoadError):
        host.register(broken, "broken")
    host.notify("commplane_plan_committed", communicator=None)
    assert broken.calls == 0


def test_a_plugin_registered_later_is_told_the_settings_that_earlier_ones_were_told(wheels: Wheels) -> None:
    class Late:
        told = 0.0

        @hookimpl
        def commplane_configure(self, config: Config) -> None:
            self.told = config.timeout

    late = Late()
    wheels.discover({"timeout": 5}).register(late, "late")
    assert late.told == 5.0


def test_an_object_may_be_a_plugin_and_its_problem_raises_and_is_kept() -> None:
    class Plugin:
        @hookimpl
        def commplane_register_comm_backends(self) -> list[type]:
            return [BackendSpec]

    host = PluginHost()
    with pytest.raises(PluginLoadError, match="must return BackendSpecs, found type"):
        host.register(Plugin(), "mine")
    assert [p.plugin for p in host.problems] == ["mine"]


# Asking by name.


def test_a_backend_that_nobody_provides_is_not_found_and_what_there_is_is_listed(wheels: Wheels) -> None:
    wheels.backend("good-dist", "custom_ar")
    with pytest.raises(PluginNotFound) as caught:
        wheels.discover().require(["custom_arr"])
    text = str(caught.value)
    assert "backend 'custom_arr'" in text and "did you mean 'custom_ar'? found custom_ar, hierarchical, torch" in text


def test_all_problems_of_what_was_asked_for_are_in_one_error(wheels: Wheels) -> None:
    wheels.add("one-dist", {"one": "no_such_module_1"})
    wheels.add("two-dist", {"two": "no_such_module_2"})
    with pytest.warns(CommplaneWarning):
        host = wheels.discover()
    with pytest.raises(PluginError) as caught:
        host.require(["one", "two"])
    assert "2 of 2 plugins failed to load" in str(caught.value)
    assert "one-dist 1.0" in str(caught.value) and "two-dist 1.0" in str(caught.value)


# The allow and deny list.


def test_a_denied_plugin_is_not_imported_and_not_warned_of(wheels: Wheels, recwarn: pytest.WarningsRecorder) -> None:
    wheels.module("poison_module", "raise AssertionError('it was imported')\n")
    wheels.add("poison-dist", {"poison": "poison_module"})
    wheels.backend("good-dist", "good")
    host = wheels.discover({"plugins": "-poison"})
    assert set(host.backends()) == {"good", "hierarchical", "torch", "torch_symm"}
    assert [(p.plugin, p.kind) for p in host.problems] == [("poison", Kind.DENIED)]
    assert list(recwarn) == []


def test_an_allow_list_leaves_out_everything_else_but_core(wheels: Wheels) -> None:
    for name in ("a", "b", "c"):
        wheels.backend(f"{name}-dist", name)
    host = wheels.discover({"plugins": "b"})
    assert set(host.backends()) == {"b", "hierarchical", "torch", "torch_symm"}
    assert {p.plugin for p in host.problems} == {"a", "c"}


def test_a_denied_backend_that_is_asked_for_by_name_says_that_it_was_left_out(wheels: Wheels) -> None:
    wheels.backend("good-dist", "good")
    with pytest.raises(PluginError, match="left out by COMMPLANE_PLUGINS"):
        wheels.discover({"plugins": "-good"}).require(["good"])


def test_an_allowed_name_that_is_not_installed_is_not_found_and_what_there_is_is_listed(wheels: Wheels) -> None:
    wheels.backend("good-dist", "good")
    wheels.backend("other-dist", "other")
    with pytest.raises(PluginNotFound, match=r"plugin 'goood': did you mean 'good'\? found good, other"):
        wheels.discover({"plugins": "goood"})


def test_a_denied_name_that_is_not_installed_is_no_error(wheels: Wheels) -> None:
    assert set(wheels.discover({"plugins": "-nothing"}).backends()) == {"hierarchical", "torch", "torch_symm"}


def test_core_itself_may_be_named_in_the_allow_list(wheels: Wheels) -> None:
    wheels.backend("good-dist", "good")
    assert set(wheels.discover({"plugins": "torch"}).backends()) == {"hierarchical", "torch", "torch_symm"}


def test_settings_of_a_denied_plugin_are_let_through(wheels: Wheels) -> None:
    wheels.backend("good-dist", "good")
    assert set(wheels.discover({"plugins": "-good", "good": {"slots": 4}}).backends()) == {"hierarchical", "torch", "torch_symm"}


def test_the_fingerprint_names_every_plugin_with_its_version_in_the_order_of_names(wheels: Wheels) -> None:
    wheels.backend("z-dist", "a", version="1.5")
    wheels.backend("a-dist", "z")
    prints = wheels.discover().fingerprint()
    assert [p for p in prints if p[0] != "torch"] == [["a", "z-dist", "1.5"], ["z", "a-dist", "1.0"]]
    assert [p[:2] for p in prints if p[0] == "torch"] == [["torch", "commplane"]]


def test_find_candidates_without_a_path_searches_what_python_searches(wheels: Wheels) -> None:
    wheels.add("unheard-of-dist", {"unheard_of": "m"})
    assert "unheard_of" in {c.name for c in find_candidates()}


def test_an_empty_folder_holds_no_candidates(tmp_path: Path) -> None:
    assert find_candidates([tmp_path, tmp_path / "missing"]) == []
