"""The demo model: the same bits however its work is cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import commplane.demo as demo
from commplane.demo import ModelConfig, PagedKV, PageLayout, Shard, Transformer, exact
from commplane.errors import ConfigError
from commplane.runtime import Plane
from commplane.testing import run_threads

pytestmark = pytest.mark.timeout(60)

SMALL = ModelConfig(layers=2, hidden=64, inner=96, heads=8, kv_heads=4, head_dim=16, page_tokens=4, max_tokens=256)
PROMPT = demo.encode_text("pages travel, and the tokens that follow them are the same wherever they arrive")
NEW = 9


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads make products this small slower, not faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pool(model: Transformer, tokens: int, fill: int = 0) -> tuple[PagedKV, list[int]]:
    """A pool of just enough pages, and the pages backwards, so that their order is not that of memory."""
    pages = model.config.pages(tokens, model.shard)
    layout = model.config.layout(model.shard.tp_size)
    return PagedKV(layout, bytearray([fill]) * ((pages or 1) * layout.page_bytes)), list(reversed(range(pages)))


def reference(config: ModelConfig = SMALL) -> tuple[list[int], torch.Tensor]:
    """What one process answers in one go, and its pages in the order of their tokens."""
    model = Transformer(config, chunk=1000)
    cache, pages = pool(model, len(PROMPT) + NEW - 1)
    return model.generate(PROMPT, NEW, cache, pages), cache.copy(pages)


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
def test_a_prefill_in_pieces_gives_the_same_tokens_and_the_same_pages(chunk: int) -> None:
    model = Transformer(SMALL, chunk=chunk)
    cache, pages = pool(model, len(PROMPT) + NEW - 1)
    tokens, bits = reference()
    assert model.generate(PROMPT, NEW, cache, pages) == tokens
    assert torch.equal(cache.copy(pages), bits)


@pytest.mark.parametrize("cached", [1, 5, 18])
def test_a_prefill_from_cached_pages_computes_the_rest_only_and_gives_the_same(cached: int) -> None:
    tokens, bits = reference()
    model = Transformer(SMALL)
    cache, pages = pool(model, len(PROMPT) + NEW - 1)
    cache.bytes[pages[:cached]] = bits[:cached]
    start = cached * SMALL.page_tokens
    assert model.generate(PROMPT, NEW, cache, pages, start) == tokens
    assert torch.equal(cache.copy(pages), bits)
    assert model.computed == len(PROMPT) - start + NEW - 1


def test_pages_that_were_written_by_decode_serve_a_later_prefill() -> None:
    tokens, bits = reference()
    model = Transformer(SMALL)
    cache, pages = pool(model, len(PROMPT) + NEW - 1)
    longer = PROMPT + tokens[:-1]
    assert model.prefill(longer, cache, pages) == tokens[-1]
    assert torch.equal(cache.copy(pages), bits)


def test_what_lies_behind_the_last_token_does_not_matter() -> None:
    tokens, _ = reference()
    model = Transformer(SMALL)
    cache, pages = pool(model, len(PROMPT) + NEW - 1, fill=0xFF)  # as float32: not a number
    assert cache.values.isnan().all()
    assert model.generate(PROMPT, NEW, cache, pages) == tokens


def test_a_wrong_page_changes_the_answer() -> None:
    # On its default sizes: the smaller the model, the fewer things change an answer.
    config = ModelConfig()
    model, prompt, size = Transformer(config), PROMPT * 2, config.page_tokens
    cache, pages = pool(model, len(prompt) + 15)
    tokens = model.generate(prompt, 16, cache, pages)
    bits, last = cache.bytes.clone(), (len(prompt) - 1) // size

    def answer() -> list[int]:
        out = model.generate(prompt, 16, cache, pages, len(prompt) - 1)
        cache.bytes.copy_(bits)
        return out

    assert answer() == tokens
    for page in (
        pages[0],
        pages[4],
        pages[last - 1],
    ):  # another one in its place; two that are exchanged are the same set of keys and values
        cache.bytes[page] = bits[pages[last - 1] if page != pages[last - 1] else pages[0]]
        assert answer() != tokens
    for layer in range(config.layers):  # one layer of one page never arrived
        cache.values[pages[1], layer] = 0
        assert answer() != tokens
    cache.values[:, 1] = cache.values[:, 1].flip(1)  # the heads of a layer are exchanged
    assert answer() != tokens


def split(bits: torch.Tensor, shard: Shard) -> torch.Tensor:
    """The part of the whole model's pages that the rank of `shard` should hold, as bytes."""
    values = bits.view(torch.float32).view(len(bits), *SMALL.layout().shape)
    heads = SMALL.kv_heads // shard.tp_size
    own = values[shard.cp_rank :: shard.cp_size, :, shard.tp_rank * heads : (shard.tp_rank + 1) * heads].contiguous()
    return own.flatten(1).view(torch.uint8)


@pytest.mark.parametrize(("tp_size", "cp_size"), [(2, 1), (1, 2), (4, 1), (1, 3), (2, 2)])
def test_tp_times_cp_ranks_give_the_tokens_and_the_pages_of_one_process(tp_size: int, cp_size: int) -> None:
    tokens, bits = reference()

    def rank_main(plane: Plane) -> bool:
        shard = Shard(plane.rank % tp_size, tp_size, plane.rank // tp_size, cp_size)
        tps = [[c * tp_size + t for t in range(tp_size)] for c in range(cp_size)]
        cps = [[c * tp_size + t for c in range(cp_size)] for t in range(tp_size)]
        groups = {n: plane.communicator(n, r) for n, sets in (("tp", tps), ("cp", cps)) for r in sets if plane.rank in r}
        model = Transformer(SMALL, shard, tp_sum=groups["tp"].all_reduce_, cp_sum=groups["cp"].all_reduce_)
        for name, size in zip(("tp", "cp"), model.message_bytes(), strict=True):
            groups[name].prepare("all_reduce", dtype=torch.float64, max_bytes=size)
        cache, pages = pool(model, len(PROMPT) + NEW - 1)
        same = model.generate(PROMPT, NEW, cache, pages) == tokens
        return same and torch.equal(cache.copy(pages), split(bits, shard))

    outcome: list[Any] = run_threads(tp_size * cp_size, rank_main, config=lambda _rank: {"timeout": 30})
    assert outcome == [True] * (tp_size * cp_size)


def test_a_rank_that_holds_no_page_yet_takes_part() -> None:
    sums: list[torch.Tensor] = []

    def cp_sum(mine: torch.Tensor) -> None:
        sums.append(mine.clone())
        mine.fill_(1.0)

    model = Transformer(SMALL, Shard(0, 1, 1, 2), cp_sum=cp_sum)
    cache, pages = pool(model, 3)
    assert pages == []
    model.prefill(PROMPT[:3], cache, pages)
    assert len(sums) == SMALL.layers and not any(part.any() for part in sums)


def test_more_bits_than_a_float64_has_are_never_needed() -> None:
    # The largest sums that the bounds in commplane.demo.exact allow, in two orders and as whole numbers.
    for grid, magnitude, terms in ((24, 15.3, 1024), (24, 13.0, 32768), (24, 8.0, 4096), (20, 7.0, 128)):
        generator = torch.Generator().manual_seed(terms)
        top = int(2 ** (magnitude + grid - 10))
        whole = torch.randint(-top, top, (terms,), generator=generator)
        assert abs(int(whole.abs().sum())) < 2**53
        values = whole.double() * 2.0**-grid
        assert values.sum() == values.flip(0).cumsum(0)[-1] == int(whole.sum()) * 2.0**-grid


@pytest.mark.parametrize(("function", "bits", "limit"), [(exact.attention_weights, 8, exact.SCORE_LIMIT), (exact.silu, 8, 16.0)])
def test_a_function_gives_each_of_its_inputs_the_same_bits_in_a_vector_and_alone(function: Any, bits: int, limit: float) -> None:
    top = round(limit * 2**bits)
    inputs = torch.arange(-top, top + 1, dtype=torch.float64) * 2.0**-bits
    together = function(inputs.clone())
    alone = torch.cat([function(x.reshape(1).clone()) for x in inputs])
    assert torch.equal(together, alone)
    assert torch.equal(together[5:], function(inputs[5:].clone()))  # other lanes of a vector


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    out = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out.append(reference(ModelConfig(layers=2)))
    assert out[0][0] == out[1][0] and torch.equal(out[0][1], out[1][1])


def test_runs_of_layers_and_heads_are_where_the_values_are() -> None:
    layout = PageLayout(layers=3, kv_heads=4, page_tokens=2, head_dim=6)
    cache = PagedKV(layout, torch.zeros(2 * layout.page_bytes, dtype=torch.uint8))
    cache.values[1, 1:3, 2:4] = 1.0
    marked = torch.zeros(layout.page_bytes, dtype=torch.uint8)
    for offset, size in layout.spans((1, 3), (2, 4)):
        marked[offset : offset + size] = 1
    assert torch.equal(cache.bytes[1].view(torch.float32) == 1.0, marked.view(-1, 4)[:, 0] == 1)
    assert not cache.bytes[0].any()
    assert layout.spans() == [(0, layout.page_bytes)]
    assert layout.spans((1, 2)) == [(layout.layer_bytes, layout.layer_bytes)]
    assert len(layout.spans(heads=(0, 1))) == len(list(layout.pieces())) == 3


def test_pieces_of_two_layouts_fit_each_other() -> None:
    whole, half = SMALL.layout(1), SMALL.layout(2)
    assert [s for _, s in whole.pieces(heads=(2, 4))] == [s for _, s in half.pieces()]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Shard(2, 2), "tp_rank must lie in 0..1"),
        (lambda: SMALL.check(3), "3 tp ranks must divide 4 kv heads"),
        (lambda: ModelConfig(heads=6), "heads must be a multiple of kv_heads"),
        (lambda: ModelConfig(max_tokens=10**6), "max_tokens must lie in 1..32768"),
        (lambda: Transformer(SMALL, Shard(0, 2)), "pass tp_sum and cp_sum"),
        (lambda: PagedKV(SMALL.layout(), bytearray(8)), "wanted room for a page"),
        (lambda: SMALL.layout().spans((0, 3)), "must lie in 2 layers"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_numbers(call: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        call()


def test_too_few_pages_and_a_start_behind_the_end_are_refused() -> None:
    model = Transformer(SMALL)
    cache, pages = pool(model, 8)
    with pytest.raises(ConfigError, match="9 tokens need 3 pages"):
        model.prefill(PROMPT[:9], cache, pages)
    with pytest.raises(ConfigError, match=r"start must lie in 0\.\.7"):
        model.prefill(PROMPT[:8], cache, pages, 8)
    other = PagedKV(ModelConfig().layout(), bytearray(ModelConfig().layout().page_bytes * 2))
    with pytest.raises(ConfigError, match="pages must be laid out as"):
        model.prefill(PROMPT[:8], other, pages)
    assert model.computed == 0


def test_text_is_bytes_and_answers_can_be_printed() -> None:
    assert demo.decode_text(demo.encode_text("día")) == "día"
    (answer,) = demo.alone(SMALL, [demo.encode_text("día")], 20)
    assert len(answer) == 20 and demo.decode_text(answer).isprintable()
