"""Makes conversations: a `Chat` knows what it was told and so knows every right answer.

Nothing here is read from outside: all text comes from `phrases` and `words` and one random generator, so a seed gives
the same conversation for ever. `conversation` is what training uses; evaluation drives a `Chat` turn by turn.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from chatserve.bundled import phrases as p
from chatserve.bundled.facts import COMMON, NAME, Facts, Message, Part
from chatserve.bundled.keys import Keys
from chatserve.bundled.manner import Style, listing, replied
from chatserve.bundled.words import Words

LIST_LIMIT = 8
LIST_NAMES = {
    "shopping list": ("shopping list", "shopping list", "shopping list", "grocery list"),
    "to-do list": ("to-do list", "to-do list", "todo list", "to do list"),
}


def numbers(counted: range) -> str:
    return ", ".join(map(str, counted)) + "."


@dataclass
class Chat(Facts):
    """A conversation under way: facts, and lists, notes, small talk and long replies."""

    lists: dict[str, list[str]] = field(default_factory=dict)
    last_list: tuple[int, str] | None = None
    note: str = ""
    assistant_name: str = ""
    jokes: int = 0
    stories: int = 0

    @classmethod
    def new(cls, rng: random.Random, *, held_out: bool = False) -> "Chat":
        words = Words(rng, COMMON, held_out=held_out, real_share=rng.choice((0.1, 0.35, 0.6)))
        return cls(rng, words, Style.draw(rng), Keys(rng, words))

    # Lists, likes and notes

    def list_turn(self) -> Part:
        name = self.rng.choice(p.USER_LISTS)
        if self.follows_list() and self.last_list and self.rng.random() < 0.7:
            name = self.last_list[1]
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

    def follows_list(self, name: str = "") -> bool:
        """Whether the last turn was about a list, or about this one."""
        return (
            self.last_list is not None and self.last_list[0] == len(self.messages) and name in ("", self.last_list[1])
        )

    def list_typed(
        self, name: str, templates: tuple[str, ...], short: tuple[str, ...], mark: str = ".", value: str = ""
    ) -> str:
        """A wish about a list: short right after another one, "my list" where only one can be meant."""
        if self.follows_list(name) and self.rng.random() < 0.5:
            templates = short
        self.last_list = (len(self.messages) + 2, name)
        others = [other for other in p.USER_LISTS if other != name and self.lists.get(other)]
        only = not others and (self.lists.get(name) or name == p.USER_LISTS[0])
        said = "list" if only and self.rng.random() < 0.3 else self.rng.choice(LIST_NAMES[name])
        return self.typed(self.rng.choice(templates), mark, v=value, l=said)

    def list_add(self, name: str, items: list[str]) -> Part:
        new = self.new_items("goods" if name == p.USER_LISTS[0] else "task", items)
        if not new:
            return self.list_show(name)
        user = self.list_typed(name, p.LIST_ADD, p.LIST_ADD_SHORT, value=listing(new))
        items.extend(new)
        return Part(user, f"I have added {listing(new)} to your {name}.", "list add")

    def new_items(self, kind: str, items: list[str]) -> list[str]:
        count = min(self.rng.choice((1, 1, 1, 2, 3)), LIST_LIMIT - len(items))
        drawn = {self.words.value(kind): None for _ in range(count)}
        return [item for item in drawn if item not in items]

    def list_remove(self, name: str, items: list[str]) -> Part:
        item = self.rng.choice(items)
        user = self.list_typed(name, p.LIST_REMOVE, p.LIST_REMOVE_SHORT, value=item)
        items.remove(item)
        return Part(user, f"I have removed {item} from your {name}.", "list remove")

    def list_show(self, name: str) -> Part:
        items = self.lists.get(name, [])
        user = self.list_typed(name, p.LIST_SHOW, p.LIST_SHOW_SHORT, "?")
        reply = f"Your {name}: {listing(items)}." if items else f"Your {name} is empty."
        return Part(user, reply, "list" if items else "list empty")

    def like(self) -> Part:
        items = self.lists.setdefault("likes", [])
        if len(items) < 5 and self.rng.random() < 0.5:
            thing = self.words.value(self.rng.choice(("food", "hobby", "drink")))
            if thing not in items:
                items.append(thing)
                return Part(
                    self.typed(self.rng.choice(p.LIKE_TELL), v=thing), f"Got it, you like {thing}.", "tell like"
                )
        user = self.typed(self.rng.choice(p.LIKE_ASK), "?")
        reply = f"You like {listing(items)}." if items else "You have not told me what you like."
        return Part(user, reply, "likes" if items else "unknown like")

    def note_turn(self) -> Part:
        if self.rng.random() < 0.5:
            self.note = self.free_text(8)
            return Part(self.typed(self.rng.choice(p.NOTE_TELL), "", v=self.note), "I will remember that.", "tell note")
        user = self.typed(self.rng.choice(p.NOTE_ASK), "?")
        reply = f"You asked me to remember this: {self.note}" if self.note else "You have not given me a note."
        return Part(user, reply, "note" if self.note else "unknown note")

    def free_text(self, most: int) -> str:
        """A few words, real ones and made-up ones, as somebody might dictate."""
        rng = self.rng
        drawn = [
            self.words.any_word() if rng.random() < 0.4 else rng.choice(p.FILLER_WORDS)
            for _ in range(rng.randint(1, most))
        ]
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
        if draw < 0.34 or (self.last_tag == "tell name" and draw < 0.5):
            return self.your_name()
        if (
            draw < 0.37
            and self.messages
            and self.messages[-1].role == "assistant"
            and len(self.messages[-1].text) < 150
        ):
            return Part(self.typed(self.rng.choice(p.AGAIN), "?"), self.messages[-1].text, "again")
        texts, reply = self.rng.choice(p.SMALL_TALK)
        return Part(self.typed(self.rng.choice(texts), self.rng.choice(".!?")), reply, "small talk")

    def greet(self) -> Part:
        return Part(
            self.typed(self.rng.choice(p.GREETINGS), self.rng.choice("!.")),
            self.addressed("Hello") + " How can I help?",
            "greet",
        )

    def addressed(self, word: str) -> str:
        fact = self.facts.get(NAME)
        return f"{word}, {fact.value}." if fact else f"{word}."

    def your_name(self) -> Part:
        if self.rng.random() < 0.2:
            self.assistant_name = self.words.value("name").split()[-1]
            user = self.typed(self.rng.choice(p.CALL_YOU), v=self.assistant_name)
            return Part(user, f"All right, my name is {self.assistant_name}.", "call you")
        asks = p.YOURS if self.last_tag == "tell name" and self.rng.random() < 0.7 else p.YOUR_NAME
        return self.tell_own_name(asks)

    def tell_own_name(self, asks: tuple[str, ...]) -> Part:
        reply = (
            f"My name is {self.assistant_name}."
            if self.assistant_name
            else "I am the small model that comes with chatserve."
        )
        return Part(self.typed(self.rng.choice(asks), "?"), reply, "your name")

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
        if self.rng.random() < 0.15:
            word = self.rng.choice(list(p.NUMBER_WORDS))
            return Part(
                self.typed(self.rng.choice(p.COUNT_TO), b=word), numbers(range(1, p.NUMBER_WORDS[word] + 1)), "count"
            )
        start = self.rng.choice((1, 1, self.rng.randint(1, 100)))
        end = start + self.rng.choice((self.rng.randint(1, 20), self.rng.randint(1, 100), self.rng.randint(50, 500)))
        template = self.rng.choice(p.COUNT_TO if start == 1 and self.rng.random() < 0.6 else p.COUNT)
        user = self.typed(template, a=str(start), b=str(end))
        if end > p.HIGHEST_COUNT:
            return Part(user, f"That is too far for me. I count to {p.HIGHEST_COUNT} at most.", "count far")
        return Part(user, numbers(range(start, end + 1)), "count")

    def count_down(self) -> Part:
        start = self.rng.randint(2, 60)
        short = self.rng.random() < 0.5
        end = 1 if short else self.rng.randint(1, start - 1)
        template = self.rng.choice(p.COUNT_DOWN_FROM if short else p.COUNT_DOWN)
        user = self.typed(template, a=str(end), b=str(start))
        return Part(user, numbers(range(start, end - 1, -1)), "count")

    def alphabet(self) -> Part:
        return Part(self.typed(self.rng.choice(p.ALPHABET)), " ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), "alphabet")

    def story(self) -> Part:
        """The stories in turn; the hero is whom the user asks for, else the user, else Mira."""
        if self.rng.random() < 0.45:
            hero, name = self.hero()
            user = self.typed(self.rng.choice(p.STORY_ABOUT), v=hero)
        else:
            fact = self.facts.get(NAME)
            hero = name = fact.value if fact else p.HERO
            user = self.typed(self.rng.choice(p.STORY_MORE if self.stories and self.rng.random() < 0.6 else p.STORY))
        text = p.STORIES[self.stories % len(p.STORIES)].replace("{v}", replied(hero), 1).replace("{v}", name)
        self.stories += 1
        return Part(user, text, "story")

    def hero(self) -> tuple[str, str]:
        """Whom a story is about, at first and from then on."""
        rng, name = self.rng, self.words.value("name")
        animal = rng.choice(("a ", "the ", "a little ", "an old ", "a brave ")) + self.words.value("animal")
        called = rng.choice(("called", "named")), name
        heroes = (name, name), (name, name), (animal, animal), (f"{animal} {' '.join(called)}", name)
        mine = "my " + rng.choice((*p.RELATIONS, *p.PETS))
        return rng.choice((*heroes, (mine, replied(mine)), (self.words.value("animal"),) * 2))

    def joke(self) -> Part:
        self.jokes += 1
        return Part(self.typed(self.rng.choice(p.JOKE)), p.JOKES[(self.jokes - 1) % len(p.JOKES)], "joke")

    # Messages of parts

    def turn(self, part: Part) -> None:
        """Appends one user message and its reply."""
        self.messages.append(Message("user", part.user))
        self.messages.append(Message("assistant", part.reply, part.tag))

    def joined(self, first: Part, second: Part) -> Part:
        """Two parts in one message; the first is closed by its own mark or by the glue."""
        user, opening = first.user, second.user
        if user[-1] in ".!?":
            space = "\n" if self.rng.random() < 0.06 else " "
            return Part(f"{user}{space}{opening}", f"{first.reply} {second.reply}", second.tag)
        glue = self.rng.choice((" and ", ", ", ". ", " and ", ", and "))
        if glue != ". " and opening.split()[0] in p.SENTENCE_OPENINGS:
            opening = opening[0].lower() + opening[1:]
        return Part(user + glue + opening, f"{first.reply} {second.reply}", second.tag)

    def system(self) -> None:
        """An optional first message: plain, a persona, facts, or long filler with or without them."""
        rng, sentences = self.rng, []
        if rng.random() < 0.6:
            sentences.append(rng.choice(p.SYSTEM_SHORT))
        if rng.random() < 0.2:
            self.assistant_name = self.words.value("name").split()[-1]
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
        if self.find(kind, key) is not None:
            return self.filler(1)
        value = self.value_for(kind, key)
        mention = self.mention(key)
        self.remember(kind, key, value)
        self.last_told = None
        said = re.sub(r"\bmy ", "the user's ", mention.said)
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


ANSWERED = {False: 0.12, True: 0.7}
UNJOINABLE = ("echo", "tell note", "unknown talk", "bye", "list add", "again", "announce", "story", "count")
ACTIONS: tuple[Callable[[Chat], Part], ...] = (
    Chat.tell, Chat.ask, Chat.ask_unknown, Chat.correct, Chat.meant, Chat.small_talk, Chat.unknown_talk, Chat.list_turn,
    Chat.who, Chat.check, Chat.like, Chat.note_turn, Chat.echo, Chat.long_reply, Chat.summary, Chat.forget_name,
    Chat.announce,
)  # fmt: skip
EXAM = (2, 80, 10, 2, 0, 2, 1, 2, 5, 2, 1, 1, 0, 0.2, 2.0, 0.0, 0.0)
MOODS: tuple[tuple[float, ...], ...] = (
    (30, 30, 12, 5, 3, 10, 6, 8, 4, 3, 2, 2, 2, 2.0, 1.0, 0.3, 1.0),
    (60, 12, 5, 4, 4, 5, 2, 4, 1, 1, 2, 1, 1, 0.5, 0.5, 0.1, 1.0),
    (6, 60, 25, 4, 1, 5, 3, 5, 8, 5, 2, 2, 1, 0.5, 1.5, 0.1, 1.0),
    (4, 18, 4, 1, 0, 32, 18, 4, 1, 1, 1, 1, 4, 4.0, 0.3, 0.1, 1.0),
    (8, 10, 3, 1, 0, 10, 10, 50, 1, 1, 5, 5, 2, 1.0, 0.3, 0.1, 1.0),
)


def action(chat: Chat, mood: Mood) -> Part:
    """One random part of what the user says next."""
    return chat.rng.choices(ACTIONS, mood.weights)[0](chat)


def random_turn(chat: Chat, mood: Mood) -> None:
    """One turn; one in six says two or three things, and an open question is often answered."""
    rng = chat.rng
    if (
        chat.open_question
        and chat.open_question[0] == len(chat.messages)
        and rng.random() < ANSWERED[chat.last_tag == "announce"]
    ):
        chat.turn(chat.supply())
        return
    part = action(chat, mood)
    while joinable(part) and rng.random() < 0.16:
        chat.last_told = chat.open_question = chat.focus = None
        part = chat.joined(part, follow_up(chat, part))
    chat.turn(part)


def joinable(part: Part) -> bool:
    """Whether more can be said in the same message without doubt where this part ends."""
    return len(part.reply) < 120 and not part.tag.startswith(UNJOINABLE)


def follow_up(chat: Chat, part: Part) -> Part:
    """What else the user says in the same message."""
    if part.tag == "tell name" and chat.rng.random() < 0.15:
        return chat.tell_own_name(p.YOURS)
    shy = chat.protected is not None and chat.protected.kind.name == "name"
    return chat.rng.choice((chat.tell, chat.ask, chat.ask_unknown, chat.ask if shy else chat.small_talk))()


def conversation(rng: random.Random, chars: int) -> Chat:
    """A conversation of at least so many characters, through stretches of different moods.

    Half of them end in questions, the oldest facts first, so that a long one asks far back.
    """
    chat = Chat.new(rng)
    chat.far_sighted = rng.choice((0, 1, 2, 3))
    if rng.random() < 0.4:
        chat.system()
    if rng.random() < 0.3:
        chat.turn(chat.greet())
    examined = chars * (rng.uniform(0.3, 0.9) if rng.random() < 0.5 else 1.0)
    while chat.chars < chars:
        mood = Mood(EXAM) if chat.chars > examined else Mood.draw(rng)
        for _ in range(rng.choice((3, 8, 20, 50))):
            random_turn(chat, mood)
            if chat.chars >= chars:
                break
    return chat
