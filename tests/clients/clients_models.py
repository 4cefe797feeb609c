"""Models of transformers with random weights, small, and what is asked of each: the same for one process and for many.

Run on the ranks of a torchrun job. Nothing is fetched: a model is made from a configuration, saved, and loaded from that folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

__all__ = ["ARCHITECTURES", "Answers", "ask", "compiled", "load", "save", "trained"]

Answers = dict[str, torch.Tensor]

_COMMON: dict[str, Any] = {
    "vocab_size": 130,  # so that half of it is no power of two
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # logits as far apart as those of a trained model, so that greedy tokens are no matter of rounding
    "bos_token_id": 1,
    "eos_token_id": 129,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"intermediate_size": 96, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {"intermediate_size": 112, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"intermediate_size": 96}),
    "mixtral": ("Mixtral", {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {"intermediate_size": 96, "num_experts": 4, **_EXPERTS}),
}
"""The prefix of transformers' classes and what a configuration has beside the common values. Each has a plan for tensor
parallelism of its own: the experts of the last two are cut as well."""


def save(architecture: str, folder: Path) -> None:
    """Make the model and write it, as float32. Local."""
    prefix, options = ARCHITECTURES[architecture]
    torch.manual_seed(9)
    config = getattr(transformers, f"{prefix}Config")(**{**_COMMON, **options})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # made as zeros, which would hide one that is added twice
                parameter.normal_()
    model.save_pretrained(folder)


def load(folder: Path, *, split: bool, dtype: torch.dtype = torch.float32) -> Any:
    """The model, whole, or this rank's part of it by transformers' own plan. Collective over the default group if `split`."""
    how = {"distributed_config": DistributedConfig(tp_plan="auto")} if split else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how)  # in eval mode


def _ids(batch: int, length: int) -> torch.Tensor:
    """Tokens, other ones in each row."""
    return (torch.arange(batch * length) * 7 % 120 + 2).view(batch, length)


def _layouts(model: Any) -> dict[str, torch.Tensor]:
    """Embeddings of 3 x 5 tokens in memory that is not laid out row by row, or that rows share: what a layer sums has it too.

    None for a model of experts: those of transformers refuse them, with one process too.
    """
    if hasattr(model.config, "num_experts_per_tok"):
        return {}
    rows = torch.randn(3, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(4)).to(model.dtype)
    return {
        "transposed": rows.transpose(0, 1).contiguous().transpose(0, 1),
        "hidden first": rows.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "every other": torch.stack([rows, rows + 1], -1)[..., 0],
        "one row for all": rows[:1].expand(3, 5, -1),
        "one token for all": rows[:, :1].expand(3, 5, -1),
    }


def ask(model: Any) -> Answers:
    """Logits of prompts, of decoding with a cache, and generated tokens. Collective where the model is split."""
    answers: Answers = {}
    with torch.inference_mode():
        for batch, length in ((1, 1), (1, 7), (2, 6), (3, 33)):
            answers[f"prompt {batch} x {length}"] = model(_ids(batch, length)).logits
        answers["last of 2 x 6"] = model(_ids(2, 6), logits_to_keep=1).logits
        out = model(_ids(2, 6), use_cache=True)
        for step in range(3):
            out = model(_ids(2, 9)[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
            answers[f"decoded {step}"] = out.logits
        out = model(_ids(2, 9)[:, 3:], past_key_values=out.past_key_values)  # several at once behind a cache
        answers["more behind a cache"] = out.logits
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
        answers["padded"] = model(_ids(2, 6), attention_mask=mask).logits
        generated = model.generate(
            _ids(2, 6), attention_mask=mask, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        answers["tokens"] = generated.sequences
        answers["logits of tokens"] = torch.stack(generated.logits)
    with torch.no_grad():
        for name, embeddings in _layouts(model).items():
            answers[f"embeddings {name}"] = model(inputs_embeds=embeddings).logits
    return {name: answer.clone() for name, answer in answers.items()}


def trained(model: Any) -> Answers:
    """The loss and the gradients of one step, whole ones. Collective where the model is split."""
    model.train()
    loss = model(_ids(2, 6), labels=_ids(2, 6)).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    whole: Callable[[Any], torch.Tensor] = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g  # noqa: E731
    return {"loss": loss.detach(), **{f"gradient of {name}": whole(g).detach().clone() for name, g in grads.items()}}


def compiled(model: Any) -> Answers:
    """Logits of the model after torch.compile. Collective where the model is split."""
    torch._dynamo.reset()  # else torch stops to compile after eight versions of a function, which these models share
    model.forward = torch.compile(model.forward)
    with torch.no_grad():
        return {f"prompt {b} x {n}": model(_ids(b, n)).logits.clone() for b, n in ((1, 7), (2, 6))}
