"""The tree of errors is part of the API: programs catch by class."""

from __future__ import annotations

import copy
import pickle

import pytest

from commplane import errors

_PARENTS = {
    "PluginError": "CommplaneError",
    "PluginNotFound": "PluginError",
    "PluginConflict": "PluginError",
    "PluginLoadError": "PluginError",
    "PluginCompatibilityError": "PluginError",
    "ConfigError": "CommplaneError",
    "SelectionError": "CommplaneError",
    "AgreementError": "CommplaneError",
    "CaptureError": "CommplaneError",
    "CommunicatorError": "CommplaneError",
    "UnsupportedOperation": "CommunicatorError",
    "WorkspaceTooSmall": "CommunicatorError",
    "MismatchError": "CommunicatorError",
    "PeerError": "CommunicatorError",
}


@pytest.mark.parametrize(("child", "parent"), _PARENTS.items())
def test_each_error_has_the_parent_the_design_gives_it(child: str, parent: str) -> None:
    assert issubclass(getattr(errors, child), getattr(errors, parent))


def test_nothing_else_is_exported() -> None:
    assert set(errors.__all__) == {*_PARENTS, "CommplaneError", "CommplaneWarning"}


def test_siblings_are_not_caught_by_one_another() -> None:
    for name in _PARENTS:
        caught_by = {other for other in _PARENTS if issubclass(getattr(errors, name), getattr(errors, other))} - {name}
        parent = _PARENTS[name]
        assert caught_by == ({parent} if parent in _PARENTS else set())


def test_the_warning_is_a_warning_and_no_error_of_ours() -> None:
    assert issubclass(errors.CommplaneWarning, UserWarning)
    assert not issubclass(errors.CommplaneWarning, errors.CommplaneError)


def test_peer_error_is_caught_as_a_timeout() -> None:
    with pytest.raises(TimeoutError):
        raise errors.PeerError("rank 3 is gone", [3])


def test_peer_error_carries_global_ranks_and_reads_as_its_message() -> None:
    error = errors.PeerError("ranks 3, 5 are gone", iter([3, 5]))
    assert error.missing_ranks == (3, 5)
    assert str(error) == "ranks 3, 5 are gone"  # an OSError with two arguments would read "[Errno ranks ...]"


def test_peer_error_without_ranks_says_that_nobody_is_known_to_be_missing() -> None:
    assert errors.PeerError("somebody is gone").missing_ranks == ()


@pytest.mark.parametrize("name", sorted(_PARENTS))
def test_every_error_survives_pickling(name: str) -> None:
    kind = getattr(errors, name)
    back = pickle.loads(pickle.dumps(kind("what happened")))
    assert type(back) is kind
    assert str(back) == "what happened"


def test_peer_error_keeps_its_ranks_through_pickle_and_copy() -> None:
    error = errors.PeerError("gone", [1, 2])
    for back in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert (str(back), back.missing_ranks) == ("gone", (1, 2))
