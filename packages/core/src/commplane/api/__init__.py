"""The contract: everything a plugin needs, and the only part of core (with `commplane.errors`) that it may import.

Importing this loads neither torch nor any plugin.
"""

from __future__ import annotations

from commplane.api.backend import BuildContext, CommBackend, ProbeRequest, refuse_overlap
from commplane.api.bootstrap import Bootstrap, Deadline
from commplane.api.facts import Facts, RankFacts
from commplane.api.flight import FlightRecord
from commplane.api.group import GroupKey
from commplane.api.inner import InnerGroup, InnerGroups
from commplane.api.layout import ParallelLayout, Place
from commplane.api.markers import hookimpl
from commplane.api.norm import add_rms_norm
from commplane.api.pages import PageStore, StoreContext, StoreDone, StoreUsage
from commplane.api.quantize import Quantization, Quantized, misquantized, quantize
from commplane.api.ranges import SizeRange
from commplane.api.shm import owned_name, sweep
from commplane.api.spec import BackendSpec, PageStoreSpec, Spec, SyncField, SyncSpec, TransferSpec
from commplane.api.sync import Agreed, SyncRound
from commplane.api.transfer import Moved, TransferContext, TransferEngine
from commplane.api.types import Capability, Collective, Numerics, QuantFormat, ReduceOp, Variant, Vote
from commplane.api.verdict import Unusable, Usable, Verdict
from commplane.api.versions import CACHE_API, COMM_API, TRANSFER_API
from commplane.api.workspace import Requirement, Workspace

__all__ = [
    "CACHE_API",
    "COMM_API",
    "TRANSFER_API",
    "Agreed",
    "BackendSpec",
    "Bootstrap",
    "BuildContext",
    "Capability",
    "Collective",
    "CommBackend",
    "Deadline",
    "Facts",
    "FlightRecord",
    "GroupKey",
    "InnerGroup",
    "InnerGroups",
    "Moved",
    "Numerics",
    "PageStore",
    "PageStoreSpec",
    "ParallelLayout",
    "Place",
    "ProbeRequest",
    "QuantFormat",
    "Quantization",
    "Quantized",
    "RankFacts",
    "ReduceOp",
    "Requirement",
    "SizeRange",
    "Spec",
    "StoreContext",
    "StoreDone",
    "StoreUsage",
    "SyncField",
    "SyncRound",
    "SyncSpec",
    "TransferContext",
    "TransferEngine",
    "TransferSpec",
    "Unusable",
    "Usable",
    "Variant",
    "Verdict",
    "Vote",
    "Workspace",
    "add_rms_norm",
    "hookimpl",
    "misquantized",
    "owned_name",
    "quantize",
    "refuse_overlap",
    "sweep",
]
