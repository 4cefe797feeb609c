"""One name for a backend on several types of device: a group meets the one for its own."""

from __future__ import annotations

from typing import Any

import devices
import pytest

from commplane import errors
from commplane.plugins import PluginHost
from commplane.runtime import Plane
from commplane.testing import run_threads

TWINS = (
    devices.spec(device="cuda", factory="absent:Nothing", probe="absent:nothing", options={"blocks": 8, "shared": 1}),
    devices.spec(device="cpu", options={"threads": 2, "shared": 1}),
)


def run(function: Any, *specs: Any, config: Any = None) -> list[Any]:
    return run_threads(
        2,
        function,
        plugins=lambda _rank: devices.host(*specs),
        config=lambda _rank: {"timeout": 30, **(config or {})},
        timeout=60,
    )


def test_a_group_uses_the_spec_for_its_device_and_its_plan_does_not_know_the_other() -> None:
    def rank_main(plane: Plane) -> tuple[tuple[str, ...], str]:
        with plane.communicator("tp", device="cpu") as comm:
            return comm.plan.backends, str(comm.plan)

    first, second = run(rank_main, *TWINS)
    assert first == second
    backends, text = first
    assert backends == ("twin", "torch")
    assert [line.split()[-1] for line in text.splitlines() if "twins-wheel" in line] == ["(options=shared,threads)"]


def test_a_spec_is_given_its_own_options_and_not_those_of_its_twin() -> None:
    def rank_main(plane: Plane) -> Any:
        with plane.communicator("tp", device="cpu") as comm:
            found = next(c.facts["options"] for c in comm.plan.candidates if c.name == "twin")
            return found, sorted(comm.backends[0].context.options.items())  # type: ignore[attr-defined]

    out = run(rank_main, *TWINS, config={"twin": {"threads": 4, "blocks": 16}})
    assert out == [("shared,threads", [("shared", 1), ("threads", 4)])] * 2


def test_settings_of_both_twins_are_known_and_compared() -> None:
    def rank_main(plane: Plane) -> Any:
        return {key: value for key, value in plane.config.shared().items() if key.startswith("twin.")}

    wanted = {"twin.blocks": 16, "twin.shared": 1, "twin.threads": 2}
    assert run(rank_main, *TWINS, config={"twin": {"blocks": 16}}) == [wanted] * 2


def test_a_backend_without_a_spec_for_the_device_is_listed_with_the_device_that_it_serves() -> None:
    def rank_main(plane: Plane) -> Any:
        with plane.communicator("tp", device="cpu") as comm:
            return [(c.state, c.reason) for c in comm.plan.candidates if c.name == "twin"]

    assert run(rank_main, TWINS[0]) == [[("probe", "serves cuda, the group is on cpu")]] * 2


@pytest.mark.parametrize("device", ["cpu", "cuda", None])
def test_a_host_gives_one_backend_of_each_name_for_a_device(device: str | None) -> None:
    host = devices.host(*TWINS)
    found = host.backends(device)
    assert list(found) == sorted({*PluginHost().backends(), "twin"})
    assert found["twin"].spec is TWINS[0 if device == "cuda" else 1]


def test_a_name_that_is_there_for_another_device_only_counts_as_installed() -> None:
    host = devices.host(TWINS[0])
    host.require(["twin"])
    assert host.backends("cpu")["twin"].spec is TWINS[0]
    with pytest.raises(errors.PluginNotFound):
        host.require(["twins"])
