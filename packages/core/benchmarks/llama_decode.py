"""Decoding with a Llama of Hugging Face transformers on CPU, split over two ranks: commplane beside Gloo, in one run.

python packages/core/benchmarks/llama_decode.py --json docs/results/llama-decode.json

Wants transformers. Nothing is fetched: the weights are random, which takes as long as any others. Each way has its ranks started
by torchrun; one line differs, ``init_process_group(backend)``; all have the model loaded and take turns, round by round,
and those that wait are blocked on a socket. A turn is ``model.generate`` for one prompt. Over both backends it must give the same
tokens. Beside them stands the model whole in one process, with as many threads as there are ranks.

A row has tokens/s over whole turns, and by the median time of a token, which says more where other programs interrupt the ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_group import Group

__all__ = ["MODELS", "Row", "main", "rows_of", "table"]

Row = dict[str, Any]

MODELS: dict[str, dict[str, int]] = {
    "15M": {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6},
    "110M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "160M": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "1.1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}
"""Shapes that people run on CPUs, all with 32,000 tokens: stories15M and stories110M, llama-160m and TinyLlama."""

WAYS = ("whole", "gloo", "commplane")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="tokens/s of a Llama over commplane and over Gloo")
    parser.add_argument("--models", default="110M", metavar="LIST", help=f"of {', '.join(MODELS)} (default 110M)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=32, help="that a turn generates (default 32)")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt (default 16)")
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds (default 15)")
    parser.add_argument("--ranks", type=int, default=2, help="that a model is split over (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and rows as JSON")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.models.split(",") if name not in MODELS]
    if unknown:
        parser.error(f"--models: wanted some of {', '.join(MODELS)}, found {', '.join(unknown)}")
    load_before = round(os.getloadavg()[0], 2)
    rows: list[Row] = []
    machine: dict[str, Any] = {}
    for name in options.models.split(","):
        more, machine = measure(name, options)
        rows += more
    machine["command"] = shlex.join(["python", *(sys.argv if arguments is None else [sys.argv[0], *arguments])])
    machine["load_before"] = load_before
    sys.stdout.write(table(rows) + "\n")
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


def measure(name: str, options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """One model: a row for each way, and what rank 0 says of the machine."""
    groups: dict[str, Group] = {}
    try:
        for way in WAYS:
            _say(f"{name}: starting {way}")
            groups[way] = Group(way, 1 if way == "whole" else options.ranks, threads=options.ranks if way == "whole" else 1)
        shape = {"vocab_size": 32000, "max_position_embeddings": options.prompt + options.tokens + 8, **MODELS[name]}
        with tempfile.TemporaryDirectory() as folder:  # gone before minutes of turns, in which the bench may be killed
            parameters = groups["whole"].ask(do="make", folder=folder, shape=shape, dtype=options.dtype)[0]
            for group in groups.values():
                group.ask(do="load", folder=folder, dtype=options.dtype)
        turns: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for number in range(options.rounds + 1):
            tokens = {}
            for way, group in groups.items():
                answers = group.ask(do="generate", prompt=options.prompt, tokens=options.tokens)
                tokens[way] = answers[0]["tokens"]
                if number:
                    turns[way].append({by: min(answer[by] for answer in answers) for by in ("turn", "median")})
            if tokens["gloo"] != tokens["commplane"]:
                raise AssertionError(
                    f"{name}: other tokens over commplane, {tokens['commplane']}, than over gloo, {tokens['gloo']}"
                )
            _say(f"{name}: round {number} of {options.rounds}")
        machine = groups["commplane"].ask(do="describe")[0]
        common = {"model": name, "parameters": parameters, **MODELS[name], "dtype": options.dtype, "tokens": options.tokens}
        return rows_of(turns, {**common, "prompt": options.prompt, "batch": 1, "ranks": options.ranks}), machine
    finally:
        for group in groups.values():
            group.close()


def rows_of(turns: dict[str, list[dict[str, float]]], common: dict[str, Any]) -> list[Row]:
    """A row for each way: tokens/s over the rounds, and how many times Gloo's in the same round; both ways to say it. Pure."""

    def of_gloo(found: list[dict[str, float]], by: str) -> dict[str, float]:
        return _spread([f[by] / g[by] for f, g in zip(found, turns["gloo"], strict=True)])

    return [
        {
            **common,
            "way": way,
            "rounds": len(found),
            "tokens_per_s": _spread([f["turn"] for f in found]),
            "of_gloo": of_gloo(found, "turn"),
            "tokens_per_s_by_median_token": _spread([f["median"] for f in found]),
            "of_gloo_by_median_token": of_gloo(found, "median"),
        }
        for way, found in turns.items()
    ]


def _spread(values: list[float]) -> dict[str, float]:
    return {"low": round(min(values), 3), "median": round(statistics.median(values), 3), "high": round(max(values), 3)}


def table(rows: Sequence[Row]) -> str:
    """As people read it."""
    what = {
        "whole": "one process, {ranks} threads",
        "gloo": "{ranks} ranks over gloo",
        "commplane": "{ranks} ranks over commplane",
    }
    lines = [f"{'':<44}{'tokens/s (low to high)':>26}{'times gloo':>22}{'by median token':>26}{'times gloo':>22}"]
    for row in rows:
        cells = [f"{row['model'] + ' ' + row['dtype']:<18}{what[row['way']].format(**row):<26}"]
        for key, width in (
            ("tokens_per_s", 26),
            ("of_gloo", 22),
            ("tokens_per_s_by_median_token", 26),
            ("of_gloo_by_median_token", 22),
        ):
            form = "{median:.2f} ({low:.2f} to {high:.2f})" if "gloo" in key else "{median:.1f} ({low:.1f} to {high:.1f})"
            cells.append(f"{form.format(**row[key]):>{width}}")
        lines.append("".join(cells))
    return "\n".join(lines)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
