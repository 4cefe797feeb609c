"""Which ranks of a job form which groups, from the sizes of its parallelism. Pure: no torch, nobody is asked.

Two ways of cutting one block of tensor-parallel ranks stand side by side, one for attention and one for the experts of an MoE::

    world = pipeline x tensor               rank = stage * tensor + place in the block
    block = data x context x attention_tp   place = (dp * context + attention_cp) * attention_tp size + attention_tp
          = moe_data x expert x moe_tp      place = (moe_dp * expert + moe_ep) * moe_tp size + moe_tp

For ``ParallelLayout(world_size=8, tensor=8, data=2, context=2, expert=4)``, attention_tp and moe_tp have 2 ranks each::

                 attention_tp                          moe_tp
                   0   1                                0   1
    dp 0   cp 0 [  0   1  ]              moe_ep 0    [  0   1  ]
           cp 1 [  2   3  ]              moe_ep 1    [  2   3  ]
    dp 1   cp 0 [  4   5  ]              moe_ep 2    [  4   5  ]
           cp 1 [  6   7  ]              moe_ep 3    [  6   7  ]

    attention_tp: rows          [0 1] [2 3] [4 5] [6 7]     moe_tp: rows       [0 1] [2 3] [4 5] [6 7]
    attention_cp: columns       [0 2] [1 3] [4 6] [5 7]     moe_ep: columns    [0 2 4 6] [1 3 5 7]
    attention: both, a grid     [0 1 2 3] [4 5 6 7]         moe_dp             [0] [1] ... [7]
    dp: the same place          [0 4] [1 5] [2 6] [3 7]     tp, world          [0 1 2 3 4 5 6 7]

Engines have several words for some of these: cp is attention_cp, attention_dp is dp, and ep is moe_ep.

The order is SGLang's (`initialize_model_parallel`): pipeline outermost, then data, context, tensor innermost. vLLM's data
parallelism lies outside of its blocks: there each replica is a layout of its own, over ranks of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import product
from types import MappingProxyType
from typing import Any, ClassVar

from commplane.api.mesh import mesh_of, sizes_of
from commplane.errors import ConfigError

__all__ = ["ParallelLayout", "Place"]

Groups = tuple[tuple[int, ...], ...]

_ATTENTION = ("stage", "dp", "cp", "tp")
_MOE = ("stage", "dp", "ep", "tp")
# Family -> how the block is cut, and which coordinates differ among the ranks of one group.
_CUTS: Mapping[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "world": (_ATTENTION, frozenset(_ATTENTION)),
    "tp": (_ATTENTION, frozenset({"dp", "cp", "tp"})),
    "pp": (_ATTENTION, frozenset({"stage"})),
    "dp": (_ATTENTION, frozenset({"dp"})),
    "attention_tp": (_ATTENTION, frozenset({"tp"})),
    "attention_cp": (_ATTENTION, frozenset({"cp"})),
    "attention": (_ATTENTION, frozenset({"cp", "tp"})),
    "moe_tp": (_MOE, frozenset({"tp"})),
    "moe_ep": (_MOE, frozenset({"ep"})),
    "moe_dp": (_MOE, frozenset({"dp"})),
}
_ALIASES: Mapping[str, str] = {"cp": "attention_cp", "attention_dp": "dp", "ep": "moe_ep"}

# Of a family, how many groups `explain` shows.
_SHOWN = 8


@dataclass(frozen=True)
class Place:
    """Where one rank stands.

    Attributes:
        rank: global rank.
        groups: family -> global ranks of this rank's group, in group order.
        index: family -> group rank, this rank's coordinate along the family.
    """

    rank: int
    groups: Mapping[str, tuple[int, ...]]
    index: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """The groups of a job. Equal sizes give equal groups on every rank.

    Attributes:
        world_size: number of ranks; ``pipeline * tensor``.
        tensor: ranks of a block, among which a layer's weights are cut.
        pipeline: stages, each a block.
        data: parts of a block whose attention serves requests of their own (attention data parallelism).
        context: ranks among which the tokens of a sequence are cut in attention.
        expert: ranks among which the experts of an MoE are spread.
        moe_data: parts of a block that have all experts.
        families: the names of the families of groups, in the order in which they are created.
    """

    families: ClassVar[tuple[str, ...]] = tuple(_CUTS)

    world_size: int
    tensor: int
    pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    moe_data: int = 1

    def __post_init__(self) -> None:
        for f in fields(self):
            size = getattr(self, f.name)
            if type(size) is not int or size < 1:
                raise ConfigError(f"layout: {f.name} must be a positive integer, found {size!r}")
        if self.pipeline * self.tensor != self.world_size:
            raise ConfigError(
                f"layout: pipeline x tensor must be the world size, found {self.pipeline} x {self.tensor} = "
                f"{self.pipeline * self.tensor} and {self.world_size} ranks"
            )
        for first, second in (("data", "context"), ("moe_data", "expert")):
            a, b = getattr(self, first), getattr(self, second)
            if self.tensor % (a * b):
                raise ConfigError(
                    f"layout: {first} x {second} must divide tensor, found {a} x {b} = {a * b} and tensor {self.tensor}"
                )

    @property
    def attention_tensor(self) -> int:
        """Ranks among which the heads of attention are cut: what data and context leave of a block."""
        return self.tensor // (self.data * self.context)

    @property
    def moe_tensor(self) -> int:
        """Ranks among which one expert is cut."""
        return self.tensor // (self.moe_data * self.expert)

    def groups(self, family: str) -> Groups:
        """All groups of a family of `families`, each with its global ranks in group order; every rank is in exactly one.

        ``cp``, ``ep`` and ``attention_dp`` are other words for families.
        """
        return _all_groups(self)[self.family(family)]

    def family(self, name: str) -> str:
        """The family that is called `name`, which may be another word for it.

        Raises:
            ConfigError: there is none.
        """
        found = _ALIASES.get(name, name)
        if found not in _CUTS:
            raise ConfigError(f"layout: wanted one of {', '.join((*self.families, *_ALIASES))}, found {name!r}")
        return found

    @property
    def world(self) -> Groups:
        """All ranks, as one group."""
        return self.groups("world")

    @property
    def tp(self) -> Groups:
        """Blocks: tensor parallelism of what is neither attention nor expert."""
        return self.groups("tp")

    @property
    def pp(self) -> Groups:
        """The same place in every stage."""
        return self.groups("pp")

    @property
    def dp(self) -> Groups:
        """The same place in every part of a block that serves requests of its own."""
        return self.groups("dp")

    @property
    def attention_tp(self) -> Groups:
        """Ranks that have different heads of the same tokens."""
        return self.groups("attention_tp")

    @property
    def attention_cp(self) -> Groups:
        """Ranks that have the same heads of different tokens."""
        return self.groups("attention_cp")

    @property
    def attention(self) -> Groups:
        """All ranks that serve one request in a stage: the grid of `attention_cp` and `attention_tp`, row after row.

        Rank ``cp * attention_tensor + tp`` of a group is the one at these coordinates. A cache of keys and values agrees over it.
        """
        return self.groups("attention")

    @property
    def moe_tp(self) -> Groups:
        """Ranks that have different parts of the same experts."""
        return self.groups("moe_tp")

    @property
    def moe_ep(self) -> Groups:
        """Ranks that have different experts."""
        return self.groups("moe_ep")

    @property
    def moe_dp(self) -> Groups:
        """Ranks that have the same experts."""
        return self.groups("moe_dp")

    def of(self, rank: int) -> Place:
        """The groups of `rank`, and its place in each."""
        if not 0 <= rank < self.world_size:
            raise ConfigError(f"layout: wanted a rank below {self.world_size}, found {rank}")
        mine = {family: next(g for g in groups if rank in g) for family, groups in _all_groups(self).items()}
        index = {family: group.index(rank) for family, group in mine.items()}
        return Place(rank, MappingProxyType(mine), MappingProxyType(index))

    @classmethod
    def from_mesh(cls, mesh: Any) -> ParallelLayout:
        """The layout that a `torch.distributed.DeviceMesh` is of. Local.

        Its dimensions are some of pp, dp, cp and tp, or of pp, moe_dp, moe_ep and moe_tp, in that order; one that is left out has
        size 1, and so has what the mesh cannot say, the other way of cutting a block.

        Raises:
            ConfigError: the mesh is of no layout; what was found and wanted is in the text.
        """
        return cls(**sizes_of(mesh))

    def to_mesh(self, device: str = "cpu", cut: str = "attention") -> Any:
        """A `torch.distributed.DeviceMesh` of all ranks. Collective over them, like every mesh: torch makes its process groups.

        Args:
            device: type of device, such as ``"cuda"``.
            cut: ``"attention"`` for the dimensions pp, dp, cp and tp, ``"moe"`` for pp, moe_dp, moe_ep and moe_tp.

        Raises:
            ConfigError: there is no such cut.
        """
        return mesh_of(self, device, cut)

    def explain(self) -> str:
        """For people: the sizes, and of each family the first groups, each with its ranks."""
        sizes = ", ".join(f"{f.name} {size}" for f in fields(self) if (size := getattr(self, f.name)) > 1)
        lines = [f"layout: {sizes or 'one rank'}"]
        width = max(map(len, self.families))
        for family, groups in _all_groups(self).items():
            shown = " ".join(map(_shown, groups[:_SHOWN]))
            more = f" and {len(groups) - _SHOWN} more" if len(groups) > _SHOWN else ""
            lines.append(f"  {family:<{width}}  {len(groups)} x {len(groups[0])}: {shown}{more}")
        return "\n".join(lines)

    def creation_order(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Every group as (family, ranks), in one order for all: a rank creates those that it is in, and none waits in vain."""
        return tuple((family, group) for family, groups in _all_groups(self).items() for group in groups)


def _shown(group: tuple[int, ...]) -> str:
    """``[0-3]``, ``[0 2 4]`` or ``[0-30:2]``: first and last of ranks at equal distances, where there are many."""
    step = group[1] - group[0] if len(group) > 1 else 1
    if len(group) > 4 and group == tuple(range(group[0], group[-1] + 1, step)):
        return f"[{group[0]}-{group[-1]}{f':{step}' if step > 1 else ''}]"
    return f"[{' '.join(map(str, group))}]"


@lru_cache(maxsize=64)
def _all_groups(layout: ParallelLayout) -> Mapping[str, Groups]:
    sizes: dict[tuple[str, ...], tuple[int, ...]] = {
        _ATTENTION: (layout.pipeline, layout.data, layout.context, layout.attention_tensor),
        _MOE: (layout.pipeline, layout.moe_data, layout.expert, layout.moe_tensor),
    }
    out: dict[str, Groups] = {}
    for family, (axes, varying) in _CUTS.items():
        groups: dict[tuple[int, ...], list[int]] = {}
        # Ranks count up with the last axis fastest, so each group is in ascending order and groups by their first rank.
        for rank, place in enumerate(product(*map(range, sizes[axes]))):
            fixed = tuple(at for axis, at in zip(axes, place, strict=True) if axis not in varying)
            groups.setdefault(fixed, []).append(rank)
        out[family] = tuple(map(tuple, groups.values()))
    return MappingProxyType(out)
