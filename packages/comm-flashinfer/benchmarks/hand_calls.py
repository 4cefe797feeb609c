"""FlashInfer called as its documentation shows: a workspace of its own, tensors made beforehand, nothing between."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable
from typing import Any

import torch

from commplane.api import QuantFormat, Quantization
from commplane.runtime import Plane

__all__ = ["ByHand"]


class _Exchange:
    """What FlashInfer wants of a group while it makes a workspace."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane

    def Get_rank(self) -> int:  # noqa: N802  FlashInfer's name
        return self._plane.rank

    def Get_size(self) -> int:  # noqa: N802
        return self._plane.world_size

    def allgather(self, data: Any) -> tuple[Any, ...]:
        said = self._plane.gather(base64.b64encode(pickle.dumps(data)).decode(), what="by hand: gather")
        return tuple(pickle.loads(base64.b64decode(text)) for text in said)

    def bcast(self, data: Any, root: int = 0) -> Any:
        return self.allgather(data)[root]

    def barrier(self) -> None:
        self.allgather(None)

    def Split(self, color: int, key: int) -> _Exchange:  # noqa: N802
        raise NotImplementedError("only multicast kernels split a group")


class ByHand:
    """A workspace for bfloat16 of all ranks of `plane`, for up to `max_bytes`. Collective."""

    def __init__(self, plane: Plane, device: torch.device, max_bytes: int, hidden: int) -> None:
        from flashinfer import comm  # type: ignore[import-not-found, unused-ignore]

        self._comm: Any = comm
        self.workspace = comm.create_allreduce_fusion_workspace(
            backend="trtllm",  # "auto" and "mnnvl" use NVLink multicast, a resource of the whole host
            world_size=plane.world_size,
            rank=plane.rank,
            max_token_num=-(-max_bytes // (2 * hidden)),
            hidden_dim=hidden,
            dtype=torch.bfloat16,
            comm_backend=_Exchange(plane),
        )

    def norm(self, x: Any, residual: Any, weight: Any, *, one_shot: bool | None) -> Callable[[], object]:
        """All-reduce + residual + RMSNorm; without a word on `one_shot` FlashInfer chooses."""
        norm, total = torch.empty_like(x), torch.empty_like(x)
        return self._call(x, residual, weight, one_shot, 1, output=norm, norm_out=norm, residual_out=total)

    def quantised(self, x: Any, residual: Any, weight: Any, how: Quantization, *, one_shot: bool | None) -> Callable[[], object]:
        """The same with an FP8 output and no norm."""
        (tokens, hidden), total = x.shape, torch.empty_like(x)
        more: dict[str, Any] = {"quant_out": torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)}
        if how.format is QuantFormat.FP8_STATIC:
            pattern, more["scale_factor"] = 2, how.scale
        elif how.format is QuantFormat.FP8_TOKEN:
            pattern, more["scale_out"] = 10, torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
        else:
            columns, column = -(-hidden // how.group // 4), -(-tokens // 4) * 4
            scales = torch.zeros(columns, column, dtype=torch.int32, device=x.device)[:, :tokens].transpose(0, 1)
            pattern, more["scale_out"], more["block_quant_group_size"] = 8, scales, how.group
        return self._call(x, residual, weight, one_shot, pattern, output=x, residual_out=total, **more)

    def _call(
        self, x: Any, residual: Any, weight: Any, one_shot: bool | None, pattern: int, **outputs: Any
    ) -> Callable[[], object]:
        run, workspace = self._comm.allreduce_fusion, self.workspace

        def call() -> object:
            return run(
                input=x,
                workspace=workspace,
                pattern=pattern,
                launch_with_pdl=True,
                trigger_completion_at_end=True,
                residual_in=residual,
                rms_gamma=weight,
                rms_eps=1e-6,
                use_oneshot=one_shot,
                fp32_acc=True,
                **outputs,
            )

        return call

    def close(self) -> None:
        """Give the memory back, after what runs. Local."""
        torch.cuda.synchronize()
        # destroy() alone leaves the memory in a global of the module; it deletes the attribute, so the order matters.
        self._comm.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(self.workspace.ipc_handles)
        self.workspace.destroy()
        self.workspace._internal_workspace = None
