# SPDX-License-Identifier: Apache-2.0
"""What faults of kernels are raised as: who is missing, who called what. From the library's struct, without a GPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from commplane.api import BuildContext, Deadline, GroupKey
from commplane.errors import CommunicatorError, MismatchError, PeerError, UnsupportedOperation
from commplane_custom_ar import _native, codes
from commplane_custom_ar.cuda import faults
from commplane_custom_ar.cuda.abi import Detail
from commplane_custom_ar.cuda.comm import CudaComm

pytestmark = pytest.mark.timeout(60)

RANKS = (4, 5, 6, 7)  # global ones; this process is group rank 1


def comm(status: int, *, missing: int = 0, mismatched: dict[int, dict[str, Any]] | None = None, aborted: int = 0) -> CudaComm:
    """A communicator whose library says this; group ranks as masks."""
    detail = Detail(size=ctypes.sizeof(Detail), status=status, sequence=12, missing_mask=missing, abort_mask=aborted)
    detail.mine.kind, detail.mine.dtype, detail.mine.count, detail.mine.op = codes.KINDS["all_reduce"], 3, 4096, 1
    for rank, call in (mismatched or {}).items():
        detail.mismatch_mask |= 1 << rank
        for name, value in call.items():
            setattr(detail.peers[rank], name, value)
    out = CudaComm.__new__(CudaComm)
    out.raw_detail = lambda: detail  # type: ignore[method-assign]
    return out


def raised(of: CudaComm, status: int, ended: tuple[int, ...] = ()) -> CommunicatorError:
    """`ended`: global ranks whose processes have ended."""
    facts: Any = SimpleNamespace(dead=lambda ranks: [rank for rank in ranks if rank in ended])
    control: Any = None  # faults are local
    key = GroupKey(RANKS, "cuda", "tp")
    context = BuildContext("custom_ar", key, 1, "cuda:1", control, facts, Deadline(9.0), 2.5, {})
    return faults.explain(context, of, status)


def test_a_kernel_that_waited_in_vain_names_the_missing_ranks_as_global_ones() -> None:
    error = raised(comm(codes.ETIMEDOUT, missing=0b1001, aborted=0b0010), codes.ETIMEDOUT)
    assert isinstance(error, PeerError)
    assert error.missing_ranks == (4, 7)
    assert str(error) == (
        "[tp rank 1/4 custom_ar] all_reduce(bfloat16, count=4096), noticed in call number 12: waited up to 2.5 s for rank 4, 7: "
        "did it make the same calls? COMMPLANE_TIMEOUT sets the limit"
    )


def test_a_rank_whose_process_has_ended_is_named_as_such() -> None:
    error = raised(comm(codes.ETIMEDOUT, missing=0b1001), codes.ETIMEDOUT, ended=(7,))
    assert isinstance(error, PeerError)
    assert error.missing_ranks == (7,)
    assert "the process of rank 7 has ended" in str(error)


def test_a_rank_that_came_too_late_is_still_the_one_that_was_missed() -> None:
    error = raised(comm(codes.ETIMEDOUT, missing=0b0001, aborted=0b0011), codes.ETIMEDOUT)
    assert isinstance(error, PeerError)
    assert error.missing_ranks == (4,)


def test_a_rank_that_gave_up_is_named_with_whom_it_missed_and_alone_where_it_left_by_itself() -> None:
    told = raised(comm(codes.EABORTED, missing=0b1000, aborted=0b0001), codes.EABORTED)
    assert isinstance(told, PeerError)
    assert told.missing_ranks == (7,)
    assert "rank 4 gave up first" in str(told)
    left = raised(comm(codes.EABORTED, aborted=0b0001), codes.EABORTED)
    assert isinstance(left, PeerError)
    assert left.missing_ranks == (4,)
    assert "rank 4 gave up" in str(left)


def test_different_calls_are_shown_in_words_on_both_sides() -> None:
    other = {"kind": codes.KINDS["broadcast"], "dtype": 1, "count": 7, "root": 2}
    error = raised(comm(codes.EMISMATCH, mismatched={3: other}), codes.EMISMATCH)
    assert isinstance(error, MismatchError)
    assert "all_reduce(bfloat16, count=4096), noticed in call number 12" in str(error)
    assert "rank 7 called broadcast(float32, count=7, src=2)" in str(error)


def test_two_kernels_at_once_are_told_from_two_threads_in_a_call() -> None:
    device = raised(comm(codes.EBUSY, aborted=0b0010), codes.EBUSY)
    assert type(device) is CommunicatorError
    assert "two that ran at once: order the streams and replays" in str(device)
    host = raised(comm(0), codes.EBUSY)
    assert isinstance(host, UnsupportedOperation)
    assert "one thread at a time" in str(host)


@pytest.mark.parametrize("status", [codes.ETIMEDOUT, codes.EABORTED, codes.EBUSY, codes.EMISMATCH])
def test_a_communicator_that_is_poisoned_raises_what_poisoned_it(status: int) -> None:
    of = comm(status, missing=0b1, aborted=0b10, mismatched={3: {"kind": 2}} if status == codes.EMISMATCH else None)
    assert str(raised(of, codes.EPOISONED)) == str(raised(of, status))


def test_what_the_library_refuses_is_unsupported_with_its_words() -> None:
    library = _native.load().library
    status = library.commplane_car_cuda_all_reduce(None, None, None, 0, codes.DTYPES["int8"], 0)
    error = raised(comm(0), status)
    assert isinstance(error, UnsupportedOperation)
    assert str(error).startswith("[tp rank 1/4 custom_ar] ")
    assert _native.last_error() in str(error)
