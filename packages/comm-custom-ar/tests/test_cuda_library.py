# SPDX-License-Identifier: Apache-2.0
"""The CUDA half of the library as it is called from Python, on a machine that may have no GPU. One process."""

from __future__ import annotations

import ctypes

import pytest
import torch

from commplane.api import Facts, GroupKey, ProbeRequest, Unusable
from commplane_custom_ar import _native, codes, plugin
from commplane_custom_ar.cuda import abi
from commplane_custom_ar.gpu import gate

pytestmark = pytest.mark.timeout(60)

HAS_GPU = torch.cuda.device_count() > 0  # through NVML: this process makes no context


@pytest.fixture(params=("ctypes", "abi3"))
def binding(request: pytest.FixtureRequest) -> str:
    if request.param == "abi3":
        try:
            _native.load("abi3")
        except _native.NativeLibraryError as error:
            pytest.skip(f"this build has no abi3 binding: {error}")
    return str(request.param)


def has_cuda_half() -> bool:
    _native.load().library.commplane_car_cuda_check()
    return "no CUDA half" not in _native.last_error()


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_without_a_driver_the_library_loads_and_says_why_it_is_unusable() -> None:
    assert _native.load().library.commplane_car_cuda_check() == codes.EUNSUPPORTED
    assert _native.last_error() in (
        "there is no CUDA driver on this machine",
        "this build of commplane-custom-ar has no CUDA half: nvcc was not found when it was built",
    )


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_without_a_driver_the_probe_gives_that_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Facts, "same_host", lambda _facts, _ranks: True)
    options = dict(plugin.commplane_register_comm_backends()[1].options)
    verdict = gate.probe(ProbeRequest(GroupKey((0, 1), "cuda", "tp"), 0, options), Facts(()))
    assert isinstance(verdict, Unusable)
    assert "no CUDA driver" in verdict.reason or "no CUDA half" in verdict.reason


def test_a_handle_that_is_none_is_a_status_code(binding: str) -> None:
    native, wanted = _native.load(binding), codes.EINVAL if has_cuda_half() else codes.EUNSUPPORTED
    assert native.cuda_all_reduce(0, 0, 0, 0, 1, 0) == wanted
    assert native.cuda_barrier(0, 0) == wanted
    assert native.cuda_all_gather(0, 0, 0, 0, 1, 0) == wanted
    assert native.cuda_reduce_scatter(0, 0, 0, 0, 1, 0) == wanted
    assert native.cuda_broadcast(0, 0, 0, 1, 0, 0) == wanted
    assert native.cuda_all_reduce_rms_norm(0, 0, 0, 0, 0, 0, 0, 0, 1, 1e-6, 0.0, 0) == wanted


def test_wrong_arguments_raise_and_do_not_call(binding: str) -> None:
    native = _native.load(binding)
    calls = [getattr(native, f"cuda_{name}") for name in abi.HOT]
    for call in calls:
        for arguments in ((), (0,)):
            with pytest.raises((TypeError, ctypes.ArgumentError)):
                call(*arguments)
    for call, numbers in ((native.cuda_all_reduce, (0, 0, 0, 0, 1, None)), (native.cuda_broadcast, (0, 0, 0, 1, "x", 0))):
        with pytest.raises((TypeError, ctypes.ArgumentError)):
            call(*numbers)


def test_a_dtype_that_is_not_summed_is_refused_before_anything_else(binding: str) -> None:
    native = _native.load(binding)
    for name in ("float64", "int32", "int64", "int8", "uint8"):
        assert native.cuda_all_reduce(0, 0, 0, 0, codes.DTYPES[name], 0) == codes.EUNSUPPORTED


def test_a_tensor_that_the_one_call_cannot_take_goes_to_the_fallback() -> None:
    make = _native.load().cuda_tensor_all_reduce
    call = make and make(torch, 0, codes.DTYPES["float32"], 0, True, lambda tensor: ("fallback", tensor), ValueError)
    if call is None:
        pytest.skip("this build has no abi3 binding, or this torch no DLPack functions")
    for tensor in (torch.ones(3), torch.ones(2, 2).T, torch.ones(3, dtype=torch.int32), torch.empty(0)):
        what, given = call(tensor)  # on the CPU, so not on cuda:0
        assert what == "fallback"
        assert given is tensor
