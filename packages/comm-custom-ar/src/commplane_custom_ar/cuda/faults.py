# SPDX-License-Identifier: Apache-2.0
"""A status of the CUDA half as an exception of the contract, with ranks as global ranks. Local.

Kernels find faults after their call has returned, so the call that raises is a later one, or a barrier.
"""

from __future__ import annotations

from commplane.api import BuildContext
from commplane.errors import CommunicatorError, UnsupportedOperation
from commplane_custom_ar import _native, faults
from commplane_custom_ar.codes import EBUSY, EPOISONED, EUNSUPPORTED
from commplane_custom_ar.cuda.comm import CudaComm

__all__ = ["explain"]


def explain(context: BuildContext, comm: CudaComm, status: int) -> CommunicatorError:
    """What to raise for `status`, which a call on `comm` returned."""
    text = _native.last_error()
    if status == EUNSUPPORTED:
        return UnsupportedOperation(f"{context.who} {text}")
    known = comm.raw_detail()
    if status == EPOISONED and known.status:
        status = known.status
    if status == EBUSY and known.status == EBUSY:
        return CommunicatorError(
            f"{context.who} {comm.detail().operation} number {known.sequence}: wanted one kernel of this communicator at a time, "
            f"found two that ran at once: order the streams and replays that use it with events, or give each a communicator"
        )
    return faults.explain(context, comm, status)
