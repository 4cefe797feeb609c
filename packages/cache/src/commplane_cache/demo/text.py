"""What the conversations of the demo are about: system prompts, documents that many ask about, and questions."""

from __future__ import annotations

from pathlib import Path

from commplane.errors import ConfigError

__all__ = ["SENTENCES", "SYSTEMS", "read_sentences"]

SYSTEMS = (
    "You are the assistant of a travel office. Answer in one short sentence, name the price if there is one, never promise a "
    "seat, and send people who want a refund to the counter on the ground floor. Today is a weekday. ",
    "You help in a kitchen. Say what to do next and for how many minutes, use grams and litres, and warn about nuts, eggs and "
    "milk whenever a dish has them. If you do not know, say so. ",
    "You are a librarian. Recommend one book at a time, say on which shelf it stands, keep your voice down, and do not tell the "
    "reader how the story ends. ",
)

SENTENCES = (
    "Simmer the tomato sauce gently for an hour before adding the basil.",
    "The storm knocked out power across the valley last night.",
    "Saturn's rings are made mostly of ice and dust.",
    "The last train to the coast leaves at a quarter past eleven.",
    "She practised the cello until her fingers ached.",
    "Plant the tulip bulbs in autumn, before the first hard frost.",
    "The program crashed because it ran out of memory.",
    "The Roman road still runs straight across the moor.",
    "A brisk walk every day is good for your heart.",
    "The cat fell asleep on top of the warm printer.",
    "The bakery on the corner sells out of rye bread by nine.",
    "Whales can hear each other across hundreds of miles of ocean.",
    "Our flight was delayed because of thick fog at the airport.",
    "The new bridge cut the journey to the island by half.",
    "Let the dough rest under a damp cloth until it doubles in size.",
    "A solar eclipse happens when the Moon passes in front of the Sun.",
    "The conductor checked our tickets somewhere after the tunnel.",
    "Always back up your files before you update the system.",
    "The treaty ended a war that had lasted thirty years.",
    "The old dog waits by the gate for the postman every morning.",
    "The night ferry carries cars, lorries and about two hundred passengers.",
    "Grate the lemon peel first, then squeeze the juice into the bowl.",
    "The reading room on the second floor opens at ten and closes at six.",
    "Every winter the lake freezes hard enough to skate on.",
)


def read_sentences(path: Path | None) -> tuple[str, ...]:
    """The sentences of a text file, one a line, or those above.

    Raises:
        ConfigError: the file cannot be read, or holds fewer than 4 sentences.
    """
    if path is None:
        return SENTENCES
    try:
        lines = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the text {path} cannot be read: {error}") from error
    sentences = tuple(line for line in lines if line)
    if len(sentences) < 4:
        raise ConfigError(f"the text {path}: wanted at least 4 sentences, one a line, found {len(sentences)}")
    return sentences
