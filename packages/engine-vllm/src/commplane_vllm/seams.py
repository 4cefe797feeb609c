"""The places of vLLM that the adapter hooks or calls, and the versions in which they were looked at."""

from __future__ import annotations

from commplane.engines import Engine, Seam

__all__ = ["ENGINE", "PURPOSES"]

_STATE = "vllm.distributed.parallel_state"

ENGINE = Engine(
    name="vllm",
    adapter="commplane-vllm",
    versions=">=0.32.0,<0.34",
    seams=(
        Seam(
            _STATE,
            "GroupCoordinator.__init__",
            ("self", "group_ranks", "torch_distributed_backend", "use_device_communicator", "group_name"),
            sets=("unique_name", "ranks", "world_size", "device", "device_communicator"),
            among=True,
        ),
        Seam(_STATE, "GroupCoordinator._all_reduce_out_place", ("self", "input_")),
        Seam(_STATE, "GroupCoordinator.graph_capture", ("self", "graph_capture_context")),
        Seam(_STATE, "GroupCoordinator.destroy", ("self",)),
        Seam("vllm.config.vllm", "get_current_vllm_config_or_none", ()),
        Seam("vllm.config.model", "ModelConfig.get_hidden_size", ("self",)),
    ),
    leave_out="start without it (VLLM_PLUGINS with the names of the plugins that are wanted)",
    repeatable="VLLM_BATCH_INVARIANT",
)

# Names that vLLM gives to groups that sum activations. World, pipeline and data-parallel groups have other work.
PURPOSES = frozenset({"tp", "etp", "dcp", "pcp", "ep"})
