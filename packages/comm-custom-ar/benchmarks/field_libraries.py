# SPDX-License-Identifier: Apache-2.0
"""What is compared by field.py, each set up in this process and bound to one call: in-place all-reduce sum on a torch tensor.

Every library gets the shortest way that its Python interface offers: whatever can be prepared outside of the call is. None of
their code is here; DeepSpeed's and vLLM's kernels are compiled on the machine, from what the user has installed.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["LIBRARIES", "Library"]

_PATIENCE = timedelta(minutes=15)  # the first rank may be compiling


class Library(ABC):
    """A library that is ready, in one rank. The constructor, `bind` and the bound calls are collective over `ranks` processes.

    Attributes:
        rank: of this process.
        ranks: how many.
        about: for the report: its version, and what else says what ran.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("FIELD_RANK", "-1"))
        self.ranks = int(os.environ["FIELD_RANKS"])
        self.about: dict[str, Any] = {}

    @abstractmethod
    def bind(self, tensor: torch.Tensor) -> Callable[[], object]:
        """The call that sums `tensor`, contiguous and on the CPU, over the ranks, in place."""

    def refusal(self, dtype: str) -> str | None:
        """Why it does not reduce `dtype`, or None where it does. Equal on all ranks."""
        return None

    def close(self) -> None:
        """The driver is done with this candidate."""
        return

    def store(self) -> dist.Store:
        """The key-value store that the driver keeps for the ranks of this candidate."""
        return dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, timeout=_PATIENCE)

    def first_rank_first(self, store: dist.Store, step: Callable[[], Any]) -> Any:
        """`step` on rank 0, and then on the others: it compiles, and finds the result the second time."""
        if self.rank:
            store.wait(["first rank is done"], _PATIENCE)
        result = step()
        if not self.rank:
            store.set("first rank is done", "1")
        return result


class CustomAr(Library):
    """commplane's custom_ar through `Communicator.all_reduce_` on an ordinary tensor, with the default settings."""

    def __init__(self) -> None:
        super().__init__()
        import commplane
        from commplane.bench import describe, in_words

        self.plane = commplane.init(store=self.store(), rank=self.rank, world_size=self.ranks)
        self.communicator = self.plane.communicator("field", backends=["custom_ar"])
        if self.communicator.plan.backends[0] != "custom_ar":
            reasons = [c.reason for c in self.communicator.plan.candidates if c.name == "custom_ar"]
            raise RuntimeError(f"custom_ar cannot serve these ranks: {reasons[0] if reasons else 'not installed'}")
        machine = describe(self.plane, [self.communicator], [])
        self.about = {"version": machine["wheels"]["commplane-custom-ar"], "machine": machine, "words": in_words(machine)}

    def refusal(self, dtype: str) -> str | None:
        served = self.communicator.plan.explain("all_reduce", nbytes=64, dtype=dtype).chosen
        return None if served == "custom_ar" else f"{served} would serve {dtype}"

    def bind(self, tensor: torch.Tensor) -> Callable[[], object]:
        self.communicator.prepare("all_reduce", dtype=tensor.dtype, max_bytes=tensor.nbytes)
        return partial(self.communicator.all_reduce_, tensor)

    def close(self) -> None:
        self.plane.close()


class Gloo(Library):
    """torch.distributed's backend for CPU tensors."""

    def __init__(self) -> None:
        super().__init__()
        dist.init_process_group("gloo", store=self.store(), rank=self.rank, world_size=self.ranks)
        self.about = {"version": f"torch {torch.__version__}"}

    def bind(self, tensor: torch.Tensor) -> Callable[[], object]:
        return partial(dist.all_reduce, tensor)

    def close(self) -> None:
        dist.destroy_process_group()


class DeepSpeed(Library):
    """The shared-memory kernel behind `deepspeed.comm.inference_all_reduce`, called as the torch operator that it is."""

    def __init__(self) -> None:
        super().__init__()
        os.environ["LOCAL_SIZE"] = str(self.ranks)  # its way to be told that all ranks are on this machine
        accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
        builder = accelerator.create_op_builder("ShareMemCommBuilder")
        module = self.first_rank_first(self.store(), builder.load)
        module.initialize(self.ranks, self.rank)
        self.level = module.vector_kernel_level()
        self.about = {"version": importlib.metadata.version("deepspeed"), "vector_kernel_level": self.level}

    def refusal(self, dtype: str) -> str | None:
        if dtype not in ("float32", "bfloat16", "float16"):
            return f"it does nothing, without a word, for {dtype}"
        return None if self.level >= (1 if dtype == "float32" else 2) else f"it has no code for {dtype} on this processor"

    def bind(self, tensor: torch.Tensor) -> Callable[[], object]:
        return partial(torch.ops.deepspeed.inference_all_reduce_.default, tensor)


class Vllm(Library):
    """The shared-memory kernel behind vLLM's `CpuCommunicator.all_reduce`, from its source or from a CPU build."""

    def __init__(self) -> None:
        super().__init__()
        store = self.store()
        source = os.environ.get("FIELD_VLLM_SOURCE")
        operators = self.first_rank_first(store, partial(_build_vllm, Path(source)) if source else _import_vllm)
        self.about = {"version": _vllm_version(source)}
        name = os.environ["MASTER_ADDR"]
        handle = operators.init_shm_manager(name, self.ranks, self.rank, torch.get_num_threads())
        self._meet(store, "made")
        operators.join_shm_manager(handle, name)
        self._meet(store, "joined")
        self.call = partial(operators.shm_allreduce.default, handle)

    def _meet(self, store: dist.Store, what: str) -> None:
        store.set(f"{what}/{self.rank}", "1")
        store.wait([f"{what}/{rank}" for rank in range(self.ranks)], _PATIENCE)

    def refusal(self, dtype: str) -> str | None:
        return None if dtype in ("float32", "bfloat16", "float16") else f"it has no code for {dtype}"

    def bind(self, tensor: torch.Tensor) -> Callable[[], object]:
        return partial(self.call, tensor)


_VLLM_OPERATORS = """
#include "cpu/shm.cpp"
TORCH_LIBRARY(commplane_field, operators) {
  operators.def("init_shm_manager(str name, int group_size, int rank, int thread_num) -> int", &init_shm_manager);
  operators.def("join_shm_manager(int handle, str name) -> str", &join_shm_manager);
  operators.def("shm_allreduce(int handle, Tensor(a!) data) -> ()");
  operators.impl("shm_allreduce", torch::kCPU, &shm_allreduce);
}
"""


def _build_vllm(source: Path) -> Any:
    """The operators of `csrc/cpu/shm.cpp`, compiled with the flags of vLLM's own CPU build for this processor."""
    from torch.utils.cpp_extension import load_inline

    with open("/proc/cpuinfo") as file:
        flags = next((line.split() for line in file if line.startswith("flags")), [])
    vector = ["-mf16c", *(f"-mavx512{part}" for part in ("f", "vl", "bw", "dq"))] if "avx512bw" in flags else ["-mf16c", "-mavx2"]
    load_inline(  # type: ignore[no-untyped-call]
        "commplane_field_vllm",
        cpp_sources=[_VLLM_OPERATORS],
        extra_include_paths=[str(source / "csrc")],
        extra_cflags=["-O3", "-fopenmp", *(vector if flags else [])],
        is_python_module=False,
    )
    return torch.ops.commplane_field


def _import_vllm() -> Any:
    """The operators of an installed CPU build."""
    importlib.import_module("vllm.platforms").current_platform.import_kernels()
    if not hasattr(torch.ops._C, "init_shm_manager"):
        raise RuntimeError("the installed vllm has no shared-memory kernel for CPUs")
    return torch.ops._C


def _vllm_version(source: str | None) -> str:
    if source is None:
        return importlib.metadata.version("vllm")
    kernel = hashlib.sha256((Path(source) / "csrc" / "cpu" / "shm.cpp").read_bytes()).hexdigest()[:12]
    about = Path(source) / "PKG-INFO"  # a source distribution has it, a clone has not
    lines = about.read_text().splitlines() if about.is_file() else []
    version = next((line.split(":")[1].strip() for line in lines if line.startswith("Version:")), "source")
    return f"{version}, shm.cpp {kernel}"


class Mpi(Library):
    """Whichever MPI the environment points mpi4py to, through `Comm.Allreduce` with `MPI.IN_PLACE`."""

    def __init__(self) -> None:
        super().__init__()
        importlib.import_module("mpi4py").rc.thread_level = "single"  # no locks: there is one thread
        self.mpi: Any = importlib.import_module("mpi4py.MPI")
        self.world = self.mpi.COMM_WORLD
        self.rank, found = self.world.rank, self.world.size
        if found != self.ranks:
            raise RuntimeError(f"wanted {self.ranks} ranks, found {found}: mpiexec and the library are of different MPIs")
        version = self.mpi.Get_library_version().strip("\0 \n").splitlines()[0].split(", package")[0]
        self.about = {"version": " ".join(version.split()), "mpi4py": importlib.metadata.version("mpi4py")}
        self.types = {"float32": self.mpi.FLOAT, "float64": self.mpi.DOUBLE, "int32": self.mpi.INT32_T, "int64": self.mpi.INT64_T}
        bfloat16 = self._bfloat16()
        if bfloat16 is not None:
            self.types["bfloat16"] = bfloat16

    def _bfloat16(self) -> Any:
        """The type that mpi4py has, or the extension of this library that mpi4py does not know, checked by its name."""
        if self.mpi.BFLOAT16_T != self.mpi.DATATYPE_NULL:
            return self.mpi.BFLOAT16_T
        name, _, handle = os.environ.get("FIELD_MPI_BFLOAT16", "").partition("=")
        if not name:
            return None
        found = self.mpi.Datatype.fromhandle(int(handle, 0))
        if found.Get_name() != name:
            raise RuntimeError(f"wanted the type {name} at {handle}, found {found.Get_name()!r}: is it another version?")
        return found

    def refusal(self, dtype: str) -> str | None:
        return None if dtype in self.types else f"it has no type for {dtype}"

    def bind(self, tensor: torch.Tensor) -> Callable[[], object]:
        buffer = self.mpi.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)
        kind = self.types[str(tensor.dtype).removeprefix("torch.")]
        return partial(self.world.Allreduce, self.mpi.IN_PLACE, [buffer, tensor.numel(), kind], self.mpi.SUM)


LIBRARIES: dict[str, Callable[[], Library]] = {
    "custom_ar": CustomAr,
    "gloo": Gloo,
    "deepspeed": DeepSpeed,
    "vllm": Vllm,
    "mpi": Mpi,
}
"""By the name that field_candidates.py starts ranks with."""
