"""Every error that commplane raises on purpose.

Texts follow one form: lower case, one sentence that names the thing, what was wanted, what was found and what to do.
Errors of a communicator begin with who is speaking: ``[tp rank 3/8 custom_ar]``.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "AgreementError",
    "CaptureError",
    "CommplaneError",
    "CommplaneWarning",
    "CommunicatorError",
    "ConfigError",
    "MismatchError",
    "PeerError",
    "PluginCompatibilityError",
    "PluginConflict",
    "PluginError",
    "PluginLoadError",
    "PluginNotFound",
    "SelectionError",
    "UnsupportedOperation",
    "WorkspaceTooSmall",
]


class CommplaneError(Exception):
    """The root: ``except CommplaneError`` catches everything of ours and nothing else."""


class CommplaneWarning(UserWarning):
    """Something the user asked for by name was refused; the run goes on with what was agreed."""


class ConfigError(CommplaneError, ValueError):
    """A setting is unknown, has the wrong type or value, or a rendezvous cannot be found."""


class PluginError(CommplaneError):
    """A plugin cannot be used."""


class PluginNotFound(PluginError, LookupError):
    """A plugin or backend was asked for by name and no installed wheel provides it."""


class PluginConflict(PluginError):
    """Two distributions provide the same name."""


class PluginLoadError(PluginError, ImportError):
    """A plugin raised while it was imported or asked for its specs."""


class PluginCompatibilityError(PluginError):
    """A plugin was made for another version of commplane."""


class SelectionError(CommplaneError):
    """No backend is left for a group; the text gives the reason of each."""


class AgreementError(CommplaneError):
    """The ranks of a group differ in something that must be equal; the text shows the difference."""


class CaptureError(CommplaneError):
    """A control-plane call inside a capture, or a capture that failed on some rank."""


class CommunicatorError(CommplaneError):
    """A communicator cannot do what it was asked."""


class UnsupportedOperation(CommunicatorError, TypeError):
    """The dtype, op, device, layout or size is not served by any backend in the plan."""


class WorkspaceTooSmall(CommunicatorError):
    """A call needs more workspace than `prepare` built; nothing grows by itself, nothing was sent, the communicator goes on."""


class MismatchError(CommunicatorError, ValueError):
    """The ranks called with different arguments (shape, dtype, op, root or buffer mode)."""


class PeerError(CommunicatorError, TimeoutError):
    """Other ranks did not take part within the deadline, or gave up.

    `missing_ranks` are global ranks; empty where the transport cannot tell who is missing.
    """

    def __init__(self, message: str, missing_ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.missing_ranks: tuple[int, ...] = tuple(missing_ranks)

    def __reduce__(self) -> tuple[type[PeerError], tuple[str, tuple[int, ...]]]:
        return (type(self), (str(self), self.missing_ranks))
