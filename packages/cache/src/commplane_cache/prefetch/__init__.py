"""Pages from storage before a request needs them: `states` of one prefetch, `policy` that ends it, `slots` for all."""

from __future__ import annotations

from commplane_cache.prefetch.policy import POLICIES, PrefetchPolicy, policy_of
from commplane_cache.prefetch.slots import PrefetchSlots
from commplane_cache.prefetch.states import Prefetch, State

__all__ = ["POLICIES", "Prefetch", "PrefetchPolicy", "PrefetchSlots", "State", "policy_of"]
