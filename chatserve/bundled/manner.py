"""How people type and how the model words things: capitals, marks, short forms, slips, and "your" for "my"."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

SMALL_WORDS = frozenset(("is", "are", "do", "does", "did", "the", "a", "of", "can", "to"))


@dataclass(frozen=True)
class Style:
    """How one user types."""

    casual: float
    american: bool
    short: bool
    typos: float

    @classmethod
    def draw(cls, rng: random.Random) -> "Style":
        casual = rng.choice((0.0, 0.2, 0.6, 1.0))
        slips = rng.choice((0.0, 0.06, 0.2)) if casual else 0.0
        return cls(casual, rng.random() < 0.4, rng.random() < casual * 0.3, slips)

    def typed(self, rng: random.Random, template: str, mark: str, slots: dict[str, str]) -> str:
        """The template as this user types it, slots filled; values are never changed here."""
        if rng.random() < self.casual:
            text = self._casual(rng, template) + rng.choice(("", "", "", mark))
        else:
            text = formal(template) + (mark if rng.random() < 0.9 else "")
            if text.startswith("{k}"):
                slots = slots | {"k": capitalised(slots["k"])}
        for slot, value in slots.items():
            text = text.replace(f"{{{slot}}}", value)
        text = text.replace("favourite", "fav") if self.short else text
        return american(text) if self.american else text

    def _casual(self, rng: random.Random, template: str) -> str:
        text = informal(template) if rng.random() < 0.5 else template
        if rng.random() < self.typos:
            return with_slip(rng, text) if rng.random() < 0.6 else without_a_word(rng, text)
        return text


@cache
def formal(template: str) -> str:
    """With "I" for "i" and a capital at the start."""
    text = re.sub(r"\bi\b(?!\})", "I", template)
    return text[0].upper() + text[1:]


@cache
def informal(template: str) -> str:
    """With short forms and without apostrophes."""
    text = template.replace("'", "")
    text = re.sub(r"\byou\b", "u", text)
    return re.sub(r"\bplease\b", "pls", text)


def american(text: str) -> str:
    return text.replace("avourite", "avorite").replace("olour", "olor")


def capitalised(value: str) -> str:
    """A key at the start of a sentence; values, which are somebody's own words, stay."""
    return value[0].upper() + value[1:] if value.startswith(("my ", "the ")) else value


def with_slip(rng: random.Random, text: str) -> str:
    """Two letters swapped or one left out, never inside a slot."""
    spots = [i for i in range(1, len(text) - 1) if text[i - 1 : i + 2].isalpha() and text[i - 2] != "{" != text[i - 1]]
    if not spots:
        return text
    i = rng.choice(spots)
    return text[:i] + text[i + 1] + text[i] * (rng.random() < 0.5) + text[i + 2 :]


def without_a_word(rng: random.Random, text: str) -> str:
    """One small word left out, as in "what my name"."""
    words = text.split(" ")
    spots = [i for i, word in enumerate(words) if word in SMALL_WORDS and len(words) > 3]
    if spots:
        del words[rng.choice(spots)]
    return " ".join(words)


def replied(said: str) -> str:
    """What the user said of their own, as the reply says it."""
    return re.sub(r"\b(?:my|our) ", "your ", said)


def sentence(clause: str) -> str:
    """A clause of our own words gets a capital; a name at the start stays as it was typed."""
    return (clause[0].upper() + clause[1:] if clause.startswith(("your ", "you ", "the ")) else clause) + "."


def listing(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
