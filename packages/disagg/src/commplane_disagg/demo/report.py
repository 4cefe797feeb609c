"""What came of the demo, for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from commplane.demo import decode_text
from commplane_disagg.demo.job import Arrived, Options, Outcome
from commplane_disagg.demo.parts import CONFIG

__all__ = ["differences", "table"]

_TEXT = 28


def differences(
    prefill: Sequence[Outcome], decode: Sequence[Outcome], expected: Sequence[Mapping[int, Arrived]]
) -> dict[int, str]:
    """By room, in what it differs from one process; empty if in nothing."""
    found: dict[int, str] = {}
    for room, right in expected[0].items():
        if any(rank.arrived[room].tokens != right.tokens for rank in decode):
            found[room] = "other tokens"
        elif any(rank.arrived[room].pages != want[room].pages for rank, want in zip(decode, expected, strict=True)):
            found[room] = "other pages"
        elif any(rank.sent[room].token != right.tokens[0] for rank in prefill):
            found[room] = "another first token on prefill"
    return found


def table(options: Options, prefill: Sequence[Outcome], decode: Sequence[Outcome], wrong: Mapping[int, str]) -> list[str]:
    """A line for each room, under a line of headings."""
    head = ("room", "prompt", "tokens", "pages", "bytes", "prefill ms", "moved ms", "answer", "against one process")
    rows = [head]
    for room, prompt in enumerate(options.prompts):
        size = len(prompt.encode())
        pages, sent = CONFIG.pages(size), [rank.sent[room] for rank in prefill]
        rows.append(
            (
                str(room),
                _short(prompt),
                str(size),
                str(pages),
                f"{pages * CONFIG.layout().page_bytes:,}",
                f"{1e3 * max(s.computing for s in sent):.1f}",
                f"{1e3 * max(s.moving for s in sent):.1f}",
                _short(decode_text(decode[0].arrived[room].tokens)),
                wrong.get(room, "the same"),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    right = {0, 2, 3, 4, 5, 6}
    return [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _TEXT else f"{line[: _TEXT - 3]}..."
