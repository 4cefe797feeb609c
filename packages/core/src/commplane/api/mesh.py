"""A layout as a `torch.distributed.DeviceMesh`, and back. torch is loaded when a mesh is made, not before.

A mesh is one way of cutting the ranks; a layout has two, which differ in what they make of a block of tensor-parallel ranks::

    attention   pp, dp, cp, tp               mesh["tp"] is attention_tp, mesh["cp"] attention_cp, mesh["dp"] dp, mesh["pp"] pp
    moe         pp, moe_dp, moe_ep, moe_tp   each dimension is the family of its name
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from commplane.errors import ConfigError

if TYPE_CHECKING:
    from commplane.api.layout import ParallelLayout

__all__ = ["CUTS", "mesh_of", "shape_of", "sizes_of"]

CUTS: Mapping[str, Mapping[str, str]] = {
    "attention": {"pp": "pp", "dp": "dp", "cp": "attention_cp", "tp": "attention_tp"},
    "moe": {"pp": "pp", "moe_dp": "moe_dp", "moe_ep": "moe_ep", "moe_tp": "moe_tp"},
}
"""Cut -> name of a dimension of its mesh -> the family whose groups lie along it; the outermost first."""


def shape_of(layout: ParallelLayout, cut: str) -> dict[str, int]:
    """The dimensions of the mesh and their sizes, the outermost first. Pure."""
    if cut not in CUTS:
        raise ConfigError(f"layout: wanted a cut of {', '.join(CUTS)}, found {cut!r}")
    return {name: len(layout.groups(family)[0]) for name, family in CUTS[cut].items()}


def mesh_of(layout: ParallelLayout, device: str, cut: str) -> Any:
    """The mesh. Collective over all ranks: torch makes process groups."""
    torch, device_mesh = importlib.import_module("torch"), importlib.import_module("torch.distributed.device_mesh")
    shape = shape_of(layout, cut)
    ranks = torch.arange(layout.world_size).view(*shape.values())
    return device_mesh.DeviceMesh(device, ranks, mesh_dim_names=tuple(shape))


def sizes_of(mesh: Any) -> dict[str, int]:
    """The arguments of the layout that `mesh` is of. Local.

    Raises:
        ConfigError: it is none.
    """
    names: Sequence[str] = tuple(mesh.mesh_dim_names or ())
    cut = next((cut for cut in CUTS if names and names == tuple(n for n in CUTS[cut] if n in names)), None)
    if cut is None:
        wanted = " or ".join(", ".join(dims) for dims in CUTS.values())
        raise ConfigError(
            f"layout: wanted a mesh whose dimensions are named, and some of {wanted}, in that order, found "
            f"{', '.join(names) or 'no names'}: name and order them so"
        )
    ranks, shape = mesh.mesh.flatten().tolist(), tuple(mesh.mesh.shape)
    if ranks != list(range(len(ranks))):
        at = next(place for place, (rank, found) in enumerate(zip(range(len(ranks)), ranks, strict=True)) if rank != found)
        place = list(product(*map(range, shape)))[at]
        raise ConfigError(
            f"layout: wanted a mesh of all ranks that counts them up, the last dimension fastest, found rank {ranks[at]} at "
            f"{place} where rank {at} belongs: build it by init_device_mesh or ParallelLayout.to_mesh"
        )
    size = dict(zip(names, shape, strict=True))
    pipeline = size.get("pp", 1)
    block = {"world_size": len(ranks), "pipeline": pipeline, "tensor": len(ranks) // pipeline}
    if cut == "attention":
        return {**block, "data": size.get("dp", 1), "context": size.get("cp", 1)}
    return {**block, "moe_data": size.get("moe_dp", 1), "expert": size.get("moe_ep", 1)}
