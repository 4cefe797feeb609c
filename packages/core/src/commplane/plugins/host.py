"""The plugins of this process: loaded one by one, so that a broken one never stops another."""

from __future__ import annotations

import difflib
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pluggy

from commplane import hookspecs
from commplane.api import (
    BackendSpec,
    Bootstrap,
    BuildContext,
    CommBackend,
    PageStoreSpec,
    ProbeRequest,
    Requirement,
    Spec,
    SyncSpec,
    TransferSpec,
    Workspace,
)
from commplane.api.markers import PROJECT
from commplane.backends import builtin
from commplane.config import Config
from commplane.errors import CommplaneWarning, PluginError, PluginNotFound
from commplane.notice import notice
from commplane.plugins.compat import check_api, check_requirements
from commplane.plugins.discovery import Candidate, core_version, find_candidates
from commplane.plugins.report import Kind, Mismatch, Problem, as_error

__all__ = ["PluginHost", "Registered"]

_REGISTER_HOOKS: dict[str, type[Spec]] = {
    "commplane_register_comm_backends": BackendSpec,
    "commplane_register_transfer_engines": TransferSpec,
    "commplane_register_page_stores": PageStoreSpec,
    "commplane_register_cache_sync": SyncSpec,
}


@dataclass(frozen=True)
class Registered:
    """A spec and who gave it."""

    spec: Spec
    plugin: str
    dist: str
    version: str


class PluginHost:
    """Plugins, their specs and their problems.

    Made by `discover` in production. A test makes an empty one, which knows only core's own plugin, and calls `register`:
    nothing that is installed on the machine can then change the result.
    """

    def __init__(self, config: Config | None = None) -> None:
        self.config = Config() if config is None else config
        self.candidates: list[Candidate] = []
        self.problems: list[Problem] = []
        self.versions: dict[str, tuple[str, str]] = {}
        self._is_configured = False
        self._specs: dict[type[Spec], dict[str, list[Registered]]] = {kind: {} for kind in _REGISTER_HOOKS.values()}
        self._lost: list[tuple[Problem, type[Spec], str]] = []
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        if self.config.trace_hooks:
            self._manager.trace.root.setwriter(sys.stderr.write)
            self._manager.enable_tracing()
        self.register(builtin, "torch", dist="commplane", version=core_version())

    @classmethod
    def discover(cls, config: Config, candidates: Sequence[Candidate] | None = None) -> PluginHost:
        """Load every installed plugin that the allow/deny list admits. Local.

        Problems are kept and warned of once; only what was asked for by name raises, in `require`.
        """
        host = cls(config)
        host.candidates = find_candidates() if candidates is None else list(candidates)
        count = Counter(c.name for c in host.candidates)
        for c in host.candidates:
            if not config.allows(c.name):
                host.problems.append(Problem(c.name, str(c), Kind.DENIED, "left out by COMMPLANE_PLUGINS"))
            elif count[c.name] > 1:
                rivals = [f"{o.dist} {o.version}" for o in host.candidates if o.name == c.name]
                summary = f"{len(rivals)} distributions provide plugin {c.name!r}: {' and '.join(rivals)}; uninstall all but one"
                host.problems.append(Problem(c.name, str(c), Kind.CONFLICT, summary, names=(c.name,)))
            else:
                host._load(c)
        named = [name for name in config.plugins if not name.startswith("-") and name != "torch"]
        for name in named:
            if count[name] == 0:
                raise host.not_found("plugin", name, [c.name for c in host.candidates])
        host.config = config.with_options(
            host.options(),
            absent={p.plugin.replace("-", "_") for p in host.problems} | {n for p in host.problems for n in p.names},
        )
        for problem in host.problems:
            if problem.kind is not Kind.DENIED:
                warnings.warn(
                    f"commplane leaves a plugin out: {problem.lines()[0]}; run 'commplane plugins' for all of it",
                    CommplaneWarning,
                    stacklevel=2,
                )
        host.configure(host.config)
        asked = [p for p in host.problems if p.plugin in named and p.kind is not Kind.DENIED]
        if asked:
            raise as_error(asked, len(host.candidates), core_version())
        return host

    def configure(self, config: Config) -> None:
        """`commplane_configure`, for the plugins there are and those to come. A plugin that raises is left out. Local."""
        self.config = config
        self._is_configured = True
        for name, plugin in sorted(self._manager.list_name_plugin()):
            if plugin is not None and not self._configured(name, plugin):
                self._unregister(plugin)
                for specs in self._specs.values():
                    for spec_name in [n for n, entries in specs.items() if entries[0].plugin == name]:
                        del specs[spec_name]

    def _configured(self, name: str, plugin: object) -> bool:
        try:
            # One by one, which a historic call of pluggy's cannot do; `register` sees to the plugins that come later.
            for implementation in self._manager.hook.commplane_configure.get_hookimpls():
                if implementation.plugin is plugin:
                    implementation.function(*(self.config for _ in implementation.argnames))
        except (Exception, SystemExit) as error:  # one plugin must not stop the others
            self._failed(name, " ".join([name, "from", *self.versions.get(name, ("this process", ""))]), error)
            notice(f"commplane leaves a plugin out: {self.problems[-1].lines()[0]}")
            return False
        return True

    def _load(self, c: Candidate) -> None:
        mismatches = check_requirements(c.requires)
        if mismatches and not self._skip_compat(c.name, mismatches):
            self.problems.append(
                Problem(c.name, str(c), Kind.COMPATIBILITY, "wants other versions", tuple(mismatches), names=(c.name,))
            )
            return
        try:
            plugin = c.entry_point.load()
            self.register(plugin, c.name, dist=c.dist, version=c.version, title=str(c))
        except PluginError:
            pass  # register has recorded it
        except (Exception, SystemExit) as error:  # whatever a plugin raises must not stop the others
            self._failed(c.name, str(c), error)

    def _failed(self, name: str, title: str, error: BaseException) -> None:
        summary = "".join(traceback.format_exception_only(type(error), error)).strip()
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self.problems.append(Problem(name, title, Kind.LOAD, summary, traceback=text, names=(name,)))

    def register(self, plugin: object, name: str, *, dist: str = "", version: str = "0", title: str = "") -> None:
        """Add a plugin: a module or an object with hook implementations. Local.

        Raises:
            PluginError: it cannot be used. It is then also among `problems`, and nothing of it stays registered.
        """
        title = title or f"{name} from {dist or 'this process'} {version}"
        before = len(self.problems)
        if self._manager.has_plugin(name) or self._manager.is_registered(plugin):
            holder = name if self._manager.has_plugin(name) else str(self._manager.get_name(plugin))
            taken = f"{holder!r} from {' '.join(self.versions[holder])}"
            summary = f"is registered already as plugin {taken}; {dist or 'this process'} {version} cannot take its place"
            self.problems.append(Problem(name, title, Kind.CONFLICT, summary, names=(name,)))
            raise as_error(self.problems[before:], 1, core_version())
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
            specs = [spec for hook in _REGISTER_HOOKS for spec in self._collect(hook, plugin, name)]
        except (Exception, SystemExit) as error:
            self._unregister(plugin)
            self._failed(name, title, error)
            raise as_error(self.problems[before:], 1, core_version()) from error
        self.versions[name] = (dist, version)
        for spec in specs:
            self._admit(spec, name, dist, version, title)
        if self._is_configured:
            self._configured(name, plugin)
        if len(self.problems) > before:
            if all(r.plugin != name for kind in self._specs for r in self.every(kind)):
                self._unregister(plugin)
            raise as_error(self.problems[before:], 1, core_version())

    def _unregister(self, plugin: object) -> None:
        if self._manager.is_registered(plugin):
            self._manager.unregister(plugin)

    def _collect(self, hook: str, plugin: object, name: str) -> list[Spec]:
        others = [p for p in self._manager.get_plugins() if p is not plugin]
        results = self._manager.subset_hook_caller(hook, others)()
        for result in results:
            if not isinstance(result, Iterable):
                raise TypeError(f"{hook} of plugin {name!r} must return a list, found {type(result).__name__}")
        specs: list[Spec] = [spec for result in results for spec in result]
        for spec in specs:
            if not isinstance(spec, _REGISTER_HOOKS[hook]):
                raise TypeError(
                    f"{hook} of plugin {name!r} must return {_REGISTER_HOOKS[hook].__name__}s, found {type(spec).__name__}"
                )
        return specs

    def _admit(self, spec: Spec, plugin: str, dist: str, version: str, title: str) -> None:
        kind = next(k for k in self._specs if isinstance(spec, k))
        mismatches = check_api(spec, dist or plugin)
        if mismatches and not self._skip_compat(plugin, mismatches):
            self.problems.append(Problem(plugin, title, Kind.COMPATIBILITY, "other API", tuple(mismatches), names=(spec.name,)))
            return
        entries = self._specs[kind].get(spec.name, [])
        summary = next((text for e in entries if (text := _conflict(spec, plugin, dist, version, e)) is not None), None)
        if summary is not None:
            # Core's own torch backend stays: it is what every group can fall back to.
            if entries[0].plugin != "torch":
                del self._specs[kind][spec.name]
            self.problems.append(Problem(plugin, title, Kind.CONFLICT, summary, names=(spec.name,)))
            return
        earlier = [p for p in self.problems if p.kind is Kind.CONFLICT and spec.name in p.names]
        if earlier:
            if all(p.plugin != plugin for p in earlier):  # else it is said already
                summary = f"more than one distribution provides {spec.name!r}, {dist or plugin} {version} among them"
                self.problems.append(Problem(plugin, title, Kind.CONFLICT, summary, names=(spec.name,)))
            return
        self._specs[kind].setdefault(spec.name, []).append(Registered(spec, plugin, dist, version))

    def _skip_compat(self, plugin: str, mismatches: Iterable[Mismatch]) -> bool:
        if self.config.skip_compat_check:
            text = "; ".join(f"wanted {m.wanted}, found {m.found}" for m in mismatches)
            warnings.warn(
                f"plugin {plugin!r} is loaded against its version check (COMMPLANE_SKIP_COMPAT_CHECK): {text}",
                CommplaneWarning,
                stacklevel=4,
            )
        return self.config.skip_compat_check

    def every(self, kind: type[Spec]) -> list[Registered]:
        """All specs of one kind, in the order of names, and those of one name in the order of the devices that they serve."""
        return [r for _, entries in sorted(self._specs[kind].items()) for r in sorted(entries, key=lambda r: _device(r.spec))]

    def registered(self, kind: type[Spec]) -> dict[str, Registered]:
        """One spec of each name, in the order of names; where there are several, the first that `every` has."""
        out: dict[str, Registered] = {}
        for r in self.every(kind):
            out.setdefault(r.spec.name, r)
        return out

    def backends(self, device: str | None = None) -> dict[str, Registered]:
        """All usable backends by name, in the order of names.

        A plugin may provide one for each type of device under one name. With `device`, such as ``"cpu"``, each name has the spec
        that serves it; where none does, or without `device`, the first that `every` has, which a group then refuses.
        """
        return {**self.registered(BackendSpec), **{r.spec.name: r for r in self.every(BackendSpec) if _device(r.spec) == device}}

    def options(self) -> dict[str, dict[str, Any]]:
        """Settings of their own that backends declare, with the defaults, by name: those of all devices together."""
        out: dict[str, dict[str, Any]] = {}
        for r in self.every(BackendSpec):
            assert isinstance(r.spec, BackendSpec)
            out.setdefault(r.spec.name, {}).update(r.spec.options)
        return out

    def require(self, names: Iterable[str]) -> None:
        """Raise for backends that were asked for by name and cannot be used, all problems in one error."""
        wanted = [name for name in dict.fromkeys(names) if name not in self._specs[BackendSpec]]
        problems = [p for p in self.problems if any(p.concerns(name) for name in wanted)]
        unknown = [name for name in wanted if not any(p.concerns(name) for p in problems)]
        missing = [self.not_found("backend", name, self._specs[BackendSpec]) for name in unknown]
        if not problems and missing:
            raise PluginNotFound("; ".join(map(str, missing)))
        if problems:
            error = as_error(problems, max(len(self.candidates), len(problems)), core_version())
            raise type(error)("\n".join([str(error), *map(str, missing)]))

    def not_found(self, what: str, name: str, known: Iterable[str]) -> PluginNotFound:
        """The error for a name that nobody provides; lists what there is."""
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        refused = "".join(f"; {p.plugin!r} is {p.kind.value}" for p in self.problems)
        return PluginNotFound(
            f"no installed wheel provides {what} {name!r}: {hint}found {', '.join(known) or 'none'}{refused}; "
            f"install the wheel that provides it, or run 'commplane plugins'"
        )

    def fingerprint(self) -> list[list[str]]:
        """Every plugin that takes part, with distribution and version: equal on all ranks of a plane."""
        seen = {c.name: [c.name, c.dist, c.version] for c in self.candidates if self.config.allows(c.name)}
        for name, (dist, version) in self.versions.items():
            seen[name] = [name, dist, version]
        return [seen[name] for name in sorted(seen)]

    # Typed hook calls, so that nothing else in core touches pluggy.

    @property
    def has_policy(self) -> bool:
        """Whether some plugin implements `commplane_select_backend`."""
        return bool(self._manager.hook.commplane_select_backend.get_hookimpls())

    def select_backend(self, request: ProbeRequest, candidates: Sequence[str]) -> Sequence[str] | None:
        """`commplane_select_backend`."""
        return self._manager.hook.commplane_select_backend(request=request, candidates=candidates)  # type: ignore[no-any-return]

    def build_communicator(self, spec: BackendSpec, context: BuildContext) -> CommBackend:
        """`commplane_build_communicator`."""
        return self._manager.hook.commplane_build_communicator(spec=spec, context=context)  # type: ignore[no-any-return]

    def init_workspace(self, communicator: Any, requirements: Sequence[Requirement]) -> list[Workspace]:
        """`commplane_init_workspace`, plugins in the order of their names so that collective steps match on all ranks.

        If one raises, what others built in this call is closed before the error goes on.
        """
        built: list[Workspace] = []
        hook = "commplane_init_workspace"
        try:
            for name, plugin in sorted(self._manager.list_name_plugin()):
                if plugin is not None and hasattr(plugin, hook):
                    others = [p for n, p in self._manager.list_name_plugin() if n != name]
                    caller = self._manager.subset_hook_caller(hook, others)
                    for part in caller(communicator=communicator, requirements=requirements):
                        built.extend(part)
        except BaseException:
            for workspace in built:
                workspace.close()
            raise
        return built

    def sync_bootstrap(self, bootstrap: Bootstrap, value: Any) -> Any:
        """`commplane_sync_bootstrap`."""
        return self._manager.hook.commplane_sync_bootstrap(bootstrap=bootstrap, value=value)

    def notify(self, hook: str, **arguments: object) -> None:
        """Call a hook whose result is ignored; what an observer raises becomes a warning, never a fault of the run."""
        caller: Callable[..., Any] = getattr(self._manager.hook, hook)
        try:
            caller(**arguments)
        except Exception as error:
            notice(f"{hook} of a plugin raised {error!r}; the run goes on")


def _device(spec: Spec) -> str:
    """What a backend is for; other kinds of plugins know no devices."""
    return spec.device if isinstance(spec, BackendSpec) else "any"


def _conflict(spec: Spec, plugin: str, dist: str, version: str, rival: Registered) -> str | None:
    """Why `spec` and one that is there cannot both be used, or None. Pure."""
    word = type(spec).__name__.removesuffix("Spec").lower()
    if rival.plugin != plugin:
        return (
            f"two distributions provide {word} {spec.name!r}: {rival.dist or rival.plugin} {rival.version} and "
            f"{dist or plugin} {version}; uninstall one or set COMMPLANE_PLUGINS=-{plugin}"
        )
    devices = {_device(spec), _device(rival.spec)}
    if len(devices) == 1 or "any" in devices:
        overlap = f": for devices {' and '.join(sorted(devices))}" if len(devices) > 1 else ""
        return f"provides {word} {spec.name!r} twice{overlap}"
    assert isinstance(spec, BackendSpec)
    assert isinstance(rival.spec, BackendSpec)
    mine, theirs = spec.options, rival.spec.options
    for name in sorted(mine.keys() & theirs.keys()):
        if (type(mine[name]), mine[name]) != (type(theirs[name]), theirs[name]):
            return (
                f"{word} {spec.name!r} wants one default of option {name!r} for all devices, found {theirs[name]!r} for "
                f"{rival.spec.device} and {mine[name]!r} for {spec.device}: a setting has one value, give them two names"
            )
    return None
