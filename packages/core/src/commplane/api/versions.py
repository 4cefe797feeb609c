"""Contract versions, as (major, minor), separate from any package version.

A plugin writes the number it was made for as a literal in its specs. Importing it from here would compare the number with
itself, a check that cannot fail. A plugin fits when its major equals ours and its minor is not above ours.

=========  ========  ==========================================================================
contract   version   what it added
=========  ========  ==========================================================================
comm       1.0       BackendSpec, CommBackend, commplane_init_workspace
comm       1.1       Capability.ALL_REDUCE_RMS_NORM, add_rms_norm; flight_records and bare of CommBackend
comm       1.2       CommBackend.ranges and SizeRange
comm       1.3       Capability.ALL_REDUCE_RMS_NORM_QUANT, BackendSpec.formats, quantize
comm       1.4       BuildContext.inner
transfer   1.0       TransferSpec, TransferEngine
cache      1.0       SyncSpec, PageStoreSpec, SyncRound, PageStore
=========  ========  ==========================================================================
"""

from __future__ import annotations

__all__ = ["CACHE_API", "COMM_API", "TRANSFER_API", "ApiVersion"]

ApiVersion = tuple[int, int]

COMM_API: ApiVersion = (1, 4)
TRANSFER_API: ApiVersion = (1, 0)
CACHE_API: ApiVersion = (1, 0)
