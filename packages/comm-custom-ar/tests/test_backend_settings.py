"""Settings of `custom_ar` change the way that data takes and never the bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from car_oracle import DTYPES, digest, inputs, ops_of
from car_threads import run

from commplane import errors
from commplane.runtime import Plane
from commplane_custom_ar import _native

WORLD = 3
SINGLE_COPY = {"single_copy": f"1:{1 << 40}"}  # every message that is not empty, and not in symmetric memory
WAYS: dict[str, dict[str, Any]] = {
    "as it comes": {"chunk_bytes": 65536},
    "small chunks": {"chunk_bytes": 1},
    "odd chunks": {"chunk_bytes": 5000},
    "large chunks": {"chunk_bytes": 1 << 20},
    "ctypes": {"binding": "ctypes"},
    "abi3": {"binding": "abi3"},
    "baseline": {"isa": "baseline"},
    "avx2": {"isa": "avx2"},
    "avx512": {"isa": "avx512"},
    "avx512_bf16": {"isa": "avx512_bf16"},
    "no single copy": {"single_copy": "off"},
    "single copy": SINGLE_COPY,
    "single copy in baseline code": {**SINGLE_COPY, "isa": "baseline"},
}


def everything(plane: Plane) -> tuple[str, tuple[str, ...]]:
    """Results of all collectives in all dtypes as one digest, and which backends there are."""
    tp = plane.communicator("tp")
    tp.prepare("all_reduce", dtype=torch.float32, max_bytes=1 << 20)
    seen = []
    for dtype in DTYPES:
        for count in (1, 33, 2001, 30_000):
            parts = inputs(WORLD, (count, WORLD), dtype, seed=count)
            buffer = tp.empty(count, WORLD, dtype=dtype).copy_(parts[tp.rank])
            for x in (parts[tp.rank], buffer):
                seen += [tp.all_reduce(x, op) for op in ops_of(dtype)]
                if dtype.is_floating_point:
                    seen += [*tp.all_reduce_rms_norm(x, parts[0], parts[0][0], 1e-6)]
                    seen += [*tp.all_reduce_rms_norm_(x.clone(), parts[0].clone(), parts[0][0], 1e-6)]
                seen += [tp.all_gather(x), tp.broadcast(x.clone(), src=1)]
                seen += [tp.all_gather(tp.reduce_scatter(x[: count // WORLD * WORLD]))]
    return digest(seen), tp.plan.backends


@pytest.fixture(scope="module")
def first() -> str:
    return run(WORLD, everything, **WAYS["as it comes"])[0][0]


@pytest.mark.parametrize("way", WAYS)
def test_no_setting_changes_a_bit(way: str, first: str) -> None:
    options = WAYS[way]
    if "isa" in options:
        try:
            _native.set_isa(options["isa"])
        except _native.NativeError as error:
            pytest.skip(f"this CPU has no {options['isa']}: {error}")
    if options.get("binding") == "abi3":
        try:
            _native.load("abi3")
        except _native.NativeLibraryError as error:
            pytest.skip(f"this build has no abi3 binding: {error}")
    try:
        out = run(WORLD, everything, **options)
    finally:
        _native.set_isa("auto")
    assert out == [(first, ("custom_ar", "torch"))] * WORLD


def test_single_copy_is_taken_where_the_settings_say() -> None:
    """Seen from its steps: two hops with data and a last one, whatever the size; one-shot takes one a chunk."""

    def steps(plane: Plane) -> list[int]:
        tp = plane.communicator("tp")
        out = []
        for count in (1000, 5000, 100_000):
            tp.all_reduce(torch.ones(count))
            comm = tp.backends[0]._staging.comm  # type: ignore[attr-defined]
            out.append(int(comm.flight()[-1].steps))
        return out

    assert run(2, steps, single_copy="20000:20000") == [[1, 3, 98]] * 2
    assert run(2, steps, single_copy="off") == [[1, 5, 98]] * 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"isa": "mmx"}, "EUNSUPPORTED"),
        ({"binding": "swig"}, "wanted auto, abi3 or ctypes, found 'swig'"),
        ({"single_copy": "many"}, "wanted auto, off or MIN:MAX in bytes, found 'many'"),
        ({"chunk_bytes": 1 << 50}, None),
        ({"chunk_bytes": -5}, None),
    ],
)
def test_a_setting_that_cannot_be_kept_takes_the_backend_out_on_all_ranks_with_the_reason(
    options: dict[str, Any], reason: str | None
) -> None:
    def rank_main(plane: Plane) -> tuple[tuple[str, ...], str]:
        tp = plane.communicator("tp")
        assert tp.all_reduce(torch.ones(1)).item() == 2.0
        return tp.plan.backends, next((c.reason for c in tp.plan.candidates if c.name == "custom_ar"), "")

    try:
        (backends, text), other = run(2, rank_main, **options)
    finally:
        _native.set_isa("auto")
    assert (backends, text) == other
    if reason is None:
        assert backends == ("custom_ar", "torch")  # rounded into what is possible
    else:
        assert backends == ("torch",) and reason in text


def test_settings_of_another_type_are_refused() -> None:
    with pytest.raises(errors.ConfigError, match="chunk_bytes"):
        run(2, lambda plane: plane.rank, chunk_bytes="all")
