"""One typed configuration: defaults < file < environment < argument.

Each field is a key of the TOML file (``timeout = 10``), an environment variable (``COMMPLANE_TIMEOUT=10``) and an entry of the
mapping given to `commplane.init`. A backend's own settings live in a table of its name (``[custom_ar]``), in
``COMMPLANE_CUSTOM_AR_<OPTION>`` and in a nested mapping; they are checked once the backends are known. An unknown key is
refused with the nearest valid one. The values that must be equal on all ranks are compared when a plane starts.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from commplane.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["FILE_VARIABLE", "NO_FILE", "PREFIX", "Config"]

PREFIX = "COMMPLANE_"
FILE_VARIABLE = "COMMPLANE_CONFIG"
NO_FILE = ("auto", "off")
"""Values of the setting ``tuning`` that name no file."""


def _names(value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, Iterable) or isinstance(items, Mapping) or not all(isinstance(item, str) for item in items):
        raise ValueError("a list of names, such as a,b")
    return tuple(item.strip() for item in items if item.strip())


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("1 or 0")


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise ValueError("a number of seconds above 0") from None
    if isinstance(value, bool) or not 0 < seconds < 1e6:
        raise ValueError("a number of seconds above 0")
    return seconds


def _count(value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        raise ValueError("a whole number from 0 to 1000000") from None
    if isinstance(value, (bool, float)) or not 0 <= number <= 1_000_000:
        raise ValueError("a whole number from 0 to 1000000")
    return number


def _optional_text(value: Any) -> str | None:
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise ValueError("text")
    return None if value is None else os.fspath(value) or None


def _tuning(value: Any) -> str:
    return "auto" if value is None else _optional_text(value) or "off"


def _optional_seconds(value: Any) -> float | None:
    return None if value is None else _seconds(value)


def _one_of(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return str(value)

    return parse


def _setting(default: Any, parse: Callable[[Any], Any], *, per_rank: bool = False) -> Any:
    return field(default=default, metadata={"parse": parse, "per_rank": per_rank})


@dataclass(frozen=True)
class Config:
    """The resolved settings. `sources` says where each one came from; `options` holds the backends' own."""

    backends: tuple[str, ...] = _setting((), _names)
    """Backends in the order of preference. If unset, all installed ones by priority. ``torch`` is always last."""

    plugins: tuple[str, ...] = _setting((), _names)
    """Entry points to load (``a,b``), or to leave out (``-a,-b``). If unset, all."""

    timeout: float = _setting(30.0, _seconds)
    """Seconds that any wait for another rank may take. If unset, 30."""

    startup_timeout: float | None = _setting(None, _optional_seconds)
    """The same for start-up: facts, probes, builds, canaries, `prepare`, capture votes. If unset, `timeout`."""

    run_timeout: float | None = _setting(None, _optional_seconds)
    """The same for running collectives. If unset, `timeout`."""

    numerics: str = _setting("any", _one_of("any", "rank_order"))
    """Class of numerics the selector may choose from: ``rank_order`` admits only backends that add in rank order."""

    device: str = _setting("auto", _one_of("auto", "cpu", "cuda"))
    """Device type of communicators that do not name one. If unset, cuda where torch sees a GPU, else cpu."""

    skip_compat_check: bool = _setting(False, _flag)
    """Load plugins made for another version of core, with a warning each time. Agreement is never skipped."""

    tuning: str = _setting("auto", _tuning, per_rank=True)
    """Times that communicators follow: ``auto`` for those that are shipped for their GPUs, ``off`` for none, or a file of
    ``commplane tune``, which may lie elsewhere on each rank; its content is compared."""

    host_alias: str = _setting("", str, per_rank=True)
    """Ranks with different aliases never count as one host, whatever they share. If unset, facts decide alone."""

    trace_hooks: bool = _setting(False, _flag, per_rank=True)
    """Print each hook call with its arguments and results to standard error."""

    flight_records: int = _setting(512, _count, per_rank=True)
    """Calls that the flight recorder holds for each backend of a communicator. 0 switches it off."""

    flight_dir: str | None = _setting(None, _optional_text, per_rank=True)
    """Folder for flight records. If unset, ``commplane-flight-<uid>`` in the folder for temporary files."""

    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    pending: Mapping[str, tuple[Any, str]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def load(cls, argument: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Config:
        """Read the file, the environment and `argument`, later ones winning. Local.

        Raises:
            ConfigError: a core setting has a wrong value, or the file cannot be read. Unknown keys are only known to be
                unknown when the plugins are there: `with_options` refuses them.
        """
        environ = os.environ if environ is None else environ
        settings = {f.name: f for f in fields(cls) if "parse" in f.metadata}
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        pending: dict[str, tuple[Any, str]] = {}

        def put(key: str, raw: Any, source: str) -> None:
            if key in settings:
                try:
                    values[key] = settings[key].metadata["parse"](raw)
                except ValueError as error:
                    raise ConfigError(f"setting {key!r} from {source}: wanted {error}, found {raw!r}") from None
                sources[key] = source
            elif isinstance(raw, Mapping):
                if not raw:
                    pending[key] = (raw, source)
                for option, value in raw.items():
                    pending.pop(f"{key}.{option}", None)  # last in the order of the sources, not where it first was
                    pending[f"{key}.{option}"] = (value, source)
            else:
                pending.pop(key, None)
                pending[key] = (raw, source)

        path = environ.get(FILE_VARIABLE)
        if path:
            for key, raw in _read_file(Path(path)).items():
                put(key, raw, f"file {path}")
        for name in sorted(environ):
            if name.startswith(PREFIX) and name != FILE_VARIABLE:
                put(name[len(PREFIX) :].lower(), environ[name], f"environment variable {name}")
        for key, raw in (argument or {}).items():
            put(key, raw, "argument")
        return cls(**values, sources=sources, pending=pending)

    def with_options(self, declared: Mapping[str, Mapping[str, Any]], absent: Iterable[str] = ()) -> Config:
        """Check the settings of backends against what they declare and fill in defaults. Local.

        Args:
            declared: defaults by backend name.
            absent: plugins that are installed but not loaded; their settings are let through unread.

        Raises:
            ConfigError: an unknown key, with the nearest valid one, or a value of the wrong type.
        """
        options = {backend: dict(defaults) for backend, defaults in declared.items()}
        sources = dict(self.sources)
        known = {f"{backend}.{option}": (backend, option) for backend, defaults in declared.items() for option in defaults}
        flat = {key.replace(".", "_"): key for key in known}
        absent = tuple(absent)
        for key, (raw, source) in self.pending.items():
            if raw == {} and (key in declared or key in absent):
                continue
            full = key if key in known else flat.get(key, "")
            if not full:
                if key.startswith(tuple(f"{name}{sep}" for name in absent for sep in "._")):
                    continue
                raise ConfigError(self._unknown(key, source, known))
            backend, option = known[full]
            options[backend][option] = _as_type_of(declared[backend][option], raw, full, source)
            sources[full] = source
        return replace(self, options=options, sources=sources, pending={})

    def changed(self, options: Mapping[str, Mapping[str, Any]]) -> Config:
        """These settings with some of the backends' own replaced, as one communicator may have them. Local.

        Raises:
            ConfigError: an unknown backend or option, or a value of the wrong type.
        """
        out = {backend: dict(values) for backend, values in self.options.items()}
        for backend, values in options.items():
            for option, raw in values.items():
                if option not in out.get(backend, {}):
                    found = ", ".join(f"{b}.{o}" for b, values in self.options.items() for o in values) or "none"
                    raise ConfigError(f"no backend has a setting '{backend}.{option}', found {found}: leave it out")
                out[backend][option] = _as_type_of(out[backend][option], raw, f"{backend}.{option}", "argument")
        return replace(self, options=out)

    def _unknown(self, key: str, source: str, known: Iterable[str]) -> str:
        core = [f.name for f in fields(self) if "parse" in f.metadata]
        if source.startswith("environment"):
            names = [PREFIX + n.upper().replace(".", "_") for n in [*core, *known]] + [FILE_VARIABLE]
            wrong = PREFIX + key.upper()
        else:
            names, wrong = [*core, *known], key
        near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.0)
        return f"unknown setting {wrong!r} from {source}: did you mean {near[0]!r}? valid ones: {', '.join(names)}"

    @property
    def startup(self) -> float:
        """Seconds for one wait at start-up."""
        return self.timeout if self.startup_timeout is None else self.startup_timeout

    @property
    def run(self) -> float:
        """Seconds for one wait in a running collective."""
        return self.timeout if self.run_timeout is None else self.run_timeout

    def shared(self) -> dict[str, Any]:
        """The values that must be equal on all ranks, as JSON."""
        names = [f.name for f in fields(self) if "parse" in f.metadata and not f.metadata["per_rank"]]
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        for backend, options in self.options.items():
            values.update({f"{backend}.{option}": value for option, value in options.items()})
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    @property
    def digest(self) -> str:
        """Hash of `shared`."""
        return hashlib.sha256(json.dumps(self.shared(), sort_keys=True).encode()).hexdigest()[:16]

    def allows(self, plugin: str) -> bool:
        """Whether the allow/deny list admits the entry point `plugin`."""
        wanted = [p for p in self.plugins if not p.startswith("-")]
        return f"-{plugin}" not in self.plugins and (not wanted or plugin in wanted)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"configuration file {str(path)!r} named by {FILE_VARIABLE} cannot be read: {error.strerror}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {str(path)!r} named by {FILE_VARIABLE} is not valid TOML: {error}") from error


def _as_type_of(default: Any, raw: Any, key: str, source: str) -> Any:
    try:
        if isinstance(default, bool):
            return _flag(raw)
        if isinstance(default, int):
            if isinstance(raw, (bool, float)):
                raise ValueError
            return int(raw)
        if isinstance(default, float):
            if isinstance(raw, bool):
                raise ValueError
            return float(raw)
        if isinstance(default, str) and isinstance(raw, str):
            return raw
        if isinstance(default, Sequence):
            return _names(raw)
        raise ValueError
    except (TypeError, ValueError):
        raise ConfigError(
            f"setting {key!r} from {source}: wanted {type(default).__name__} such as {default!r}, found {raw!r}"
        ) from None
