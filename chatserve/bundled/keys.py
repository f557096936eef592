"""What facts are about: "my sister", "the door code", "Anna's dog", and the rules that draw such keys."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chatserve.bundled import phrases as p
from chatserve.bundled.words import Words, spaced

MADE_UP_SHARE = 0.12
THE_NOUNS = frozenset((*p.CODES, *p.OBJECTS, *p.OBJECTS_MANY, *p.COLOURED, *p.EVENTS, *p.NAMED_THINGS, *p.PETS))
PERSONS = frozenset((*p.RELATIONS, *p.PETS))
SHE = frozenset(spaced("sister mother mum wife daughter aunt grandmother girlfriend niece"))
HE = frozenset(spaced("brother father dad husband son uncle grandfather boyfriend nephew"))


@dataclass(frozen=True)
class Key:
    """A noun of the user's (`owner` empty) or of somebody's, a person (no noun), or a `bare` word without "my"."""

    owner: str = ""
    noun: str = ""
    bare: bool = False

    @property
    def ident(self) -> tuple[str, str]:
        return self.owner.casefold(), self.noun

    @property
    def takes_the(self) -> bool:
        """Whether people say "the keys" as well as "my keys"."""
        return self.noun in THE_NOUNS

    @property
    def is_the(self) -> bool:
        """Whether it can only be "the": the capital of Zorbia, the code for the door."""
        return not self.bare and (" of " in self.noun or " for " in self.noun)


@dataclass(frozen=True)
class Mention:
    """A key as the user says it, and as the reply to that does."""

    said: str
    reply: str


def pronoun(rng: random.Random, person: str) -> str:
    """ "he", "she" or "it" for "my sister", "my dog" or a name."""
    noun = person.removeprefix("my ").split()[-1]
    if noun in SHE or noun in HE:
        return "she" if noun in SHE else "he"
    return rng.choice(("he", "she", "it") if noun in p.PETS else ("he", "she"))


class Keys:
    """Draws keys for one conversation, in which a few people keep coming up."""

    def __init__(self, rng: random.Random, words: Words) -> None:
        self.rng = rng
        self.words = words
        self.people = [words.value("name").split()[-1] for _ in range(rng.randint(1, 5))]
        self._rules: dict[str, Callable[[], Key]] = {
            "none": Key,
            "named": self._named,
            "several": lambda: Key(noun=rng.choice(p.SEVERAL)),
            "counted": lambda: Key(noun=self._noun(p.COUNTED), bare=True),
            "favourites": lambda: Key(self._owner(0.15), rng.choice(p.FAVOURITES_MANY)),
            "state": lambda: Key(noun=rng.choice(p.STATES), bare=True),
            "verb": lambda: Key(noun=rng.choice(p.VERBS), bare=True),
            "attribute": self._attribute,
            "person": lambda: Key(owner=self.person()),
            "object": lambda: Key(noun=self._noun(p.OBJECTS)),
            "objects": lambda: Key(noun=rng.choice(p.OBJECTS_MANY)),
            "coloured": self._coloured,
            "event": lambda: Key(self._owner(0.2), self._noun(p.EVENTS)),
        }

    def draw(self, rule: str) -> Key:
        """A key by the rule that a kind of fact names."""
        return self._rules[rule]()

    def person(self) -> str:
        """Somebody whom facts can be about."""
        if self.rng.random() < 0.4:
            return "my " + self.rng.choice(p.RELATIONS if self.rng.random() < 0.8 else p.PETS)
        return self.rng.choice(self.people)

    def _owner(self, somebody: float) -> str:
        return self.person() if self.rng.random() < somebody else ""

    def _noun(self, real: Sequence[str]) -> str:
        draw = self.rng.random()
        if draw < MADE_UP_SHARE:
            return self.words.made_up()
        noun = self.rng.choice(real)
        return f"{self.rng.choice(p.ADJECTIVES)} {noun}" if draw > 0.92 else noun

    def _coloured(self) -> Key:
        if self.rng.random() < 0.12:
            return Key(owner=self.person())
        return Key(self._owner(0.15), self._noun(p.COLOURED))

    def _named(self) -> Key:
        draw = self.rng.random()
        if draw < 0.5:
            return Key(self._owner(0.2), self.rng.choice(p.RELATIONS))
        if draw < 0.9:
            return Key(self._owner(0.2), self._noun(p.PETS))
        return Key(self._owner(0.1), self.rng.choice(p.NAMED_THINGS))

    def _attribute(self) -> Key:
        pick, draw = self.rng.choice, self.rng.random()
        if draw < 0.42:
            return Key(self._owner(0.25), "favourite " + pick(list(p.FAVOURITES)))
        if draw < 0.67:
            return Key(self._owner(0.15), pick(list(p.CODES)))
        if draw < 0.83:
            return Key(self._owner(0.15), pick(list(p.TEXTS)))
        if draw < 0.86:
            return Key(noun=f"{pick(p.OF_NOUNS)} of {self.words.value('city')}")
        if draw < 0.90:
            return Key(noun=f"{pick(p.SECRETS)} {pick(('of', 'for'))} {pick(('the', 'my'))} {self._noun(p.OBJECTS)}")
        return Key(self._owner(0.15), self.words.made_up() if draw < 0.96 else pick(p.FILLER_WORDS))


def value_type(kind: p.Kind, key: Key) -> str:
    """Which values fit; for attributes the noun decides, and unknown nouns take any word."""
    if kind.name != "attribute":
        return kind.values
    if key.noun.startswith("favourite "):
        return p.FAVOURITES[key.noun.removeprefix("favourite ")]
    if key.is_the:
        return "code" if key.noun.split()[0] in p.SECRETS else "word"
    return p.CODES.get(key.noun) or p.TEXTS.get(key.noun, "word")
