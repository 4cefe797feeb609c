"""From a text file to embeddings: reading, tokenising and batching. Knows nothing of ranks.

Batches depend on the sentences and `batch_size` alone, so ranks that are given the same make the
same calls in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

Embed = Callable[[Tensor, Tensor], Tensor]  # (ids, mask) -> embeddings, as model.Encoder is called
Progress = Callable[[int, int], object]  # (sentences done, sentences in all)


class TextError(ValueError):
    """The text file cannot be used; the message is for the person who named it."""


def read_sentences(path: str | Path) -> list[str]:
    """The sentences of a UTF-8 text file: one a line, blank lines skipped."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise TextError(
            f"cannot read {path}: wanted a text file with one sentence a line, "
            f"found: {(error.strerror or str(error)).lower()}; check the path"
        ) from error
    try:
        text = data.decode("utf-8-sig")  # some editors start a UTF-8 file with a byte-order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TextError(
            f"cannot read {path}: wanted UTF-8 text, found byte 0x{data[error.start]:02x} on line {line}; save it as UTF-8"
        ) from error
    sentences = [line.strip() for line in text.split("\n") if line.strip()]
    if not sentences:
        raise TextError(f"cannot use {path}: wanted one sentence a line, found no text; add some lines")
    return sentences


def max_length(model_dir: str | Path) -> int:
    """The most tokens of a sentence that the model reads; the rest is cut off."""
    folder = Path(model_dir)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    length = int(config["max_position_embeddings"])
    # Sentence encoders are trained on shorter text than their positions allow, and say so here.
    sentence_config = folder / "sentence_bert_config.json"
    if sentence_config.is_file():
        trained = json.loads(sentence_config.read_text(encoding="utf-8"))
        length = min(length, int(trained["max_seq_length"]))
    return length


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """The model's tokenizer, cutting at `max_length` and leaving the padding to the batches."""
    tokenizer = Tokenizer.from_file(str(Path(model_dir) / "tokenizer.json"))
    tokenizer.enable_truncation(max_length(model_dir))
    tokenizer.no_padding()  # tokenizer.json pads every sentence to 128 tokens
    return tokenizer


def batches(encodings: Sequence[Encoding], batch_size: int) -> Iterator[list[int]]:
    """Indices of the sentences, longest first, `batch_size` at a time.

    Sorted, so that a batch holds sentences of like length and little padding; longest first, so
    that the largest message comes first and a run that does not fit fails at once.
    """
    order = sorted(range(len(encodings)), key=lambda index: len(encodings[index]), reverse=True)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad(encodings: Sequence[Encoding]) -> tuple[Tensor, Tensor]:
    """Ids and mask [batch, length] of one batch, padded to its longest sentence."""
    length = max(len(encoding) for encoding in encodings)
    ids = torch.zeros(len(encodings), length, dtype=torch.long)  # 0 is [PAD]; the mask hides it
    mask = torch.zeros(len(encodings), length, dtype=torch.bool)
    for row, encoding in enumerate(encodings):
        ids[row, : len(encoding)] = torch.tensor(encoding.ids)
        mask[row, : len(encoding)] = True
    return ids, mask


def encode(
    encoder: Embed,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Tensor:
    """Float32 embeddings [sentences, hidden] on the CPU, in the order of `sentences`.

    Collective where the encoder is. `progress` is called after each batch.
    """
    if not sentences:
        raise ValueError("nothing to encode: wanted at least one sentence, found none")
    if batch_size < 1:
        raise ValueError(f"bad batch_size: wanted at least 1, found {batch_size}")
    encodings = tokenizer.encode_batch(list(sentences))
    order: list[int] = []
    parts: list[Tensor] = []
    for batch in batches(encodings, batch_size):
        parts.append(encoder(*pad([encodings[index] for index in batch])).cpu())
        order += batch
        if progress is not None:
            progress(len(order), len(sentences))
    sorted_rows = torch.cat(parts)
    rows = torch.empty_like(sorted_rows)
    rows[order] = sorted_rows
    return rows
