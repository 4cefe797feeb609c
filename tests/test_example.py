"""The example's model, sharded over real ranks, gives what one process gives, on every backend."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT

import commplane
from commplane.testing import run_processes

EXAMPLE = ROOT / "examples" / "embed"
sys.path.insert(0, str(EXAMPLE))

from model import Encoder, find_model  # noqa: E402
from text import TextError, encode, load_tokenizer, read_sentences  # noqa: E402

SENTENCES = [
    "The train to the coast leaves at noon.",
    "At twelve there is a train to the sea.",
    "Add the salt last, or the beans stay hard.",
    "a",
    "One word more or less changes the length of the batch, and so the size of every all-reduce that it makes.",
]


def embed(tp: Any) -> torch.Tensor:
    torch.set_num_threads(1)
    folder = find_model()
    return encode(Encoder(folder, tp), load_tokenizer(folder), SENTENCES, batch_size=2)


def rank_main(store: Any, rank: int, world_size: int, backend: str) -> dict[str, Any]:
    config = {"backends": backend}
    with commplane.init(store=store, rank=rank, world_size=world_size, config=config) as plane:
        tp = plane.communicator("tp")
        return {"backend": tp.plan.explain().chosen, "embeddings": embed(tp).tolist()}


@pytest.mark.parametrize(("backend", "world_size"), [("torch", 2), ("custom_ar", 2), ("custom_ar", 3)])
def test_sharded_embeddings_equal_those_of_one_process(backend: str, world_size: int) -> None:
    outcomes = run_processes(world_size, rank_main, backend, timeout=120)
    wanted = embed(None)
    for o in outcomes:
        assert o.error is None, o.output
        assert o.result["backend"] == backend
        assert (torch.tensor(o.result["embeddings"]) - wanted).abs().max().item() < 1e-5
    if backend == "custom_ar":
        assert all(o.result == outcomes[0].result for o in outcomes), "bits differ between ranks"


def test_sentences_of_one_meaning_are_near_each_other() -> None:
    similarity = embed(None) @ embed(None).T
    assert similarity[0, 1] > 0.5 > 0.3 > similarity[0, 2]


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "found no text"), (b"\xff\xfe\x00", "wanted UTF-8 text"), (None, "cannot read")]
)
def test_a_text_that_cannot_be_used_is_refused_in_plain_words(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TextError, match=words):
        read_sentences(path)
