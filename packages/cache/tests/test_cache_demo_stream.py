"""The stream of conversations that the demo serves."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from commplane.errors import ConfigError
from commplane_cache.demo.stream import Conversations, Shape, arrivals, scripts
from commplane_cache.demo.text import read_sentences

SHAPE = Shape(conversations=12, turns=3, open=4, seed=5)


def test_equal_seeds_give_equal_streams_and_other_seeds_others():
    assert scripts(SHAPE) == scripts(SHAPE) and arrivals(SHAPE) == arrivals(SHAPE)
    other = replace(SHAPE, seed=6)
    assert scripts(SHAPE) != scripts(other) and arrivals(SHAPE) != arrivals(other)


def test_every_turn_arrives_once_after_the_turn_before_it_and_conversations_mix():
    turns = arrivals(SHAPE)
    assert len(turns) == len(set(turns)) == 36
    for conversation in range(12):
        assert [t.number for t in turns if t.conversation == conversation] == [0, 1, 2]
    assert any(a.conversation != b.conversation for a, b in itertools.pairwise(turns))
    for i in range(len(turns)):
        going = {t.conversation for t in turns[:i]} & {t.conversation for t in turns[i:]}
        assert len(going) <= 4


def test_conversations_share_beginnings():
    beginnings = [s.beginning for s in scripts(SHAPE)]
    assert len(set(beginnings)) < len(beginnings)
    assert len({b[:100] for b in beginnings}) <= 3


def test_a_prompt_begins_with_all_that_was_said_before_answers_included():
    talk = Conversations(SHAPE)
    first, second = [t for t in arrivals(SHAPE) if t.conversation == 0][:2]
    assert talk.ready(first) and not talk.ready(second)
    before = talk.prompt(first)
    talk.answer(first, [1, 2, 3])
    assert talk.ready(second) and not talk.ready(first)
    assert talk.prompt(second)[: len(before) + 3] == [*before, 1, 2, 3]


def test_a_text_that_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_sentences(tmp_path / "none.txt")
    short = tmp_path / "short.txt"
    short.write_text("one\n\ntwo\n")
    with pytest.raises(ConfigError, match=r"wanted at least 4 sentences.*found 2"):
        read_sentences(short)
    short.write_text("one\ntwo\nthree\nfour\n")
    assert read_sentences(short) == ("one", "two", "three", "four")
