"""What a call refuses, each with its text, before anything is sent."""

from collections.abc import Callable

import pytest
import torch
from flashinfer_world import FORMATS, NORM, QUANT, SUM, World

from commplane.api import ReduceOp
from commplane.errors import UnsupportedOperation, WorkspaceTooSmall

pytestmark = pytest.mark.timeout(60)


def refused(error: type[Exception], text: str, call: Callable[[], object]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value), caught.value
    assert str(caught.value).startswith("[tp rank 0/")


def test_a_message_that_the_workspace_cannot_hold_is_refused_before_anything_is_sent() -> None:
    rank = World(2, most=4096).ranks[0]
    value = torch.zeros((3, 2048), dtype=torch.bfloat16)
    text = "the workspace has room for 4096: call prepare() with max_bytes of 12288 or more"
    refused(WorkspaceTooSmall, text, lambda: rank.bind(SUM)(value))
    weight = torch.ones(2048, dtype=torch.bfloat16)
    refused(WorkspaceTooSmall, text, lambda: rank.bind(NORM)(value, value, weight, 1e-5, 0.0))
    refused(WorkspaceTooSmall, text, lambda: rank.bind(QUANT)(value, value, weight, 1e-5, 0.0, FORMATS[1], False))
    assert not rank.comm.calls


def test_without_a_workspace_a_call_asks_for_prepare() -> None:
    rank = World(2).ranks[0]
    rank.held.clear()
    call = rank.bind(SUM)
    refused(WorkspaceTooSmall, "wanted a workspace for bfloat16, found none: call prepare()", lambda: call(torch.zeros(8)))


def test_nvfp4_is_refused_where_the_kernels_write_zeros() -> None:
    rank = World(2, major=9).ranks[0]
    for dtype in (torch.bfloat16, torch.float32):
        value, weight, call = torch.zeros((1, 64), dtype=dtype), torch.ones(64, dtype=dtype), rank.bind(QUANT, dtype)
        refused(
            UnsupportedOperation,
            "wanted a GPU of compute capability 10.0 or more for nvfp4, found 9.0",
            lambda call=call, value=value, weight=weight: call(value, value, weight, 1e-5, 0.0, FORMATS[-1], False),
        )
    assert not rank.comm.calls


def test_ops_dtypes_and_groups_that_the_kernels_do_not_have_are_refused() -> None:
    rank = World(2).ranks[0]
    refused(UnsupportedOperation, "wanted the op sum, found max", lambda: rank.bind(SUM, op=ReduceOp.MAX))
    refused(UnsupportedOperation, "wanted one of bfloat16, float16, float32, found int8", lambda: rank.bind(SUM, torch.int8))
    refused(UnsupportedOperation, "in place is not served", lambda: rank.bind(QUANT, in_place=True))
    three = World(3).ranks[0]
    refused(UnsupportedOperation, "wanted a group of 2, 4, 8, 16 ranks, found 3", lambda: three.bind(SUM))


def test_a_tensor_of_another_device_is_refused_by_name() -> None:
    rank = World(2).ranks[0]
    here, there = torch.zeros((1, 64), dtype=torch.bfloat16), torch.zeros((64, 2), dtype=torch.bfloat16, device="meta").t()
    text = "wanted a {} on cpu, found one on meta: move it"
    # Devices are compared by number, and neither of these has one: the strides bring it to where the reason is found.
    refused(UnsupportedOperation, text.format("tensor"), lambda: rank.bind(SUM)(there))
    refused(UnsupportedOperation, text.format("residual"), lambda: rank.bind(NORM)(here, there, here[0], 1e-5, 0.0))
    refused(UnsupportedOperation, text.format("weight"), lambda: rank.bind(NORM)(here, here, there.t()[:, 0], 1e-5, 0.0))


def test_a_tensor_that_cannot_be_written_is_refused_before_anything_is_sent() -> None:
    rank = World(2).ranks[0]
    wide, row = torch.zeros((4, 64), dtype=torch.bfloat16), torch.zeros((1, 64), dtype=torch.bfloat16)
    text = "wanted a tensor that can be written in place"
    refused(UnsupportedOperation, text, lambda: rank.bind(SUM, in_place=True)(row.expand(4, 64)))
    refused(UnsupportedOperation, text, lambda: rank.bind(NORM, in_place=True)(wide, row.expand(4, 64), row[0], 1e-5, 0.0))
    assert not rank.comm.calls
