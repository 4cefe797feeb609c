"""Embed a text file with MiniLM, tensor-parallel over the ranks: what one rank does.

    commplane run --ranks 2 examples/embed/embed.py --text sentences.txt --out out/

Which backend carries the all-reduces is not decided here: install another wheel, or set COMMPLANE_BACKENDS.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from model import Encoder, find_model
from text import encode, load_tokenizer, max_length, read_sentences

import commplane

# Throughput is measured on this many sentences at most, this many times.
TIMED_SENTENCES, TIMED_PASSES = 200, 5


def main() -> None:
    """Embed, measure, and let rank 0 write ``embeddings.pt`` and ``run.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="one sentence a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--batch", type=int, default=8, help="sentences in a batch (default 8)")
    options = parser.parse_args()
    torch.set_num_threads(1)

    sentences, model_dir = read_sentences(options.text), find_model()
    tokenizer = load_tokenizer(model_dir)
    with commplane.init() as plane:
        tp = plane.communicator("tp")
        encoder = Encoder(model_dir, tp)
        # Nothing grows later: the largest all-reduce is a batch of the longest sentences that the model takes.
        largest = encoder.message_bytes(options.batch, max_length(model_dir))
        tp.prepare("all_reduce", dtype=torch.float32, max_bytes=largest)
        if tp.rank == 0:
            print(tp.plan, flush=True)

        def progress(done: int, total: int) -> None:
            if tp.rank == 0 and (done == total or sys.stderr.isatty()):
                print(f"\r  embedding {done}/{total}", end="" if done < total else "\n", file=sys.stderr, flush=True)

        embeddings = encode(encoder, tokenizer, sentences, options.batch, progress)
        seconds = []
        for _ in range(TIMED_PASSES):
            tp.barrier()
            start = time.perf_counter()
            encode(encoder, tokenizer, sentences[:TIMED_SENTENCES], options.batch)
            seconds.append(time.perf_counter() - start)
        if tp.rank == 0:
            torch.save(embeddings, options.out / "embeddings.pt")
            run = {
                "backend": tp.plan.explain("all_reduce", nbytes=largest, dtype=torch.float32).chosen,
                "ranks": tp.world_size,
                "sentences_per_second": len(sentences[:TIMED_SENTENCES]) / statistics.median(seconds),
            }
            (options.out / "run.json").write_text(json.dumps(run))


if __name__ == "__main__":
    main()
