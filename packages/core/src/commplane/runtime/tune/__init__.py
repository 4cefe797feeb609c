"""Tuning of one communicator: every way to run a call is verified, then timed at each size, all taking turns."""

from __future__ import annotations

from commplane.runtime.tune.measure import Tuner
from commplane.runtime.tune.outcome import check_outcome
from commplane.runtime.tune.steps import Steps
from commplane.runtime.tune.subject import Subject, sizes_up_to, subject_of

__all__ = ["Steps", "Subject", "Tuner", "check_outcome", "sizes_up_to", "subject_of"]
