"""Can this group communicate over MPI? Local: it loads the library and initialises nothing."""

from commplane.api import Facts, ProbeRequest, Unusable, Usable, Verdict


def probe(request: ProbeRequest, facts: Facts) -> Verdict:
    """Every rank is a process, and this one has an MPI that it can be wired up with."""
    if len({(facts[r].pid_namespace, facts[r].pid, facts[r].pid_start) for r in request.ranks}) < request.world_size:
        return Unusable("some ranks are threads of one process, and a rank of MPI is a process")
    try:
        from commplane_mpi.process import MPI, name
    except (ImportError, RuntimeError) as error:  # mpi4py raises RuntimeError where it finds no library
        text = " ".join(str(error).split())
        return Unusable(f"no MPI library loads: install mpi4py and mpich, or name a libmpi.so in MPI4PY_LIBMPI ({text})")
    vendor, version = MPI.get_vendor()
    library = f"{vendor} {'.'.join(map(str, version))}"
    if MPI.Is_finalized():
        return Unusable("MPI was finalized in this process, and cannot be initialised a second time")
    if name or not MPI.Is_initialized():
        if vendor != "MPICH":
            return Unusable(f"{library} connects only what its mpiexec started: start the ranks with it, or install mpich")
        if not facts.same_host(request.ranks):
            hosts = facts.describe_hosts(request.ranks)
            return Unusable(f"the group spans hosts ({hosts}), and MPI connects ranks only inside one: start them with mpiexec")
        return Usable({"library": library, "wire_up": "connect and accept"})
    if MPI.COMM_WORLD.size < request.world_size:
        found = f"MPI was initialised before, in a world of {MPI.COMM_WORLD.size} where the group has {request.world_size} ranks"
        return Unusable(f"{found}: start them with mpiexec, or set mpi4py.rc.initialize = False before MPI is imported")
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        return Unusable("MPI was initialised without MPI_THREAD_MULTIPLE, and commplane calls it from several threads")
    return Usable({"library": library, "wire_up": "part of MPI_COMM_WORLD"})
