"""What this wheel registers. Imports neither torch nor the native library."""

from __future__ import annotations

from commplane.api import BackendSpec, Capability, Numerics, hookimpl

__all__ = ["commplane_register_comm_backends"]

_CAPABILITIES = {
    Capability.ALL_REDUCE,
    Capability.ALL_GATHER,
    Capability.REDUCE_SCATTER,
    Capability.BROADCAST,
    Capability.ALL_REDUCE_RMS_NORM,
    Capability.BARRIER,
    Capability.SYMMETRIC_MEMORY,
    Capability.CAPTURE,
}

# How Python calls the native library: auto, abi3 or ctypes; abi3 costs a tenth, ctypes works everywhere.
_BINDING = {"binding": "auto"}


@hookimpl
def commplane_register_comm_backends() -> list[BackendSpec]:
    """`custom_ar`: collectives for groups inside one host, through shared memory on CPU and between GPUs on CUDA."""
    return [
        BackendSpec(
            name="custom_ar",
            api=(1, 1),
            factory="commplane_custom_ar.backend:CustomAllReduce",
            probe="commplane_custom_ar.probe:probe",
            capabilities=_CAPABILITIES,
            dtypes={"float32", "bfloat16", "float16", "float64", "int32", "int64", "int8", "uint8"},
            ops={"sum", "min", "max", "avg"},
            device="cpu",
            max_world_size=64,
            numerics=Numerics.RANK_ORDER,
            priority=100,
            options={
                # Bytes that a rank copies in before it raises its flag. 64 KiB stays in L2 on both sides and was the fastest
                # of 16 KiB to 1 MiB for messages from 256 KiB up.
                # Rounded up to a multiple of 64, and to 4096 at least.
                "chunk_bytes": 65536,
                # Large messages may be read straight out of the peers' memory (process_vm_readv), where every rank may do so:
                # auto for the sizes at which that was measured to be faster, off, or MIN:MAX in bytes.
                "single_copy": "auto",
                # Vector code to use: auto, baseline, avx2, avx512 or avx512_bf16. For tests and comparisons.
                "isa": "auto",
                **_BINDING,
            },
        ),
        BackendSpec(
            name="custom_ar",
            api=(1, 2),
            factory="commplane_custom_ar.cuda.backend:CudaAllReduce",
            probe="commplane_custom_ar.gpu.gate:probe",
            capabilities=_CAPABILITIES,
            # The library moves any dtype, but one set serves all collectives, and these are what it sums.
            dtypes={"float32", "bfloat16", "float16"},
            ops={"sum"},
            device="cuda",
            max_world_size=8,
            numerics=Numerics.RANK_ORDER,
            priority=100,
            options={
                # auto for what was measured to be the fastest at each size, or one at every size that it serves, for comparisons:
                # one_shot_push, two_shot_push, one_shot_pull or two_shot_pull.
                "algorithm": "auto",
                # Whether inputs of captured calls are read where they are: off, on (an error where torch's memory has no handles)
                # or auto (staged there).
                "registered": "off",
                **_BINDING,
            },
        ),
    ]
