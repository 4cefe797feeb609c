"""What is asked where the user gives nothing: from less than a page to dozens."""

from __future__ import annotations

__all__ = ["PROMPTS"]

_STORY = (
    "The harbour master kept two ledgers. In the first he wrote which ship had come, from where, and how deep it lay in the "
    "water. In the second he wrote which crates had left which ship, and on whose cart. "
)

PROMPTS = (
    "Hi!",
    "Where does the second half of this sentence come from?",
    "Prefill reads the prompt once; decode writes the answer one token at a time.",
    _STORY + "Nobody was ever paid from the first ledger alone, for a ship that has come is not a crate that has arrived.",
    "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune: which of them has rings that can be seen from the first one?",
    _STORY * 4 + "What did he write in the second ledger?",
)
