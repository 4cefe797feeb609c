"""What a plane settles when it starts: that its ranks are alike, what this start is called, and who records it."""

from __future__ import annotations

from commplane.agree import StoreBootstrap
from commplane.api import Facts
from commplane.config import Config
from commplane.errors import AgreementError
from commplane.flight import FlightRecorder, Folder, new_job
from commplane.plugins import PluginHost, core_version
from commplane.runtime.tuning import Tuning
from commplane.select import difference

__all__ = ["compare", "recorder"]


def compare(world: StoreBootstrap, plugins: PluginHost, config: Config, tuning: Tuning | None = None) -> str:
    """Plugin versions and settings must be equal: a rank with another set would decide otherwise. Collective over the plane.

    Returns:
        A name for this start of the plane that is equal on all ranks, and that no other start has.
    """
    mine = {
        "plugins": {name: f"{dist} {version}" for name, dist, version in plugins.fingerprint()},
        "config": {"world_size": world.world_size, "tuning": tuning.digest if tuning else config.tuning, **config.shared()},
        "job": new_job() if world.rank == 0 else None,
    }
    everyone = world.gather(mine, what="comparison of plugins and settings")
    problems = [
        text
        for what, key in (("installed plugins", "plugins"), ("settings", "config"))
        if (text := difference(what, {r: e[key] for r, e in enumerate(everyone)})) is not None
    ]
    if problems:
        raise AgreementError(f"{'; '.join(problems)}: every rank needs the same wheels and the same settings")
    return str(everyone[0]["job"])


def recorder(job: str, rank: int, facts: Facts, plugins: PluginHost, config: Config) -> FlightRecorder:
    """The flight recorder of this rank. Local."""
    backends = {f"backend {name}": f"{r.dist or r.plugin} {r.version}" for name, r in plugins.backends().items()}
    versions = {"commplane": core_version(), "torch": str(facts[rank].torch), "python": facts[rank].python, **backends}
    folder = Folder(config.flight_dir)
    return FlightRecorder(job, rank, len(facts), config.flight_records, folder, versions, lambda: facts.dead(facts))
