"""What this wheel registers. Imports neither torch nor MPI."""

from commplane.api import BackendSpec, Capability, hookimpl


@hookimpl
def commplane_register_comm_backends() -> list[BackendSpec]:
    """`mpi`: the collectives of an MPI library. It may add in any order, so `numerics` stays at its default, unordered."""
    return [
        BackendSpec(
            name="mpi",
            api=(1, 0),
            factory="commplane_mpi.backend:Mpi",
            probe="commplane_mpi.probe:probe",
            capabilities=[Capability(c) for c in ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "barrier")],
            dtypes={"float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64"},
            ops={"sum", "min", "max", "avg"},
            device="cpu",
            max_world_size=64,  # MPICH 5.0 ends a process that is to connect to 100 worlds
            priority=50,
        )
    ]
