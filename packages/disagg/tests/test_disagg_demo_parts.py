"""What the demo is made of: it sees a difference, and its layout is that of the model."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec
import pytest

torch = pytest.importorskip("torch", reason="wants torch: pip install torch")

from commplane.demo import PagedKV  # noqa: E402
from commplane.errors import ConfigError  # noqa: E402
from commplane_disagg.cli.demo import add_arguments, run  # noqa: E402
from commplane_disagg.demo.job import Arrived, Options, Outcome, Sent, node_of  # noqa: E402
from commplane_disagg.demo.parts import CONFIG, layout  # noqa: E402
from commplane_disagg.demo.reference import expected  # noqa: E402
from commplane_disagg.demo.report import differences, table  # noqa: E402
from commplane_disagg.ends.layout import copies  # noqa: E402

pytestmark = pytest.mark.timeout(60)

PROMPTS = ("a prompt of more than one page", "b")


def good() -> tuple[list[Outcome], list[Outcome], list[dict[int, Arrived]]]:
    """Two prefill ranks, two decode ranks, and what one process has."""
    right = expected([list(text.encode()) for text in PROMPTS], 3, 2)
    sent = {room: Sent(token=arrived.tokens[0], computing=0.001, moving=0.002) for room, arrived in right[0].items()}
    return [Outcome(sent=sent)] * 2, [Outcome(arrived=rooms) for rooms in right], right


def test_what_equals_one_process_differs_in_nothing_and_the_table_says_so() -> None:
    prefill, decode, right = good()
    assert differences(prefill, decode, right) == {}
    lines = table(Options(prompts=PROMPTS, tokens=3), prefill, decode, {})
    assert len(lines) == 3 and all(line.endswith("the same") for line in lines[1:])
    assert f"{2 * CONFIG.layout().page_bytes:,}" in lines[1]
    assert right[0][0].pages != right[1][0].pages  # each rank has heads of its own


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": (65, 66, 67)}, "other tokens"),
        ({"pages": (1,)}, "other pages"),
    ],
)
def test_one_rank_with_another_token_or_page_is_a_difference(change: dict[str, tuple[int, ...]], said: str) -> None:
    prefill, decode, right = good()
    spoilt = {**decode[1].arrived, 0: msgspec.structs.replace(decode[1].arrived[0], **change)}
    decode[1] = msgspec.structs.replace(decode[1], arrived=spoilt)
    assert differences(prefill, decode, right) == {0: said}


def test_another_first_token_on_prefill_is_a_difference() -> None:
    prefill, decode, right = good()
    sent = {**prefill[1].sent, 1: msgspec.structs.replace(prefill[1].sent[1], token=0)}
    prefill[1] = msgspec.structs.replace(prefill[1], sent=sent)
    assert differences(prefill, decode, right) == {1: "another first token on prefill"}


@pytest.mark.parametrize(("prefill", "decode"), [(2, 1), (1, 2), (4, 2), (2, 2)])
def test_the_layout_of_the_ends_brings_each_head_of_the_model_to_its_place(prefill: int, decode: int) -> None:
    size, heads = 3, CONFIG.kv_heads
    whole = torch.randn(size, *CONFIG.layout().shape)
    pools = []
    for rank in range(decode):
        target = PagedKV(CONFIG.layout(decode), bytearray(size * CONFIG.layout(decode).page_bytes))
        for sender in range(prefill):
            part = whole[:, :, sender * heads // prefill : (sender + 1) * heads // prefill].contiguous()
            source = PagedKV(CONFIG.layout(prefill), part)
            mine, theirs = layout(sender, prefill, size), layout(rank, decode, size)
            shared = max(mine.heads[0], theirs.heads[0]), min(mine.heads[1], theirs.heads[1])
            if shared[0] >= shared[1]:
                continue
            pairs = [(0, 2), (1, 0), (2, 1)]
            for here, there, count in zip(*copies(mine, theirs, (0, CONFIG.layers), shared, pairs), strict=True):
                target.bytes.view(-1)[there : there + count] = source.bytes.view(-1)[here : here + count]
        pools.append(target.values)
    assert torch.equal(torch.cat(pools, dim=2)[[2, 0, 1]], whole)


def test_ranks_are_dealt_over_the_two_prefill_nodes_and_decode_is_on_the_third() -> None:
    assert [[node_of("prefill", r, size) for r in range(size)] for size in (1, 2, 4)] == [[0], [0, 1], [0, 0, 1, 1]]
    assert [node_of("decode", r, 2) for r in range(2)] == [2, 2]


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for options in ({"prompts": ()}, {"prompts": ("",)}, {"prompts": ("a",), "tokens": 0}, {"prompts": ("a",), "fault": "flood"}):
        with pytest.raises(ConfigError, match=r"wants|wanted"):
            Options(**options)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    blank = tmp_path / "blank"
    blank.write_text(" \n\n")
    for words, text in (
        (("--prompts", str(tmp_path / "none")), "cannot be read"),
        (("--prompts", str(blank)), "wanted one a line"),
        (("--mbit", "10"), "wants network namespaces"),
        (("--fault", "cut"), "wants network namespaces"),
        (("--fault", "kill-decode", "--prefill-tp", "1"), "two prefill ranks"),
    ):
        with pytest.raises(ConfigError, match=text):
            run(parser.parse_args(["--network", "loopback", *words]))
