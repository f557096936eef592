"""Makes conversations: a `Chat` knows what it was told and so knows every right answer.

Nothing here is read from outside: all text comes from `phrases` and `words` and one random generator, so a seed gives
the same conversation for ever. `conversation` is what training uses; evaluation drives a `Chat` turn by turn.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

from chatserve.bundled import phrases as p
from chatserve.bundled.words import Words

LIST_LIMIT = 8
SUMMARY_LIMIT = 4
MADE_UP_KEY_SHARE = 0.12
THE_NOUNS = frozenset((*p.CODES, *p.OBJECTS, *p.OBJECTS_MANY, *p.COLOURED, *p.EVENTS, *p.NAMED_THINGS, *p.PETS))
HELD_OUT_VALUES = frozenset("name city colour food animal title hobby drink word number code job place address".split())


@dataclass(frozen=True)
class Message:
    """One message; `tag` names what a reply is about, for evaluation."""

    role: str
    text: str
    tag: str = ""


@dataclass(frozen=True)
class Key:
    """What a fact is about: a noun of the user's (`owner` empty) or of somebody's, or a person without a noun."""

    owner: str = ""
    noun: str = ""

    @property
    def ident(self) -> tuple[str, str]:
        return self.owner.casefold(), self.noun


@dataclass
class Fact:
    """A fact as last told."""

    kind: p.Kind
    key: Key
    value: str
    asked: int = 0


@dataclass(frozen=True)
class Part:
    """A piece of a user's message and the reply it deserves."""

    user: str
    reply: str
    tag: str
    is_question: bool = False


@dataclass
class Style:
    """How this user types."""

    casual: float
    american: bool
    typos: float

    @classmethod
    def draw(cls, rng: random.Random) -> "Style":
        casual = rng.choice((0.0, 0.2, 0.6, 1.0))
        return cls(casual, rng.random() < 0.4, rng.choice((0.0, 0.0, 0.04)) if casual else 0.0)


@cache
def formal(template: str) -> str:
    """With "I" for "i" and a capital at the start."""
    text = re.sub(r"\bi\b(?!\})", "I", template)
    return text[0].upper() + text[1:]


@cache
def informal(template: str) -> str:
    """With short forms and without apostrophes, but with the slots' names intact."""
    text = template.replace("{k}'s", "{k}s").replace("'", "")
    text = re.sub(r"\byou\b", "u", text)
    return re.sub(r"\bplease\b", "pls", text)


def replied(said: str) -> str:
    """The key or value as the reply says it."""
    text = re.sub(r"\bmy ", "your ", said)
    return text[0].lower() + text[1:] if text.startswith(("The ", "Your ")) else text


def sentence(clause: str) -> str:
    """A clause made of our own words gets a capital; a value at the start stays as it was typed."""
    starts_ours = clause.startswith(("your ", "you ", "the "))
    return (clause[0].upper() + clause[1:] if starts_ours else clause) + "."


def listing(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def with_typo(rng: random.Random, text: str) -> str:
    """Swaps or drops one letter of a template, never inside a slot."""
    spots = [i for i in range(1, len(text) - 1) if text[i - 1 : i + 2].isalpha() and "{" not in text[max(0, i - 2) : i + 2]]
    if not spots:
        return text
    i = rng.choice(spots)
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :] if rng.random() < 0.5 else text[:i] + text[i + 1 :]


class Keys:
    """Draws what facts are about, by the rule that a kind names."""

    def __init__(self, rng: random.Random, words: Words) -> None:
        self.rng = rng
        self.words = words
        self.people = [words.value("name").split()[0] for _ in range(rng.randint(1, 5))]
        self._rules: dict[str, Callable[[], Key]] = {
            "none": Key,
            "named": self._named,
            "attribute": self._attribute,
            "person": lambda: Key(owner=self.person()),
            "object": lambda: Key(noun=self._noun(p.OBJECTS)),
            "objects": lambda: Key(noun=rng.choice(p.OBJECTS_MANY)),
            "coloured": lambda: Key(self.owner(0.15), self._noun(p.COLOURED)),
            "event": lambda: Key(self.owner(0.2), self._noun(p.EVENTS)),
        }

    def draw(self, rule: str) -> Key:
        return self._rules[rule]()

    def person(self) -> str:
        if self.rng.random() < 0.35:
            return "my " + self.rng.choice(p.RELATIONS)
        return self.rng.choice(self.people)

    def owner(self, somebody: float) -> str:
        return self.person() if self.rng.random() < somebody else ""

    def _noun(self, real: Sequence[str]) -> str:
        return self.words.made_up() if self.rng.random() < MADE_UP_KEY_SHARE else self.rng.choice(real)

    def _named(self) -> Key:
        draw = self.rng.random()
        if draw < 0.5:
            return Key(self.owner(0.2), self.rng.choice(p.RELATIONS))
        if draw < 0.9:
            return Key(self.owner(0.2), self._noun(p.PETS))
        return Key(self.owner(0.1), self.rng.choice(p.NAMED_THINGS))

    def _attribute(self) -> Key:
        draw = self.rng.random()
        if draw < 0.45:
            return Key(self.owner(0.25), "favourite " + self.rng.choice(list(p.FAVOURITES)))
        if draw < 0.72:
            return Key(self.owner(0.15), self.rng.choice(list(p.CODES)))
        if draw < 0.9:
            return Key(self.owner(0.15), self.rng.choice(list(p.TEXTS)))
        return Key(self.owner(0.15), self.words.made_up())


def value_type(kind: p.Kind, key: Key) -> str:
    """Which values fit; for attributes the noun decides, and made-up nouns take any word."""
    if kind.name != "attribute":
        return kind.values
    noun = key.noun.removeprefix("favourite ")
    table = p.FAVOURITES if key.noun.startswith("favourite ") else p.CODES if noun in p.CODES else p.TEXTS
    found = table.get(noun, "word")
    return "food" if found == "phrase" else found


@dataclass
class Chat:
    """A conversation under way. Each method named after an action makes a `Part`; `turn` makes messages of parts."""

    rng: random.Random
    words: Words
    style: Style
    keys: Keys
    messages: list[Message] = field(default_factory=list)
    facts: dict[tuple[str, tuple[str, str]], Fact] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)
    note: str = ""
    assistant_name: str = ""
    jokes: int = 0
    stories: int = 0
    last_told: Fact | None = None
    last_asked: p.Kind | None = None
    protected: Fact | None = None

    @classmethod
    def new(cls, rng: random.Random, *, held_out: bool = False) -> "Chat":
        words = Words(rng, held_out=held_out, real_share=rng.choice((0.1, 0.35, 0.6)))
        return cls(rng, words, Style.draw(rng), Keys(rng, words))

    @property
    def chars(self) -> int:
        """How long the conversation is."""
        return sum(len(message.text) for message in self.messages)

    @property
    def last_tag(self) -> str:
        return self.messages[-1].tag if self.messages else ""

    # What the user types

    def typed(self, template: str, mark: str = ".", **slots: str) -> str:
        """The template in this user's way of typing, slots filled."""
        rng = self.rng
        casual = rng.random() < self.style.casual
        if casual:
            text = informal(template) if rng.random() < 0.5 else template
            if self.style.typos and rng.random() < self.style.typos * 5:
                text = with_typo(rng, text)
            text += rng.choice(("", "", "", mark))
        else:
            text = formal(template) + (mark if rng.random() < 0.9 else "")
        for slot, filling in slots.items():
            if not casual and text.startswith("{" + slot + "}") and filling.startswith(("my ", "the ")):
                filling = filling[0].upper() + filling[1:]
            text = text.replace("{" + slot + "}", filling)
        if self.style.american:
            text = text.replace("avourite", "avorite").replace("olour", "olor")
        return text

    def mention(self, key: Key, *, possessive: bool = False) -> str:
        """The key as the user says it now: "my keys" and "the keys" are the same."""
        if not key.noun:
            owner = key.owner
        elif key.owner:
            owner = key.owner + "'s"
        else:
            owner = "the" if key.noun in THE_NOUNS and not possessive and self.rng.random() < 0.4 else "my"
        if self.rng.random() < self.style.casual * 0.3:
            owner = owner.lower()
        return f"{owner} {key.noun}".strip()

    def value_for(self, kind: p.Kind, key: Key) -> str:
        value = self.words.value(value_type(kind, key))
        return value.lower() if self.rng.random() < self.style.casual * 0.5 else value

    # Facts

    def tell(self, kind: p.Kind | None = None) -> Part:
        """A new fact, or by chance an old key with another value."""
        kind = kind or self.draw_kind()
        key = self.keys.draw(kind.keys)
        if self.protected and (kind.name, key.ident) == (self.protected.kind.name, self.protected.key.ident):
            return self.small_talk()
        return self.state(kind, key, self.value_for(kind, key))

    def draw_kind(self) -> p.Kind:
        return self.rng.choices(p.KINDS, [k.weight for k in p.KINDS])[0]

    def remember(self, kind: p.Kind, key: Key, value: str) -> Fact:
        ident = (kind.name, key.ident)
        fact = self.facts.setdefault(ident, Fact(kind, key, value))
        fact.value, fact.asked = value, 0
        self.last_told = fact
        return fact

    def state(self, kind: p.Kind, key: Key, value: str) -> Part:
        """The user's statement of a fact and its acknowledgement."""
        self.remember(kind, key, value)
        rng = self.rng
        person = key.noun in p.RELATIONS or key.noun in p.PETS
        owned = kind.owned and not key.owner and rng.random() < 0.4
        templates = kind.owned if owned else kind.bare if person and kind.bare and rng.random() < 0.25 else kind.tells
        template = rng.choice(templates)
        if rng.random() < 0.22:
            template = f"{rng.choice(p.TELL_OPENERS)} {template}"
        if rng.random() < 0.08:
            template = f"{template} {rng.choice(p.TELL_CLOSERS)}".replace(" ,", ",")
        said = self.mention(key, possessive=bool(owned))
        mark = rng.choice((".", ".", ".", "!"))
        user = self.typed(template, mark, k=said, n=key.noun, v=value)
        return Part(user, self.acknowledge(kind, said, value), "tell " + kind.name)

    def acknowledge(self, kind: p.Kind, said: str, value: str) -> str:
        if kind.name == "name":
            return f"Nice to meet you, {value}."
        return f"Got it, {self.clause(kind.clause, said, value)}."

    def clause(self, template: str, said: str, value: str) -> str:
        value = replied(value) if value.startswith(("in ", "on ", "under ", "behind ", "next ", "near ", "at ")) else value
        return template.replace("{r}", replied(said)).replace("{w}", value)

    def correct(self) -> Part:
        """A fact told before gets another value, by name or, right after it was told, by "no, I meant"."""
        told = self.open_facts()
        return self.change(self.rng.choice(told)) if told else self.tell()

    def open_facts(self) -> list[Fact]:
        """The facts that may be spoken of: all but the one that evaluation keeps for later."""
        return [fact for fact in self.facts.values() if fact is not self.protected]

    def meant(self) -> Part:
        fact = self.last_told
        if fact is None or fact is self.protected or self.last_tag != "tell " + fact.kind.name:
            return self.correct()
        return self.change(fact, p.MEANT)

    def change(self, fact: Fact, templates: Sequence[str] = ()) -> Part:
        """The user's correction of one fact, and its acknowledgement."""
        rng, kind = self.rng, fact.kind
        value = self.value_for(kind, fact.key)
        said = self.mention(fact.key)
        if templates:
            template = rng.choice(templates)
        elif rng.random() < 0.5:
            template = rng.choice(kind.changes)
        else:
            template = f"{rng.choice(p.CHANGE_OPENERS)} {rng.choice(kind.tells)}"
        self.remember(kind, fact.key, value)
        user = self.typed(template, k=said, n=fact.key.noun, v=value)
        said = "the " + fact.key.noun if said.startswith("the ") else self.plain(fact.key) if templates else said
        return Part(user, f"Understood, {self.clause(kind.now, said, value)}.", "correct " + kind.name)

    def plain(self, key: Key) -> str:
        """The key with "my" wherever that can be said."""
        owner = key.owner + "'s" if key.owner and key.noun else key.owner or "my"
        return f"{owner} {key.noun}".strip()

    def ask(self, fact: Fact | None = None) -> Part:
        """A question about a fact that was told, the less asked the likelier."""
        if fact is None:
            told = self.open_facts()
            if not told:
                return self.ask_unknown()
            fact = self.rng.choices(told, [1.0 / (1 + 3 * f.asked) for f in told])[0]
        fact.asked += 1
        said = self.mention(fact.key)
        answer = sentence(self.clause(fact.kind.clause, said, fact.value))
        return Part(self.question(fact.kind, said), answer, "ask " + fact.kind.name, is_question=True)

    def ask_unknown(self) -> Part:
        """A question about something nobody told."""
        for _ in range(20):
            kind = self.draw_kind()
            key = self.unknown_key(kind)
            if (kind.name, key.ident) not in self.facts:
                said = self.mention(key)
                lacking = kind.lacking.replace("{r}", replied(said))
                return Part(self.question(kind, said), f"You have not told me {lacking}.", "unknown " + kind.name, is_question=True)
        return self.small_talk()

    def unknown_key(self, kind: p.Kind) -> Key:
        """Often close to something told: another owner of the same noun, another noun of the same owner."""
        key = self.keys.draw(kind.keys)
        if self.facts and self.rng.random() < 0.5:
            near = self.rng.choice(list(self.facts.values()))
            if near.kind is kind and key.noun:
                return self.rng.choice((Key(near.key.owner, key.noun), Key(key.owner, near.key.noun)))
        return key

    def question(self, kind: p.Kind, said: str) -> str:
        """One of the ways to ask; a bare "and my brother?" only after a question of the same kind."""
        rng, draw = self.rng, self.rng.random()
        if said and self.last_asked is kind and draw < 0.15 and self.last_tag in ("ask " + kind.name, "unknown " + kind.name):
            return self.typed(rng.choice(p.FOLLOW_UPS), "?", k=said)
        self.last_asked = kind
        if draw < 0.3:
            return self.typed(f"{rng.choice(p.INDIRECT_OPENERS)} {rng.choice(kind.indirect)}", rng.choice("?."), k=said)
        template = rng.choice(kind.asks)
        if rng.random() < 0.2:
            template = f"{rng.choice(p.ASK_OPENERS)} {template}"
        if rng.random() < 0.12:
            template += " " + rng.choice(p.ASK_CLOSERS)
        return self.typed(template.replace(" ,", ","), "?", k=said)

    def check(self) -> Part:
        """A yes-or-no question about a told fact."""
        told = self.open_facts()
        if not told:
            return self.ask_unknown()
        fact = self.rng.choice(told)
        right = self.rng.random() < 0.5
        value = fact.value if right else self.other_value(fact)
        said = self.mention(fact.key)
        user = self.typed(self.rng.choice(fact.kind.checks), "?", k=said, v=value)
        verdict = "Yes" if value == fact.value else "No"
        return Part(user, f"{verdict}, {self.clause(fact.kind.clause, said, fact.value)}.", "check", is_question=True)

    def other_value(self, fact: Fact) -> str:
        same = [f.value for f in self.facts.values() if f.kind is fact.kind]
        return self.rng.choice(same) if self.rng.random() < 0.3 else self.value_for(fact.kind, fact.key)

    def who(self) -> Part:
        """The reverse question: whose name is this?"""
        named = [f for f in self.open_facts() if f.kind.name == "named" and (f.key.noun in p.RELATIONS or f.key.noun in p.PETS)]
        fact = self.rng.choice(named) if named and self.rng.random() < 0.75 else None
        name = fact.value if fact else self.words.any_word()
        others = [f for f in self.facts.values() if f is not fact and f.value.casefold() == name.casefold()]
        if others or name.casefold() in (person.casefold() for person in self.keys.people):
            return self.ask()
        user = self.typed(self.rng.choice(p.WHO_IS), "?", v=name)
        if fact is None:
            return Part(user, f"You have not told me who {name} is.", "unknown who", is_question=True)
        return Part(user, f"{name} is {replied(self.plain(fact.key))}.", "who", is_question=True)

    def summary(self) -> Part:
        """What was told first, as it stands now."""
        if self.protected:
            return self.ask()
        user = self.typed(self.rng.choice(p.SUMMARY), "?")
        first = list(self.facts.values())[:SUMMARY_LIMIT]
        if not first:
            return Part(user, "You have not told me anything yet.", "unknown summary", is_question=True)
        clauses = (self.clause(f.kind.clause, self.plain(f.key), f.value) for f in first)
        return Part(user, f"You told me this: {'; '.join(clauses)}.", "summary", is_question=True)

    def forget_name(self) -> Part:
        """The one fact that can be taken back."""
        fact = self.facts.get(("name", ("", "")))
        if fact is None or fact is self.protected:
            return self.small_talk()
        self.facts.pop(("name", ("", "")), None)
        self.last_told = None
        return Part(self.typed(self.rng.choice(p.FORGET_NAME)), "I have forgotten your name.", "forget")

    # Lists, likes and notes

    def list_turn(self) -> Part:
        name = self.rng.choice(p.USER_LISTS)
        items = self.lists.setdefault(name, [])
        draw = self.rng.random()
        if draw < 0.12 and items:
            return self.list_remove(name, items)
        if draw < 0.16:
            items.clear()
            return Part(self.typed(self.rng.choice(p.LIST_CLEAR), l=name), f"Your {name} is empty now.", "list clear")
        if draw < 0.62 and len(items) < LIST_LIMIT:
            return self.list_add(name, items)
        return self.list_show(name)

    def list_add(self, name: str, items: list[str]) -> Part:
        new = self.new_items("goods" if name == "shopping list" else "task", items)
        if not new:
            return self.list_show(name)
        items.extend(new)
        short = self.last_tag == "list add " + name and self.rng.random() < 0.6
        template = self.rng.choice(p.LIST_ADD_SHORT if short else p.LIST_ADD)
        user = self.typed(template, v=listing(new), l=name)
        return Part(user, f"I have added {listing(new)} to your {name}.", "list add " + name)

    def new_items(self, kind: str, items: list[str]) -> list[str]:
        count = min(self.rng.choice((1, 1, 1, 2, 3)), LIST_LIMIT - len(items))
        drawn = {self.words.value(kind): None for _ in range(count)}
        return [item for item in drawn if item not in items]

    def list_remove(self, name: str, items: list[str]) -> Part:
        item = items.pop(self.rng.randrange(len(items)))
        user = self.typed(self.rng.choice(p.LIST_REMOVE), v=item, l=name)
        return Part(user, f"I have removed {item} from your {name}.", "list remove")

    def list_show(self, name: str) -> Part:
        items = self.lists.get(name, [])
        user = self.typed(self.rng.choice(p.LIST_SHOW), "?", l=name)
        reply = f"Your {name}: {listing(items)}." if items else f"Your {name} is empty."
        return Part(user, reply, "list" if items else "list empty", is_question=True)

    def like(self) -> Part:
        items = self.lists.setdefault("likes", [])
        if len(items) < 5 and self.rng.random() < 0.5:
            thing = self.words.value(self.rng.choice(("food", "hobby", "drink")))
            if thing not in items:
                items.append(thing)
                return Part(self.typed(self.rng.choice(p.LIKE_TELL), v=thing), f"Got it, you like {thing}.", "tell like")
        user = self.typed(self.rng.choice(p.LIKE_ASK), "?")
        reply = f"You like {listing(items)}." if items else "You have not told me what you like."
        return Part(user, reply, "likes" if items else "unknown like", is_question=True)

    def note_turn(self) -> Part:
        if self.rng.random() < 0.5:
            self.note = self.free_text(8)
            return Part(self.typed(self.rng.choice(p.NOTE_TELL), "", v=self.note), "I will remember that.", "tell note")
        user = self.typed(self.rng.choice(p.NOTE_ASK), "?")
        reply = f"You asked me to remember this: {self.note}" if self.note else "You have not given me a note."
        return Part(user, reply, "note" if self.note else "unknown note", is_question=True)

    def free_text(self, most: int) -> str:
        """A few words, real ones and made-up ones, as somebody might dictate."""
        rng = self.rng
        drawn = [self.words.any_word() if rng.random() < 0.4 else rng.choice(p.FILLER_WORDS) for _ in range(rng.randint(1, most))]
        if rng.random() < 0.3:
            drawn.insert(rng.randrange(len(drawn)), self.words.value("number"))
        return " ".join(drawn)

    # Everything else people say

    def small_talk(self) -> Part:
        draw = self.rng.random()
        if draw < 0.2:
            return self.greet()
        if draw < 0.28:
            return Part(self.typed(self.rng.choice(p.GOODBYES)), self.addressed("Goodbye"), "bye")
        if draw < 0.34:
            return self.your_name()
        texts, reply = self.rng.choice(p.SMALL_TALK)
        return Part(self.typed(self.rng.choice(texts), self.rng.choice(".!?")), reply, "small talk")

    def greet(self) -> Part:
        return Part(self.typed(self.rng.choice(p.GREETINGS), self.rng.choice("!.")), self.addressed("Hello") + " How can I help?", "greet")

    def addressed(self, word: str) -> str:
        fact = self.facts.get(("name", ("", "")))
        return f"{word}, {fact.value}." if fact else f"{word}."

    def your_name(self) -> Part:
        if self.rng.random() < 0.2:
            self.assistant_name = self.words.value("name").split()[0]
            user = self.typed(self.rng.choice(p.CALL_YOU), v=self.assistant_name)
            return Part(user, f"All right, my name is {self.assistant_name}.", "call you")
        reply = f"My name is {self.assistant_name}." if self.assistant_name else "I am the small model that comes with chatserve."
        return Part(self.typed(self.rng.choice(p.YOUR_NAME), "?"), reply, "your name")

    def unknown_talk(self) -> Part:
        """Questions, wishes and remarks that are beyond the model."""
        templates, reply, mark = self.rng.choice(
            (
                (p.UNKNOWN_QUESTIONS, p.UNKNOWN_ANSWER, "?"),
                (p.UNKNOWN_REQUESTS, p.UNKNOWN_REQUEST_ANSWER, "."),
                (p.UNKNOWN_STATEMENTS, p.UNKNOWN_STATEMENT_ANSWER, "."),
            )
        )
        template = self.filled(self.rng.choice(templates))
        if mark == "." and self.rng.random() < 0.06:
            return Part(self.filler(self.rng.randint(2, 10)), p.UNKNOWN_STATEMENT_ANSWER, "unknown talk")
        return Part(self.typed(template, mark), reply, "unknown talk")

    def filled(self, template: str) -> str:
        """The template with words for `{x}` and digits for `{d}`."""
        while "{x}" in template:
            word = self.rng.choice(p.FILLER_WORDS) if self.rng.random() < 0.6 else self.words.made_up()
            template = template.replace("{x}", word, 1)
        while "{d}" in template:
            template = template.replace("{d}", str(self.rng.randint(1, 12 if "{d}{d}" not in template else 9)), 1)
        return template

    def filler(self, sentences: int) -> str:
        return " ".join(self.filled(self.rng.choice(p.FILLER)) for _ in range(sentences))

    def echo(self) -> Part:
        text = self.free_text(10)
        return Part(self.typed(self.rng.choice(p.ECHO), "", v=text), text, "echo")

    def long_reply(self) -> Part:
        makers = (self.count, self.count, self.count_down, self.alphabet, self.story, self.story, self.joke, self.joke)
        return self.rng.choice(makers)()

    def count(self) -> Part:
        start = self.rng.choice((1, 1, self.rng.randint(1, 100)))
        end = start + self.rng.choice((self.rng.randint(1, 20), self.rng.randint(1, 100), self.rng.randint(50, 500)))
        template = self.rng.choice(p.COUNT_TO if start == 1 and self.rng.random() < 0.6 else p.COUNT)
        user = self.typed(template, a=str(start), b=str(end))
        if end > p.HIGHEST_COUNT:
            return Part(user, f"That is too far for me. I count to {p.HIGHEST_COUNT} at most.", "count far")
        return Part(user, ", ".join(map(str, range(start, end + 1))) + ".", "count")

    def count_down(self) -> Part:
        start = self.rng.randint(2, 60)
        short = self.rng.random() < 0.5
        end = 1 if short else self.rng.randint(1, start - 1)
        template = self.rng.choice(p.COUNT_DOWN_FROM if short else p.COUNT_DOWN)
        user = self.typed(template, a=str(end), b=str(start))
        return Part(user, ", ".join(map(str, range(start, end - 1, -1))) + ".", "count")

    def alphabet(self) -> Part:
        return Part(self.typed(self.rng.choice(p.ALPHABET)), " ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), "alphabet")

    def story(self) -> Part:
        """The stories in turn; the hero is whom the user asks for, else the user, else Mira."""
        if self.rng.random() < 0.4:
            hero = self.words.value("name") if self.rng.random() < 0.6 else "a " + self.words.value("animal")
            user = self.typed(self.rng.choice(p.STORY_ABOUT), v=hero)
        else:
            name = self.facts.get(("name", ("", "")))
            hero = name.value if name else p.HERO
            user = self.typed(self.rng.choice(p.STORY_MORE if self.stories and self.rng.random() < 0.6 else p.STORY))
        text = p.STORIES[self.stories % len(p.STORIES)].replace("{v}", hero)
        self.stories += 1
        return Part(user, text, "story")

    def joke(self) -> Part:
        self.jokes += 1
        return Part(self.typed(self.rng.choice(p.JOKE)), p.JOKES[(self.jokes - 1) % len(p.JOKES)], "joke")

    # Messages of parts

    def turn(self, part: Part) -> None:
        """Appends one user message and its reply."""
        self.messages.append(Message("user", part.user))
        self.messages.append(Message("assistant", part.reply, part.tag))

    def joined(self, first: Part, second: Part) -> Part:
        """Two parts in one message; the first must be closed for the second to begin."""
        user = first.user
        if user[-1] in ".!?":
            glue = " "
        else:
            glue = self.rng.choice((" and ", ", ", ". ", " and ", ", and "))
        opening = second.user
        if glue != " " and opening[:2] in ("My", "I ", "I'", "Wh", "Do", "Th", "Te", "Ho"):
            opening = opening if opening[0] == "I" else opening[0].lower() + opening[1:]
        return Part(user + glue + opening, f"{first.reply} {second.reply}", second.tag, second.is_question)

    def system(self) -> None:
        """An optional first message: plain, a persona, facts, or long filler with or without them."""
        rng, sentences = self.rng, []
        if rng.random() < 0.6:
            sentences.append(rng.choice(p.SYSTEM_SHORT))
        if rng.random() < 0.2:
            self.assistant_name = self.words.value("name").split()[0]
            sentences.append(rng.choice(p.PERSONA).replace("{v}", self.assistant_name).replace("you", "You", 1) + ".")
        facts = rng.choice((0, 0, 1, 2, 5)) if rng.random() < 0.5 else 0
        sentences.extend(self.system_fact() for _ in range(facts))
        if rng.random() < 0.35 or not sentences:
            sentences.extend(self.filler(1) for _ in range(rng.choice((1, 3, 10, 30, 70))))
            start = rng.randrange(2)
            rest = sentences[start:]
            rng.shuffle(rest)
            sentences[start:] = rest
        self.messages.append(Message("system", " ".join(sentences)))

    def system_fact(self) -> str:
        kind = self.draw_kind()
        while not kind.by_system:
            kind = self.draw_kind()
        key = self.keys.draw(kind.keys)
        if (kind.name, key.ident) in self.facts:
            return self.filler(1)
        value = self.value_for(kind, key)
        self.remember(kind, key, value)
        self.last_told = None
        said = re.sub(r"^my ", "the user's ", self.mention(key))
        text = self.rng.choice(kind.by_system).replace("{k}", said).replace("{v}", value)
        return (text if text.startswith(value) else text[0].upper() + text[1:]) + "."


@dataclass(frozen=True)
class Mood:
    """How often each action is taken in one stretch of a conversation."""

    weights: tuple[float, ...]

    @classmethod
    def draw(cls, rng: random.Random) -> "Mood":
        base = rng.choice(MOODS)
        return cls(tuple(w * rng.uniform(0.5, 1.5) for w in base))


ACTIONS: tuple[Callable[[Chat], Part], ...] = (
    Chat.tell, Chat.ask, Chat.ask_unknown, Chat.correct, Chat.meant, Chat.small_talk, Chat.unknown_talk, Chat.list_turn,
    Chat.who, Chat.check, Chat.like, Chat.note_turn, Chat.echo, Chat.long_reply, Chat.summary, Chat.forget_name,
)  # fmt: skip
MOODS: tuple[tuple[float, ...], ...] = (
    (30, 30, 12, 5, 3, 10, 6, 8, 4, 3, 2, 2, 2, 2.0, 1.0, 0.3),
    (60, 12, 5, 4, 4, 5, 2, 4, 1, 1, 2, 1, 1, 0.5, 0.5, 0.1),
    (6, 60, 25, 4, 1, 5, 3, 5, 8, 5, 2, 2, 1, 0.5, 1.5, 0.1),
    (4, 8, 3, 1, 0, 40, 25, 4, 1, 1, 1, 1, 4, 4.0, 0.3, 0.1),
    (8, 10, 3, 1, 0, 10, 10, 50, 1, 1, 5, 5, 2, 1.0, 0.3, 0.1),
)


def action(chat: Chat, mood: Mood) -> Part:
    """One random part of what the user says next."""
    return chat.rng.choices(ACTIONS, mood.weights)[0](chat)


def random_turn(chat: Chat, mood: Mood) -> None:
    """One turn; one in six says two things."""
    part = action(chat, mood)
    simple = len(part.reply) < 120 and not part.tag.startswith(("echo", "tell note", "unknown talk", "bye", "list add"))
    if simple and chat.rng.random() < 0.16:
        chat.last_told = None
        second = chat.rng.choice((chat.tell, chat.ask, chat.ask_unknown))()
        if chat.protected is None or second.tag.startswith("ask"):
            part = chat.joined(part, second)
    chat.turn(part)


def conversation(rng: random.Random, fits: Callable[[Chat], bool]) -> Chat:
    """A conversation that goes on for as long as `fits` says, through stretches of different moods."""
    chat = Chat.new(rng)
    if rng.random() < 0.4:
        chat.system()
    if rng.random() < 0.3:
        chat.turn(chat.greet())
    while fits(chat):
        mood = Mood.draw(rng)
        for _ in range(rng.choice((3, 8, 20, 50))):
            random_turn(chat, mood)
            if not fits(chat):
                break
    return chat
