# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's all-reduce (trtllm kernels, without multicast) as a backend: a peer to measure beside ours, used only by name.

Not for production: its kernels wait on the device without a deadline, its one-shot makes +0.0 of -0.0, and the first use of a
FlashInfer without prebuilt kernels compiles them for minutes. Run once with ``FLASHINFER_DISABLE_JIT=1`` to see which it is.
"""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import pickle
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from commplane.api import (
    BackendSpec,
    Bootstrap,
    BuildContext,
    Capability,
    Collective,
    CommBackend,
    Facts,
    ProbeRequest,
    ReduceOp,
    SizeRange,
    Unusable,
    Usable,
    Verdict,
    hookimpl,
    refuse_overlap,
)
from commplane.errors import ConfigError, UnsupportedOperation

if TYPE_CHECKING:
    import torch

__all__ = ["FlashInferAllReduce", "commplane_register_comm_backends", "plan_shape", "probe"]

WORLD_SIZES = (2, 4, 8)
HIDDEN_SIZES = (4096, 2048, 1024, 512, 256)
_MOST_BYTES = 64 << 20

# The largest message in bytes that goes by one-shot under `auto`: what vLLM ships for sm_90. With 2 x H200 the one-shot was the
# faster at all sizes up to 32 MiB.
_ONE_SHOT_BYTES = {2: 32 << 20, 4: 2 << 20, 8: 512 << 10}
_OLDEST = (0, 7, 2)  # the first release whose two-shot barrier and early read under PDL are mended


@hookimpl
def commplane_register_comm_backends() -> list[BackendSpec]:
    """`flashinfer_bench`: the sum, on CUDA, inside a host."""
    return [
        BackendSpec(
            name="flashinfer_bench",
            api=(1, 2),
            factory="flashinfer_bench:FlashInferAllReduce",
            probe="flashinfer_bench:probe",
            capabilities={Capability.ALL_REDUCE, Capability.CAPTURE},
            dtypes={"bfloat16", "float16", "float32"},
            device="cuda",
            max_world_size=max(WORLD_SIZES),
            max_bytes=_MOST_BYTES,
            priority=-1,
            options={
                # auto, one_shot or two_shot.
                "algorithm": "auto",
                # Largest message in bytes; the workspaces take 8 times this and the number of ranks.
                "max_bytes": _MOST_BYTES,
                # Programmatic dependent launch.
                "pdl": True,
            },
        )
    ]


def probe(request: ProbeRequest, facts: Facts) -> Verdict:
    """FlashInfer is there, new enough, and the group is one it has kernels for. Local; imports nothing."""
    if not facts.same_host(request.ranks):
        return Unusable(f"the group spans hosts ({facts.describe_hosts(request.ranks)})")
    if request.world_size not in WORLD_SIZES:
        return Unusable(f"serves groups of {', '.join(map(str, WORLD_SIZES))} ranks, this one has {request.world_size}")
    if importlib.util.find_spec("flashinfer") is None:
        return Unusable("flashinfer is not installed: pip install flashinfer-python")
    try:
        version = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        return Unusable("flashinfer has no metadata, so its version is unknown: install it as a wheel")
    numbers = tuple(int(part) if part.isdecimal() else 0 for part in version.split(".")[:3])
    if numbers < _OLDEST:
        return Unusable(f"wanted flashinfer-python 0.7.2 or newer, found {version}: install a newer one")
    return Usable({"flashinfer": version, "kernels": "trtllm", "waits": "on the device, without a deadline"})


def plan_shape(count: int, world_size: int, one_shot: bool) -> tuple[int, int, bool]:
    """Tokens, hidden size and whether it is a one-shot, for a message of `count` elements. Pure.

    The hidden size is the largest of `HIDDEN_SIZES` that divides `count`, else the message is padded to whole rows of the
    smallest. A two-shot wants more tokens than ranks: of less, smaller rows are tried, and then it is a one-shot.
    """
    smallest = HIDDEN_SIZES[-1]
    whole = -(-count // smallest) * smallest
    fitting = [h for h in HIDDEN_SIZES if whole % h == 0]
    if not one_shot:
        fit = next((h for h in fitting if whole // h > world_size), None)
        if fit is not None:
            return whole // fit, fit, False
    return whole // fitting[0], fitting[0], True


def one_shot_limit(algorithm: str, most: int, world_size: int) -> int:
    """The largest message in bytes that goes by one-shot, 0 for none, where `most` is the largest of all. Pure."""
    return {"auto": min(_ONE_SHOT_BYTES[world_size], most), "one_shot": most, "two_shot": 0}[algorithm]


class _Exchange:
    """FlashInfer's `CommBackend` over the group's control plane: ranks are group ranks, and every wait has a deadline."""

    def __init__(self, bootstrap: Bootstrap) -> None:
        self._bootstrap = bootstrap

    def Get_rank(self) -> int:  # noqa: N802  FlashInfer's name
        return self._bootstrap.rank

    def Get_size(self) -> int:  # noqa: N802
        return self._bootstrap.world_size

    def allgather(self, data: Any) -> tuple[Any, ...]:
        said = self._bootstrap.all_gather(_text(data), what="flashinfer: exchange")
        return tuple(map(_value, said))

    def bcast(self, data: Any, root: int = 0) -> Any:
        return _value(self._bootstrap.broadcast(_text(data), src=root, what="flashinfer: broadcast"))

    def barrier(self) -> None:
        self._bootstrap.barrier(what="flashinfer: barrier")

    def Split(self, color: int, key: int) -> _Exchange:  # noqa: N802
        raise UnsupportedOperation("flashinfer wanted to split the group, which only its multicast kernels need")


def _text(data: Any) -> str:
    return base64.b64encode(pickle.dumps(data)).decode()


def _value(text: str) -> Any:
    # From ranks of this job, which run the same code.
    return pickle.loads(base64.b64decode(text))


class FlashInferAllReduce(CommBackend):
    """Sums through FlashInfer's unified API. Messages that are no whole rows are padded through a copy."""

    def __init__(self) -> None:
        self._workspaces: dict[bool, Any] = {}

    def open(self, context: BuildContext) -> None:
        """Load the kernels, then create a workspace for 16-bit types and one for float32. Collective."""
        import torch
        from flashinfer import comm  # type: ignore[import-not-found]
        from flashinfer.comm.trtllm_ar import get_trtllm_comm_module  # type: ignore[import-not-found]
        from flashinfer.utils import is_confidential_compute  # type: ignore[import-not-found]

        options, self._context, self._comm = context.options, context, comm
        if options["algorithm"] not in ("auto", "one_shot", "two_shot"):
            raise ConfigError(
                f"{context.who} setting algorithm: wanted auto, one_shot or two_shot, found {options['algorithm']!r}"
            )
        self._most = options["max_bytes"]
        if not 4096 <= self._most <= _MOST_BYTES:
            raise ConfigError(f"{context.who} setting max_bytes: wanted 4096 to {_MOST_BYTES}, found {self._most}")
        device = torch.device(context.device)
        torch.cuda.set_device(device)
        if torch.cuda.get_device_capability(device)[0] not in (9, 10, 12):
            raise UnsupportedOperation(
                f"{context.who} wanted a GPU of compute capability 9, 10 or 12, found {torch.cuda.get_device_capability(device)}"
            )
        if is_confidential_compute():  # another way to allocate, over a default process group
            raise UnsupportedOperation(f"{context.who} wanted a machine without confidential computing, found one with it")
        get_trtllm_comm_module()
        # A rank that cannot load them is known before any waits for its memory.
        context.bootstrap.barrier(what="flashinfer: kernels are loaded")
        exchange = _Exchange(context.bootstrap)
        for single in (False, True):
            dtype = torch.float32 if single else torch.bfloat16
            tokens = -(-self._most // (HIDDEN_SIZES[0] * dtype.itemsize))
            self._workspaces[single] = comm.create_allreduce_fusion_workspace(
                backend="trtllm",  # "auto" and "mnnvl" use NVLink multicast, a resource of the whole host
                world_size=context.world_size,
                rank=context.rank,
                max_token_num=tokens,
                hidden_dim=HIDDEN_SIZES[0],
                dtype=dtype,
                comm_backend=exchange,
            )
        context.bootstrap.barrier(what="flashinfer: workspaces are there")

    def close(self) -> None:
        """Free the workspaces after what runs on the device. Local; without a deadline where a kernel waits for a lost rank."""
        import torch

        workspaces, self._workspaces = self._workspaces, {}
        if workspaces:
            torch.cuda.synchronize(torch.device(self._context.device))
        for workspace in workspaces.values():
            # destroy() alone leaves the memory in a module's global; it deletes the attribute, so the order matters.
            self._comm.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(workspace.ipc_handles)
            workspace.destroy()
            workspace._internal_workspace = None

    def ranges(self, collective: Collective, dtype: str, capturing: bool = False) -> list[SizeRange]:
        """Up to the setting ``max_bytes``, and where the algorithm changes. Local; from settings, equal on all ranks."""
        limit = one_shot_limit(self._context.options["algorithm"], self._most, self._context.world_size)
        if limit == 0:
            return [SizeRange(0, self._most + 1, "two_shot")]
        larger = [SizeRange(limit + 1, self._most + 1, "two_shot")] if limit < self._most else []
        return [SizeRange(0, limit + 1, "one_shot"), *larger]

    def capture_end(self, bootstrap: Bootstrap) -> None:
        """Nothing to exchange: kernels on memory that is mapped already."""

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """Sum in place; any shape and layout."""
        return self.bind(Collective.ALL_REDUCE, op, tensor.dtype, in_place=True)(tensor)  # type: ignore[no-any-return]

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """Sum out of place; any shape and layout."""
        return self.bind(Collective.ALL_REDUCE, op, tensor.dtype, in_place=False)(tensor)  # type: ignore[no-any-return]

    def bind(
        self, collective: Collective, op: ReduceOp | None, dtype: torch.dtype | None, *, in_place: bool
    ) -> Callable[..., Any]:
        """A closure over the workspace of `dtype`."""
        import torch

        if collective is not Collective.ALL_REDUCE:
            return super().bind(collective, op, dtype, in_place=in_place)
        context, most = self._context, self._most
        if op is not ReduceOp.SUM or dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise UnsupportedOperation(
                f"{context.who} all_reduce wanted the sum of a type of 2 or 4 bytes, found {op} of {dtype}"
            )
        run = partial(
            self._comm.allreduce_fusion,
            workspace=self._workspaces[dtype == torch.float32],
            pattern=self._comm.AllReduceFusionPattern.kAllReduce,
            launch_with_pdl=context.options["pdl"],
            trigger_completion_at_end=True,  # False with a one-shot lets the next kernel read what is not there yet
            fp32_acc=True,
        )
        world_size, device = context.world_size, torch.device(context.device)
        limit = one_shot_limit(context.options["algorithm"], most, context.world_size)

        def reduce(dense: torch.Tensor, out: torch.Tensor) -> None:
            tokens, hidden, one_shot = plan_shape(dense.numel(), world_size, dense.nbytes <= limit)
            shape = (tokens, hidden)
            with torch.cuda.device(device):
                if dense.numel() == tokens * hidden and dense.data_ptr() % 16 == 0 and out.data_ptr() % 16 == 0:
                    run(dense.view(shape), output=out.view(shape), use_oneshot=one_shot)
                    return
                rows = torch.zeros(shape, dtype=dense.dtype, device=device)
                rows.view(-1)[: dense.numel()] = dense.view(-1)
                run(rows, output=rows, use_oneshot=one_shot)
                out.view(-1).copy_(rows.view(-1)[: dense.numel()])

        def check(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.device != device:
                raise UnsupportedOperation(f"{context.who} wanted a tensor on {device}, found one on {tensor.device}")
            if tensor.nbytes > most:
                raise UnsupportedOperation(
                    f"{context.who} wanted at most {most} bytes, found {tensor.nbytes}: raise flashinfer_bench.max_bytes"
                )
            return tensor.detach().contiguous()

        def all_reduce_(tensor: torch.Tensor) -> torch.Tensor:
            refuse_overlap(tensor, context.who)
            dense = check(tensor)
            if dense.numel():
                reduce(dense, dense)
            if dense.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(dense)
            return tensor

        def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
            dense = check(tensor)
            out = torch.empty_like(dense)
            if dense.numel():
                reduce(dense, out)
            return out

        return all_reduce_ if in_place else all_reduce
