"""The main job on real input: a tensor-parallel encoder whose communication backend is swapped by configuration only.

Runs ``embed.py`` on the ranks once a backend, with nothing changed but COMMPLANE_BACKENDS, checks the embeddings against one
process, searches in them, and ends with ``commplane bench``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from model import Encoder, find_model
from text import TextError, encode, load_tokenizer, read_sentences

HERE = Path(__file__).parent
TOLERANCE = 1e-5
QUERY = "Which planet has rings around it?"


def main() -> int:
    """The whole demo; exit code 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=HERE / "sample.txt", help="one sentence a line")
    parser.add_argument("--query", default=QUERY, help="what to search the text for")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="sentences in a batch (default 8)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for embeddings, bench.json and bench.png")
    options = parser.parse_args()
    try:
        sentences = read_sentences(options.text)
    except TextError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)

    step("what is installed, and what a group of these ranks agrees on")
    commplane("doctor", f"--ranks={options.ranks}")

    step(f"one process, as the reference: {len(sentences)} sentences of {options.text}")
    torch.set_num_threads(1)
    model_dir = find_model()
    tokenizer, plain = load_tokenizer(model_dir), Encoder(model_dir)
    start = time.perf_counter()
    reference = encode(plain, tokenizer, sentences, options.batch, progress)
    print(f"  {len(sentences) / (time.perf_counter() - start):.0f} sentences/s")

    speeds: dict[str, float] = {}
    wrong = False
    for backend in ("torch", "custom_ar"):
        step(f"the same model over {options.ranks} ranks, COMMPLANE_BACKENDS={backend}")
        run, embeddings = embed(options, backend)
        distance = (embeddings - reference).abs().max().item()
        wrong = wrong or distance >= TOLERANCE or run["backend"] != backend
        speeds[backend] = run["sentences_per_second"]
        print(f"  ran on {run['backend']}: max abs error against one process {distance:.2e} (limit {TOLERANCE:.0e})")
        print(f"  {speeds[backend]:.0f} sentences/s")
    print(f"\n  custom_ar against torch: {speeds['custom_ar'] / speeds['torch']:.2f} times the sentences/s")

    step(f"the nearest sentences to: {options.query}")
    similarity = embeddings @ encode(plain, tokenizer, [options.query])[0]
    for score, i in zip(*similarity.topk(min(5, len(sentences))), strict=True):
        print(f"  {score.item():.3f}  {sentences[int(i)]}")

    step("latency of each backend, taking turns in one run")
    bench, picture = options.out / "bench.json", options.out / "bench.png"
    commplane("bench", f"--ranks={options.ranks}", f"--json={bench}", f"--plot={picture}")
    print(f"\nwrote {bench} and {picture}")
    if wrong:
        print("demo: a result is wrong, see above", file=sys.stderr)
    return int(wrong)


def step(title: str) -> None:
    """A heading."""
    print(f"\n== {title}", flush=True)


def progress(done: int, total: int) -> None:
    """One line that counts; in a log, only its end."""
    if done == total or sys.stderr.isatty():
        print(f"\r  embedding {done}/{total}", end="" if done < total else "\n", file=sys.stderr, flush=True)


def embed(options: argparse.Namespace, backend: str) -> tuple[dict[str, Any], torch.Tensor]:
    """Run ``embed.py`` on the ranks with `backend`; what it wrote."""
    out = options.out / backend
    out.mkdir(exist_ok=True)
    arguments = ["--text", str(options.text), "--out", str(out), "--batch", str(options.batch)]
    commplane("run", f"--ranks={options.ranks}", str(HERE / "embed.py"), *arguments, backends=backend)
    return json.loads((out / "run.json").read_text()), torch.load(out / "embeddings.pt")


def commplane(*arguments: str, backends: str = "") -> None:
    """The command, in this Python; ends the demo if it fails."""
    environment = {**os.environ, "COMMPLANE_BACKENDS": backends}
    code = subprocess.run([sys.executable, "-m", "commplane", *arguments], env=environment, check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
