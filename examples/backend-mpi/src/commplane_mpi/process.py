"""Processes that no mpiexec started become MPI processes, and groups of them MPI communicators.

`MPI_Init` then makes a singleton, a world of one, and singletons can connect. But MPICH knows a process by the name of its world
and a rank there, and all singletons have the same name. Names come from the process manager, so while MPI is initialised a thread
answers as one (PMI-1, lines over a socket). What mpiexec started, and has not initialised MPI, is treated alike: its own
`MPI_Init` would wait for ranks outside of the group. Nobody finalizes MPI: that would wait for all that were ever connected.
"""

import ctypes
import os
import socket
import threading
import uuid
import zlib
from pathlib import Path

import mpi4py

from commplane.api import BuildContext

mpi4py.rc.initialize = mpi4py.rc.finalize = False  # not by the import that follows
from mpi4py import MPI as MPI  # noqa: E402

name = ""  # of the world of this process, once `initialise` has made it a singleton
_lock = threading.Lock()
_connected: dict[tuple[str | int, ...], MPI.Intracomm] = {}  # by members; kept, because MPICH never takes back a connection


def initialise() -> None:
    """Initialise MPI, if nobody has. Local."""
    global name
    with _lock:
        if MPI.Is_initialized():
            return
        answering, asking = socket.socketpair()
        own = uuid.uuid4().hex
        threading.Thread(target=_answer, args=(answering, own), daemon=True).start()
        inherited = {key: os.environ.pop(key) for key in list(os.environ) if key.startswith(("PMI", "UCX_TLS"))}
        # Shared memory alone: over a network, MPICH 5.0 ends a process whose peer has died.
        ours = {"PMI_FD": str(asking.detach()), "PMI_RANK": "0", "PMI_SIZE": "1", "UCX_TLS": "sm,self"}
        init = ctypes.CDLL(MPI.__file__).MPI_Init_thread  # not MPI.Init_thread: Python's lock is for the thread that answers
        os.environ.update(ours)
        status = init(None, None, MPI.THREAD_MULTIPLE, ctypes.byref(ctypes.c_int()))
        for key in ours:
            del os.environ[key]
        os.environ.update(inherited)
        if status != MPI.SUCCESS or MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise RuntimeError(f"MPI_Init_thread wanted MPI_THREAD_MULTIPLE and got less, or error {status}")
        MPI.COMM_SELF.Set_errhandler(MPI.ERRORS_RETURN)  # as exceptions; communicators made from it inherit that
        answering.sendall(b"cmd=finalize_ack rc=0\n")  # for who finalizes all the same: MPI.Finalize holds Python's lock too
        for path in {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}:
            if path.startswith("/dev/shm/mpich_shm_"):  # shared within a world, which is this process: nobody needs its name
                Path(path).unlink(missing_ok=True)
        name = own


def _answer(connection: socket.socket, world: str) -> None:
    """Be the process manager of a world of one process, called `world`."""
    answers = {
        "init": "response_to_init pmi_version=1 pmi_subversion=1 rc=0",
        "get_maxes": "maxes kvsname_max=256 keylen_max=64 vallen_max=1024",
        "get_appnum": "appnum appnum=0",
        "get_my_kvsname": f"my_kvsname kvsname={world}",
    }
    for line in connection.makefile():
        command = line.split()[0].removeprefix("cmd=")
        connection.sendall(f"cmd={answers.get(command, f'{command}_result rc=-1 msg=none')}\n".encode())


def connect(context: BuildContext) -> MPI.Intracomm:
    """A communicator over the group in its order, which the caller frees. Collective over the group and nobody else."""
    initialise()
    members = tuple(context.bootstrap.all_gather(name or MPI.COMM_WORLD.rank, what="MPI processes"))
    world, ranks = MPI.COMM_WORLD, members
    if any(isinstance(member, str) for member in members):
        if not all(context.bootstrap.all_gather(members in _connected, what="MPI connections")):
            _connected[members] = _join(context)
        world, ranks = _connected[members], tuple(range(context.world_size))
    tag = zlib.crc32(context.key.purpose.encode()) % 2**15  # threads may do this at the same time
    return world.Create_group(world.Get_group().Incl(ranks), tag)


def _join(context: BuildContext) -> MPI.Intracomm:
    """Rank 0 begins alone, and the others join one by one, each at a port of its own so that their order holds."""
    info = MPI.Info.Create({"timeout": str(max(1, int(context.deadline.remaining())))})  # seconds, known to MPICH
    ports = [MPI.Open_port(info) for _ in range(1, context.world_size)] if context.rank == 0 else None
    ports = context.bootstrap.broadcast(ports, what="MPI ports")
    comm = MPI.COMM_SELF.Dup()
    for newcomer in range(max(1, context.rank), context.world_size):
        port, joins = ports[newcomer - 1], newcomer == context.rank
        both = comm.Connect(port, info) if joins else comm.Accept(port, info)
        comm.Free()
        comm = both.Merge(high=joins)
        both.Free()
        if context.rank == 0:
            MPI.Close_port(port)
    info.Free()
    return comm
