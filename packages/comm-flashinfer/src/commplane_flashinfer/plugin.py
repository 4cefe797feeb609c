"""The entry point. Importing it loads neither torch nor flashinfer."""

from __future__ import annotations

from commplane.api import BackendSpec, Capability, Numerics, QuantFormat, hookimpl
from commplane_flashinfer.capacity import WORLD_SIZES
from commplane_flashinfer.settings import DEFAULTS

__all__ = ["commplane_register_comm_backends"]


@hookimpl
def commplane_register_comm_backends() -> list[BackendSpec]:
    """`flashinfer`: the sum, alone and fused with residual, RMS norm and quantisation, between the GPUs of a host."""
    return [
        BackendSpec(
            name="flashinfer",
            api=(1, 3),
            factory="commplane_flashinfer.backend:FlashInfer",
            probe="commplane_flashinfer.probe:probe",
            capabilities={
                Capability.ALL_REDUCE,
                Capability.ALL_REDUCE_RMS_NORM,
                Capability.ALL_REDUCE_RMS_NORM_QUANT,
                Capability.CAPTURE,
            },
            dtypes={"bfloat16", "float16", "float32"},
            ops={"sum"},
            # nvfp4 only where the device has it: FlashInfer.formats.
            formats={str(f) for f in QuantFormat},
            device="cuda",
            min_world_size=min(WORLD_SIZES),
            max_world_size=max(WORLD_SIZES),
            # Every rank adds the same numbers in the order of group ranks; the sign of a zero is the exception, see the README.
            numerics=Numerics.RANK_ORDER,
            priority=50,
            options=DEFAULTS,
        )
    ]
