"""The places of SGLang that the adapter hooks or calls, and the versions in which they were looked at."""

from __future__ import annotations

from commplane.engines import Engine, Seam

__all__ = ["CREATE", "ENGINE", "PURPOSES", "REGISTRY"]

_STATE = "sglang.srt.distributed.parallel_state"
_RUNNER = "sglang.srt.model_executor.runner.base_runner"
_CONTEXT = "sglang.srt.runtime_context"

CREATE = Seam(
    _STATE,
    "GroupCoordinator.__init__",
    ("self", "group_ranks", "torch_distributed_backend", "group_name", "recovered_rank", "rank_offset"),
    sets=("unique_name", "ranks", "world_size", "device"),
    among=True,
)
REGISTRY = Seam("sglang.srt.plugins.hook_registry", "HookRegistry.register", ("cls", "target", "hook", "hook_type", "source"))

ENGINE = Engine(
    name="sglang",
    adapter="commplane-sglang",
    versions=">=0.5.21,<0.5.24",
    seams=(
        REGISTRY,
        Seam("sglang.srt.plugins.hook_registry", "HookRegistry.apply_hooks", ("cls",)),
        CREATE,
        Seam(_STATE, "GroupCoordinator.all_reduce", ("self", "input_")),
        Seam(_STATE, "GroupCoordinator._all_reduce_out_place", ("self", "input_", "outplace_all_reduce_method")),
        Seam(_STATE, "GroupCoordinator._all_reduce_in_place", ("self", "input_")),
        Seam(_STATE, "GroupCoordinator.graph_capture", ("self", "graph_capture_context", "stream")),
        Seam(_STATE, "GroupCoordinator.destroy", ("self",)),
        Seam(_RUNNER, "BaseRunner._pre_initialize_flashinfer_allreduce_workspace", ("self",)),
        Seam(_CONTEXT, "max_prefill_buffer_tokens", ()),
        Seam(_CONTEXT, "get_schedule", ()),
    ),
    leave_out="start without it (SGLANG_PLUGINS with the names of the plugins that are wanted)",
    repeatable="SGLANG_ENABLE_DETERMINISTIC_INFERENCE",
)

# Names that SGLang gives to groups that sum activations. World, pipeline and data-parallel groups have other work.
PURPOSES = frozenset({"tp", "pdmux_prefill_tp", "attention_tp", "shared_experts_tp", "attn_cp", "dcp", "moe_ep", "moe_tp"})
