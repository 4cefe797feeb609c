"""The whole model in one process, and text as tokens."""

from __future__ import annotations

from collections.abc import Sequence

from commplane.demo.config import ModelConfig
from commplane.demo.pages import PagedKV
from commplane.demo.transformer import Transformer

__all__ = ["alone", "decode_text", "encode_text"]


def alone(config: ModelConfig, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """`count` new tokens for each prompt, by one process that holds the whole model and caches nothing: the reference."""
    model, layout, answers = Transformer(config), config.layout(), []
    for prompt in prompts:
        pages = range(config.pages(len(prompt) + count - 1))
        cache = PagedKV(layout, bytearray(len(pages) * layout.page_bytes))
        answers.append(model.generate(prompt, count, cache, pages))
    return answers


def encode_text(text: str) -> list[int]:
    """Text as tokens: its bytes in UTF-8."""
    return list(text.encode())


def decode_text(tokens: Sequence[int]) -> str:
    """Tokens as text; a byte that is no character is shown as such."""
    return bytes(tokens).decode(errors="backslashreplace")
