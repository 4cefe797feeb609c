"""A stream of conversations that share beginnings, as a chat service sees them; equal for an equal seed, on every rank.

Every conversation begins with one of a few system prompts; many go on with one of a few documents; each has several turns,
and the prompt of a turn is everything said before it, answers included. So a prompt can be made only when the turn before it
has been answered, and turns of different conversations arrive mixed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from commplane.errors import ConfigError
from commplane_cache.demo.text import SENTENCES, SYSTEMS

__all__ = ["Conversations", "Script", "Shape", "Turn", "arrivals", "longest", "scripts"]


@dataclass(frozen=True)
class Shape:
    """How much of everything there is.

    Attributes:
        conversations: number of them.
        turns: questions in each.
        documents: number of texts that conversations may be about.
        sentences: length of a document.
        share: portion of conversations that are about a document.
        answer: tokens that are decoded for a turn.
        open: conversations that go on at the same time.
        seed: of every choice.
    """

    conversations: int = 8
    turns: int = 3
    documents: int = 3
    sentences: int = 4
    share: float = 0.7
    answer: int = 8
    open: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("conversations", "turns", "documents", "sentences", "answer", "open"):
            if getattr(self, name) < 1:
                raise ConfigError(f"stream of conversations: {name} must be 1 or more, found {getattr(self, name)}")


@dataclass(frozen=True)
class Turn:
    """One request: which conversation, and its how many-th question."""

    conversation: int
    number: int


@dataclass(frozen=True)
class Script:
    """What is known of a conversation before anything is answered: its beginning, and the question of each turn."""

    beginning: bytes
    questions: tuple[bytes, ...]


def scripts(shape: Shape, sentences: Sequence[str] = SENTENCES) -> list[Script]:
    """All conversations of a stream."""
    chance = random.Random(f"scripts {shape.seed}")
    documents = [" ".join(chance.sample(list(sentences), min(shape.sentences, len(sentences)))) for _ in range(shape.documents)]
    out = []
    for _ in range(shape.conversations):
        beginning = _popular(chance, SYSTEMS)
        if chance.random() < shape.share:
            beginning += "Read this: " + _popular(chance, documents) + " "
        questions = tuple(f"Q: {chance.choice(sentences)} Why? A: ".encode() for _ in range(shape.turns))
        out.append(Script(beginning.encode(), questions))
    return out


def _popular(chance: random.Random, things: Sequence[str]) -> str:
    """One of `things`, the earlier the more often (as one over its place)."""
    return chance.choices(things, [1 / place for place in range(1, len(things) + 1)])[0]


def arrivals(shape: Shape) -> list[Turn]:
    """Every turn of every conversation, in order of arrival: `Shape.open` conversations are mixed at a time."""
    chance = random.Random(f"arrivals {shape.seed}")
    coming = list(range(shape.conversations))
    going: list[int] = []
    asked = [0] * shape.conversations
    out: list[Turn] = []
    while coming or going:
        while coming and len(going) < shape.open:
            going.append(coming.pop(0))
        # Not the same conversation twice in a row where another one can be next: nobody types that fast.
        others = [c for c in going if not out or c != out[-1].conversation] or going
        now = chance.choice(others)
        out.append(Turn(now, asked[now]))
        asked[now] += 1
        if asked[now] == shape.turns:
            going.remove(now)
    return out


def longest(shape: Shape, sentences: Sequence[str] = SENTENCES) -> int:
    """Tokens of the longest sequence of a stream, prompt and answer."""
    return max(
        len(s.beginning) + sum(map(len, s.questions)) + shape.turns * (shape.answer + 1) for s in scripts(shape, sentences)
    )


class Conversations:
    """The stream while it is served: prompts grow by the answers. Local; equal on ranks whose answers are equal."""

    def __init__(self, shape: Shape, sentences: Sequence[str] = SENTENCES) -> None:
        self._scripts = scripts(shape, sentences)
        self._said = [list(s.beginning) for s in self._scripts]
        self._answered = [0] * len(self._scripts)

    def ready(self, turn: Turn) -> bool:
        """Whether the turn before it has been answered."""
        return self._answered[turn.conversation] == turn.number

    def prompt(self, turn: Turn) -> list[int]:
        """The tokens (bytes) of a turn that is `ready`."""
        return self._said[turn.conversation] + list(self._scripts[turn.conversation].questions[turn.number])

    def answer(self, turn: Turn, tokens: Sequence[int]) -> None:
        """The answer to a turn, which becomes part of the conversation's next prompt."""
        self._said[turn.conversation] = [*self.prompt(turn), *tokens, ord(" ")]
        self._answered[turn.conversation] += 1
