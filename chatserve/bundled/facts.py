"""The part of a conversation that is about facts: telling, asking, correcting, and what the right answer is."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from chatserve.bundled import phrases as p
from chatserve.bundled.keys import PERSONS, Key, Keys, Mention, pronoun, value_type
from chatserve.bundled.manner import Style, replied, sentence
from chatserve.bundled.words import Words

SUMMARY_LIMIT = 4
Ident = tuple[str, tuple[str, str]]
NAME: Ident = ("name", ("", ""))
KIND = {kind.name: kind for kind in p.KINDS}
KIND_WEIGHTS = [kind.weight for kind in p.KINDS]
COMMON = tuple(
    form
    for word in sorted({word for text in p.all_texts() for word in re.findall(r"[a-z]{4,}", text)} - p.STRUCTURE_WORDS)
    for form in (word, word, word.capitalize())
)


@dataclass(frozen=True)
class Message:
    """One message; `tag` names what a reply is about, for evaluation."""

    role: str
    text: str
    tag: str = ""


@dataclass(frozen=True)
class Part:
    """A piece of a user's message and the reply it deserves."""

    user: str
    reply: str
    tag: str


@dataclass
class Fact:
    """A fact as last told."""

    kind: p.Kind
    key: Key
    value: str
    asked: int = 0
    spoken_of: int = 0

    @property
    def ident(self) -> Ident:
        return self.kind.name, self.key.ident


@dataclass
class Facts:
    """What was told so far. Every method named after something people do makes a `Part`."""

    rng: random.Random
    words: Words
    style: Style
    keys: Keys
    messages: list[Message] = field(default_factory=list)
    facts: dict[Ident, Fact] = field(default_factory=dict)
    last_told: Fact | None = None
    last_asked: p.Kind | None = None
    open_question: tuple[int, p.Kind, Key] | None = None
    focus: tuple[int, str, str] | None = None
    protected: Fact | None = None
    far_sighted: int = 1

    @property
    def last_tag(self) -> str:
        return self.messages[-1].tag if self.messages else ""

    @property
    def chars(self) -> int:
        """How long the conversation is."""
        return sum(len(message.text) for message in self.messages)

    def typed(self, template: str, mark: str = ".", **slots: str) -> str:
        return self.style.typed(self.rng, template, mark, slots)

    # What is known

    def known(self) -> list[Fact]:
        """The facts that may be spoken of: all but the one that evaluation keeps for later."""
        return [fact for fact in self.facts.values() if fact is not self.protected]

    def aliases(self, owner: str) -> list[str]:
        """Other words for a person: "my sister" and Elena, once her name was told."""
        if owner.startswith("my "):
            named = self.facts.get(("named", ("", owner.removeprefix("my "))))
            return [named.value] if named else []
        same = [f for f in self.facts.values() if f.kind.name == "named" and f.value.casefold() == owner.casefold()]
        return ["my " + f.key.noun for f in same if not f.key.owner and owner]

    def find(self, kind: p.Kind, key: Key) -> Fact | None:
        """The fact with this key, whatever its owner is called."""
        for owner in (key.owner, *self.aliases(key.owner)):
            fact = self.facts.get((kind.name, (owner.casefold(), key.noun)))
            if fact:
                return fact
        return None

    def remember(self, kind: p.Kind, key: Key, value: str) -> Fact:
        fact = self.find(kind, key)
        if fact is None:
            fact = self.facts[kind.name, key.ident] = Fact(kind, key, value)
        fact.value, fact.asked, fact.spoken_of = value, 0, len(self.messages)
        self.last_told = fact
        return fact

    # Wording

    def mention(self, key: Key) -> Mention:
        """The key as the user says it now: "my keys" or "the keys", "my sister's dog" or "Elena's dog"."""
        rng, owner = self.rng, key.owner
        if key.bare:
            return Mention(key.noun, key.noun)
        if key.is_the:
            return Mention("the " + key.noun, replied("the " + key.noun))
        if owner:
            others = self.aliases(owner)
            owner = rng.choice(others) if others and rng.random() < 0.4 else owner
            owner = owner.lower() if rng.random() < self.style.casual * 0.3 else owner
            said = f"{owner}'s {key.noun}" if key.noun else owner
            return Mention(said, replied(said))
        if key.noun not in PERSONS and " my " not in key.noun and rng.random() < self.style.casual * 0.06:
            return Mention(key.noun, "your " + key.noun)
        draw = rng.random()
        said = f"{'the' if key.takes_the and draw < 0.4 else 'our' if draw > 0.96 else 'my'} {key.noun}"
        return Mention(said, replied(said))

    def plain(self, key: Key) -> str:
        """The key as the reply says it where the user did not."""
        if key.bare:
            return key.noun
        owner = key.owner + "'s" if key.owner and key.noun else key.owner or ("the" if key.is_the else "my")
        return replied(f"{owner} {key.noun}".strip())

    def or_pronoun(self, kind: p.Kind, mention: Mention, key: Key, template: str) -> Mention:
        """ "She" for a person whom the last turn was about, where the template allows it."""
        if kind.keys != "person" or "{k}'s" in template or "of {k}" in template:
            return mention
        if self.focus is None or self.focus[:2] != (len(self.messages), key.owner) or self.rng.random() < 0.5:
            return mention
        return Mention(pronoun(self.rng, key.owner), self.focus[2])

    def look_at(self, kind: p.Kind, key: Key, reply: str) -> None:
        """Notes whom the turn under way is about, and how the reply calls them."""
        if kind.keys == "person":
            self.focus = (len(self.messages) + 2, key.owner, reply)
        elif key.noun in PERSONS and not key.owner:
            self.focus = (len(self.messages) + 2, "my " + key.noun, "your " + key.noun)
        else:
            self.focus = None

    def clause(self, template: str, reply: str, kind: p.Kind, value: str) -> str:
        return template.replace("{r}", reply).replace("{w}", replied(value) if kind.values == "place" else value)

    def answer(self, fact: Fact, mention: Mention) -> str:
        return self.clause(fact.kind.clause, mention.reply, fact.kind, fact.value)

    def value_for(self, kind: p.Kind, key: Key) -> str:
        """A value that is nobody else's name."""
        value = self.words.value(value_type(kind, key))
        if kind.name == "named" and key.noun in p.RELATIONS and self.rng.random() < 0.3:
            value = self.rng.choice(self.keys.people)
        value = value.lower() if self.rng.random() < self.style.casual * 0.5 else value
        if kind.name == "named" and not self.name_is_free(key, value):
            return self.value_for(kind, key)
        return value

    def name_is_free(self, key: Key, name: str) -> bool:
        """Whether nothing told under the name and under the noun could now clash."""
        owners = {fact.key.owner.casefold() for fact in self.facts.values()}
        taken = {fact.value.casefold() for fact in self.facts.values() if fact.kind.name == "named"}
        both_told = name.casefold() in owners and ("my " + key.noun in owners or bool(key.owner))
        return not both_told and name.casefold() not in taken

    # Telling

    def draw_kind(self) -> p.Kind:
        return self.rng.choices(p.KINDS, KIND_WEIGHTS)[0]

    def tell(self) -> Part:
        """A new fact, or by chance an old key with another value."""
        draw = self.rng.random()
        if draw < 0.12 and not self.protected:
            return (
                self.compound() if draw < 0.09 else self.name_and_home() if draw < 0.105 else self.home_with_somebody()
            )
        kind = self.draw_kind()
        key = self.keys.draw(kind.keys)
        found = self.find(kind, key)
        if found is not None and (found is self.protected or self.renames(found)):
            return self.ask_unknown()
        return self.state(kind, key, self.value_for(kind, key))

    def renames(self, fact: Fact) -> bool:
        """Whether a new name would leave facts that were told under the old one."""
        return fact.kind.name == "named" and any(
            other.key.owner.casefold() == fact.value.casefold() for other in self.facts.values()
        )

    def state(self, kind: p.Kind, key: Key, value: str) -> Part:
        """The user's statement of a fact and its acknowledgement."""
        rng = self.rng
        template = self.tell_template(kind, key)
        owned = template in kind.owned
        mention = Mention("my " + key.noun, "your " + key.noun) if owned else self.mention(key)
        mention = self.or_pronoun(kind, mention, key, template)
        if template in p.HAS:
            mention = Mention(key.owner, self.plain(key))
        count = self.counted(key, value) if "{c}" in template else ""
        self.remember(kind, key, value)
        self.look_at(kind, key, mention.reply)
        if rng.random() < 0.22:
            template = f"{rng.choice(p.TELL_OPENERS)} {template}"
        if rng.random() < 0.08:
            template = f"{template} {rng.choice(p.TELL_CLOSERS)}".replace(" ,", ",")
        user = self.typed(template, rng.choice("...!"), k=mention.said, n=key.noun, v=value, c=count, a=mention.said)
        return Part(user, self.acknowledge(kind, mention.reply, value), "tell " + kind.name)

    def counted(self, key: Key, names: str) -> str:
        """How many names there are, which "I have two cats, Ada and Bo" tells as well."""
        several = names.count(",") + 2
        count = self.rng.choice((str(several), {2: "two", 3: "three"}[several]))
        self.remember(KIND["count of"], Key(noun=key.noun, bare=True), count)
        return count

    def tell_template(self, kind: p.Kind, key: Key) -> str:
        draw = self.rng.random()
        if kind.owned and not key.owner and draw < 0.4:
            return self.rng.choice(kind.owned)
        if kind.name == "named" and key.owner and draw < 0.3:
            return self.rng.choice(p.HAS)
        if kind.bare and key.noun in PERSONS and draw > 0.75:
            return self.rng.choice(kind.bare)
        return self.rng.choice(kind.tells)

    def acknowledge(self, kind: p.Kind, reply: str, value: str) -> str:
        if kind.name == "name":
            return f"Nice to meet you, {value.removesuffix('.')}."
        return f"Got it, {self.clause(kind.clause, reply, kind, value)}."

    def compound(self) -> Part:
        """Somebody's name and something else about them at once: "my sister Elena lives in Graz"."""
        rng, named = self.rng, KIND["named"]
        noun = rng.choice(p.RELATIONS if rng.random() < 0.75 else p.PETS)
        name, said, clause = rng.choice(p.COMPOUNDS)
        kind, person = KIND[name], Key(owner="my " + noun)
        known = self.find(named, Key(noun=noun))
        if known is not None or self.find(kind, person) is not None:
            return self.ask(known)
        called, value = self.value_for(named, Key(noun=noun)), self.value_for(kind, person)
        if self.find(kind, Key(owner=called)) is not None:
            return self.ask_unknown()
        self.remember(named, Key(noun=noun), called)
        self.remember(kind, person, value)
        self.look_at(kind, person, "your " + noun)
        template = rng.choice(p.COMPOUND_TELLS).replace("{c}", said).replace("{e}", pronoun(rng, "my " + noun))
        user = self.typed(template, k="my " + noun, n=noun, v=called, w=value)
        return Part(user, f"Got it, your {noun} {called} {clause.replace('{w}', value)}.", "tell compound")

    def name_and_home(self) -> Part:
        """ "I am Zorvin from Graz"."""
        name, home = self.words.value("name"), self.words.value("city")
        self.remember(KIND["name"], Key(), name)
        self.remember(KIND["home"], Key(), home)
        self.last_told = None
        user = self.typed(self.rng.choice(p.NAME_AND_HOME), v=name, c=home)
        return Part(
            user, f"{self.acknowledge(KIND['name'], '', name)} Got it, you live in {home}.", "tell name and home"
        )

    def home_with_somebody(self) -> Part:
        """ "I live in Graz with my sister Elena"."""
        key, named = Key(noun=self.rng.choice(p.RELATIONS)), KIND["named"]
        known = self.find(named, key)
        if known is not None:
            return self.ask(known)
        home, name = self.words.value("city"), self.value_for(named, key)
        self.remember(KIND["home"], Key(), home)
        self.remember(named, key, name)
        self.last_told = None
        user = self.typed(self.rng.choice(p.WITH_SOMEBODY), n=key.noun, v=name, c=home)
        return Part(
            user, f"Got it, you live in {home}. Got it, your {key.noun}'s name is {name}.", "tell home and name"
        )

    def announce(self) -> Part:
        """ "I have a dog", which makes the model ask for its name."""
        noun = self.rng.choice((*p.RELATIONS, *p.PETS, *p.PETS))
        key = Key(noun=noun)
        user = self.typed(self.rng.choice(p.ANNOUNCE), n=noun)
        known = self.find(KIND["named"], key)
        if known is not None:
            return self.ask_unknown() if known is self.protected else self.ask(known)
        self.open_question = (len(self.messages) + 2, KIND["named"], key)
        return Part(user, f"What is your {noun}'s name?", "announce")

    def supply(self) -> Part:
        """The answer to the model's own question, or to its "You have not told me"."""
        if self.open_question is None or self.open_question[0] != len(self.messages):
            return self.tell()
        _, kind, key = self.open_question
        if not kind.supply or self.find(kind, key) is not None:
            return self.tell()
        value = self.value_for(kind, key)
        mention = self.mention(key)
        self.remember(kind, key, value)
        self.look_at(kind, key, mention.reply)
        belonging = {"she": "her", "he": "his", "it": "its"}[pronoun(self.rng, "my " + (key.noun or "friend"))]
        user = self.typed(self.rng.choice(kind.supply), k=mention.said, v=value, q=belonging)
        return Part(
            user,
            self.acknowledge(kind, self.plain(key) if "{k}" not in user else mention.reply, value),
            "tell " + kind.name,
        )

    # Correcting

    def correct(self) -> Part:
        """A fact told before gets another value."""
        told = [fact for fact in self.known() if not self.renames(fact)]
        return self.change(self.rng.choice(told)) if told else self.tell()

    def meant(self) -> Part:
        """ "No, I meant X", right after a fact was told."""
        fact = self.last_told
        if fact is None or fact is self.protected or self.last_tag != "tell " + fact.kind.name or self.renames(fact):
            return self.correct()
        return self.change(fact, p.MEANT)

    def change(self, fact: Fact, templates: Sequence[str] = ()) -> Part:
        """The user's correction of one fact, and its acknowledgement."""
        rng, kind = self.rng, fact.kind
        value, old = self.value_for(kind, fact.key), fact.value
        if kind.name != "named" and old.isalpha() and rng.random() < 0.06:
            value = old + self.words.made_up()[:3]
        template = rng.choice(templates or kind.changes)
        if not templates and rng.random() < 0.5:
            template = f"{rng.choice(p.CHANGE_OPENERS)} {rng.choice(kind.tells)}"
        mention = self.mention(fact.key)
        place = " ".join(value.split()[1:]) if "{p}" in template else ""
        value = "at " + place if place else value
        self.remember(kind, fact.key, value)
        user = self.typed(template, k=mention.said, v=value, o=old, p=place)
        reply = self.plain(fact.key) if templates else mention.reply
        return Part(user, f"Understood, {self.clause(kind.now, reply, kind, value)}.", "correct " + kind.name)

    def forget_name(self) -> Part:
        """The one fact that can be taken back."""
        fact = self.facts.get(NAME)
        if fact is None or fact is self.protected:
            return self.ask_unknown()
        del self.facts[NAME]
        self.last_told = None
        return Part(self.typed(self.rng.choice(p.FORGET_NAME)), "I have forgotten your name.", "forget")

    # Asking

    def ask(self, fact: Fact | None = None) -> Part:
        """A question about a fact that was told, the less asked the likelier."""
        if fact is None:
            told = self.known()
            if not told:
                return self.ask_unknown()
            now = len(self.messages)
            weights = [(10 + now - f.spoken_of) ** self.far_sighted / (1 + 3 * f.asked) for f in told]
            fact = self.rng.choices(told, weights)[0]
        fact.asked += 1
        fact.spoken_of = len(self.messages)
        user, mention = self.question(fact.kind, fact.key)
        return Part(user, sentence(self.answer(fact, mention)), "ask " + fact.kind.name)

    def ask_unknown(self) -> Part:
        """A question about something nobody told."""
        while True:
            kind = self.draw_kind()
            key = self.unknown_key(kind)
            if self.find(kind, key) is None:
                break
        user, mention = self.question(kind, key)
        self.open_question = (len(self.messages) + 2, kind, key)
        return Part(user, f"You have not told me {kind.lacking.replace('{r}', mention.reply)}.", "unknown " + kind.name)

    def unknown_key(self, kind: p.Kind) -> Key:
        """Often close to something told: another owner of the same noun, another noun of the same owner."""
        key = self.keys.draw(kind.keys)
        near = self.rng.choice(list(self.facts.values())) if self.facts and self.rng.random() < 0.5 else None
        if near is None or near.kind is not kind or not key.noun or key.bare:
            return key
        return self.rng.choice((Key(near.key.owner, key.noun), Key(key.owner, near.key.noun)))

    def question(self, kind: p.Kind, key: Key) -> tuple[str, Mention]:
        """One of the ways to ask; a bare "and my brother?" only after a question of the same kind."""
        rng, mention, draw = self.rng, self.mention(key), self.rng.random()
        same = self.last_asked is kind and self.last_tag in ("ask " + kind.name, "unknown " + kind.name)
        self.last_asked = kind
        if same and key != Key() and not key.bare and draw < 0.15:
            return self.typed(rng.choice(p.FOLLOW_UPS), "?", k=mention.said), mention
        template = rng.choice(kind.indirect if draw < 0.3 else kind.asks)
        mention = self.or_pronoun(kind, mention, key, template)
        self.look_at(kind, key, mention.reply)
        return self.typed(self.dressed(template, indirect=draw < 0.3), "?", k=mention.said), mention

    def dressed(self, template: str, *, indirect: bool) -> str:
        """The question with what people put before and after it."""
        rng = self.rng
        if indirect:
            return f"{rng.choice(p.INDIRECT_OPENERS)} {template}"
        if rng.random() < 0.2:
            template = f"{rng.choice(p.ASK_OPENERS)} {template}"
        if rng.random() < 0.12:
            template = f"{template} {rng.choice(p.ASK_CLOSERS)}".replace(" ,", ",")
        return template

    def check(self) -> Part:
        """A yes-or-no question about a told fact."""
        told = self.known()
        if not told:
            return self.ask_unknown()
        fact = self.rng.choice(told)
        value = fact.value if self.rng.random() < 0.5 else self.other_value(fact)
        mention = self.mention(fact.key)
        user = self.typed(self.rng.choice(fact.kind.checks), "?", k=mention.said, v=value)
        return Part(user, f"{'Yes' if value == fact.value else 'No'}, {self.answer(fact, mention)}.", "check")

    def other_value(self, fact: Fact) -> str:
        same = [f.value for f in self.facts.values() if f.kind is fact.kind]
        return self.rng.choice(same) if self.rng.random() < 0.3 else self.words.value(value_type(fact.kind, fact.key))

    def who(self) -> Part:
        """The reverse question: whose name is this?"""
        named = [f for f in self.known() if f.kind.name == "named" and f.key.noun in PERSONS]
        fact = self.rng.choice(named) if named and self.rng.random() < 0.75 else None
        name = fact.value if fact else self.words.any_word()
        if any(f.value.casefold() == name.casefold() for f in self.facts.values() if f is not fact):
            return self.ask()
        user = self.typed(self.rng.choice(p.WHO_IS), "?", v=name)
        if fact is None:
            return Part(user, f"You have not told me who {name} is.", "unknown who")
        return Part(user, f"{name} is {self.plain(fact.key)}.", "who")

    def summary(self) -> Part:
        """What was told first, as it stands now."""
        if self.protected:
            return self.ask()
        user = self.typed(self.rng.choice(p.SUMMARY), "?")
        first = list(self.facts.values())[:SUMMARY_LIMIT]
        if not first:
            return Part(user, "You have not told me anything yet.", "unknown summary")
        clauses = (self.answer(fact, Mention("", self.plain(fact.key))) for fact in first)
        return Part(user, f"You told me this: {'; '.join(clauses)}.", "summary")
