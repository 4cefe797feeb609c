"""Decisions that all ranks take alike: one exchange of fixed schema a step.

A decision that depends on a local clock, pool size or queue length is a vote with a stated rule. Every rank runs the same
round in every step, whatever it has to say; a collective whose execution depends on local state is what hangs engines. The
schema is what plugins registered with `commplane_register_cache_sync`, or what the caller gave; it is compared once, and its
hash, the number of the step and a digest of the rank's state travel with every round, so that a rank that is a step behind, or
whose state went another way, is an error and not a wrong answer.
"""

from __future__ import annotations

from commplane.runtime.sync.round import SyncRound

__all__ = ["SyncRound"]
