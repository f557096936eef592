"""Values that people tell: real words, made-up words, numbers, and the rule that holds some of them out.

A made-up word or a number of three or more digits is *held out* when its checksum says so. Training never draws a
held-out one and evaluation draws nothing else, so a correct answer there was copied from the conversation.
"""

import random
import zlib
from collections.abc import Callable, Sequence


def spaced(text: str) -> list[str]:
    """The words of a table."""
    return text.split()


HELD_OUT_SHARE = 8
COMMON_SHARE = 0.25
ENDINGS = ("com", "org", "net", "de", "io")
COUNTS = spaced("one two three four five six seven eight nine ten eleven twelve no twenty many several")

COLOURS = spaced("""
    red blue green yellow orange purple pink brown black white grey teal turquoise violet crimson amber beige
    gold silver ivory magenta maroon navy olive scarlet cyan indigo lilac mint peach rose ruby rust sand coral
""")
FOODS = spaced("""
    pizza pasta rice bread soup cheese curry sushi salad noodles pancakes dumplings lasagne tacos stew porridge
    chocolate strawberries apples lentils risotto toast ramen waffles goulash falafel paella steak chips fish
""")
GOODS = spaced("""
    milk eggs bread butter cheese apples bananas rice pasta tea coffee sugar salt flour onions potatoes tomatoes
    soap candles batteries paper matches honey yoghurt carrots garlic lemons oil pepper beans spinach stamps
""")
DRINKS = spaced("tea coffee water lemonade cocoa milk cider juice espresso kombucha ginger beer")
ANIMALS = spaced("""
    dog cat horse owl fox otter whale rabbit parrot hamster turtle snake lizard wolf bear eagle dolphin penguin
    tiger lion hedgehog badger goat sheep pony duck goose frog spider ferret
""")
NAMES = spaced("""
    Anna Ben Clara David Emma Felix Grace Henry Ida James Kate Liam Maria Noah Olivia Paul Quinn Rosa Sam Tom
    Uma Vera Will Xena Yusuf Zoe Ada Bob Carl Dora Eric Fatima George Hugo Ines Jack Karl Lena Max Nina Oscar
    Peter Rex Sophie Theo Ursula Victor Wendy Alice Bella Charlie Daisy Luna Milo Coco Rocky Mohammed Chen Priya
    Olga Ivan Sarah John Mary Michael Laura Kevin Julia Mark Susan Lisa Alex Chris Kim
""")
CITIES = [
    *spaced("""
    London Paris Berlin Madrid Rome Vienna Oslo Lisbon Dublin Prague Warsaw Athens Helsinki Tokyo Delhi Cairo
    Lima Boston Chicago Toronto Sydney Lagos Nairobi Seoul Hamburg Munich Zurich Leeds York Bristol Seattle
    Austin Denver Porto Milan Naples Lyon Ghent
"""),
    "New York",
    "Cape Town",
    "San Diego",
    "Hong Kong",
    "Los Angeles",
]
JOBS = spaced("""
    baker teacher nurse doctor engineer farmer painter lawyer pilot carpenter plumber gardener chef writer actor
    musician librarian electrician student waiter designer programmer tailor mechanic sailor dentist
""")
HOBBIES = spaced("""
    chess tennis football knitting painting reading running swimming cycling hiking sailing fishing cooking
    gardening dancing singing skiing climbing yoga photography judo pottery archery rowing surfing
""")
THINGS = spaced("""
    drawer cupboard kitchen garage garden bathroom bedroom hall cellar attic fridge basket box bag car shed
    wardrobe desk sofa table bed shelf bench chair piano oven cabinet suitcase backpack office library jar bin
    tent windowsill doormat mailbox freezer pocket
""")
DAYS = spaced("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = spaced("January February March April May June July August September October November December")
TASKS = [
    task.strip()
    for line in """
    wash the car | call the bank | water the plants | book a flight | clean the kitchen | feed the cat | pay the rent
    buy a present | fix the bike | write a letter | walk the dog | do the laundry | empty the bin | return the books
    mow the lawn | paint the fence | sort the post | bake a cake | visit grandma | call mom | buy flowers
    clean windows | pay taxes | send invoices | call grandpa | renew my passport | charge the phone
    """.strip().splitlines()
    for task in line.split("|")
]

ONSETS = spaced("b br c ch d dr f fl g gl gr h j k kl kr l m n p pl pr qu r s sh sk sl sn st t th tr v w wh x y z zw")
VOWELS = spaced("a e i o u a e i o u ai ea ee ie oo ou y")
CODAS = ["", "", "", "", *spaced("b ck d g l ld lm lt m n nd ng nk nt p r rk rn rt s sh sk st t th x z")]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ALPHABETS = (
    "àáâãäåæçèéêëìíîïñòóôõöøùúûüýßšžčćđłńśźżőűğı",
    "абвгдежзийклмнопрстуфхцчшщыэюя",
    "αβγδεζηθικλμνξοπρστυφχψω",
    "日本語中文字東京山川水火木金土人大小高新春夏秋冬花鳥風月",
    "😀🎉🐱🐶🌟🍕🚀🌈🔥💡",
)


def is_held_out(word: str) -> bool:
    """Whether training must never see this made-up word or number, whatever its capitals."""
    return zlib.crc32(word.casefold().encode()) % HELD_OUT_SHARE == 0


class Words:
    """Draws values with one random generator, all from one side of the split."""

    def __init__(
        self, rng: random.Random, common: Sequence[str] = (), *, held_out: bool = False, real_share: float = 0.35
    ) -> None:
        self.rng = rng
        self.common = common
        self.held_out = held_out
        self.real_share = 0.0 if held_out else real_share
        self._makers: dict[str, Callable[[], str]] = {
            "name": self._name,
            "city": self._city,
            "colour": lambda: self._one_of(COLOURS, self.lower),
            "food": lambda: self._one_of(FOODS, self.phrase),
            "drink": lambda: self._one_of(DRINKS, self.lower),
            "animal": lambda: self._one_of(ANIMALS, self.lower),
            "goods": lambda: self._one_of(GOODS, self.item),
            "hobby": lambda: self._one_of(HOBBIES, self.lower),
            "task": lambda: self._one_of(TASKS, self.task),
            "job": self._job,
            "place": self._place,
            "when": self._when,
            "age": lambda: str(self.rng.randint(1, 99)),
            "small": lambda: self.number(1, 2),
            "several": self._several,
            "measure": self._measure,
            "email": lambda: f"{self._handle()}@{self._handle()}.{self.rng.choice(ENDINGS)}",
            "url": self._url,
            "count": lambda: self.rng.choice(COUNTS) if self.rng.random() < 0.5 else self.number(1, 3),
            "names": self._names,
            "number": lambda: self.number(1, 8),
            "code": self._code,
            "title": self._title,
            "address": self._address,
            "word": self.any_word,
        }

    def value(self, kind: str) -> str:
        """A value of one kind, such as `colour` or `number`."""
        return self._makers[kind]()

    def made_up(self) -> str:
        """A lower-case word that is in no dictionary, on this side of the split."""
        return self._on_this_side(lambda: self._syllables() if self.rng.random() < 0.75 else self._letters())

    def lower(self) -> str:
        return self.made_up()

    def any_word(self) -> str:
        """A made-up word in any of the shapes in which people write one."""
        draw = self.rng.random()
        if draw < 0.06 and self.common and not self.held_out:
            return self.rng.choice(self.common)
        if draw < 0.60:
            return self.made_up().capitalize()
        if draw < 0.84:
            return self.made_up()
        if draw < 0.90:
            return self.made_up().upper()
        if draw < 0.94:
            return self.made_up().capitalize() + self.rng.choice("-'") + self.made_up().capitalize()
        if draw < 0.97:
            return self.foreign()
        return "".join(self.rng.choice((c, c.upper())) for c in self.made_up())

    def number(self, shortest: int, longest: int) -> str:
        """A number of so many digits; the split applies from three digits on, and held-out ones have no fewer."""
        if self.held_out and longest > 2:
            shortest = max(shortest, 3)
        digits = self.rng.randint(shortest, longest)
        if digits < 3:
            return self._digits(digits)
        return self._on_this_side(lambda: self._digits(digits))

    def foreign(self) -> str:
        """A word with letters beyond a to z; the tokenizer falls back to bytes for them."""
        alphabet = self.rng.choice(ALPHABETS)
        stem = self._syllables() if self.rng.random() < 0.5 else ""
        word = self._on_this_side(lambda: stem + "".join(self.rng.choices(alphabet, k=self.rng.randint(1, 5))))
        return word.capitalize() if self.rng.random() < 0.5 else word

    def phrase(self) -> str:
        """One to three lower-case words."""
        return " ".join(self.made_up() for _ in range(self.rng.choice((1, 1, 1, 2, 2, 3))))

    def item(self) -> str:
        count = f"{self.rng.randint(2, 12)} " if self.rng.random() < 0.1 else ""
        return count + (self.made_up() if self.rng.random() < 0.85 else f"{self.made_up()} {self.made_up()}")

    def task(self) -> str:
        return f"{self.made_up()} {self.rng.choice(('the', 'a', 'my', ''))} {self.made_up()}".replace("  ", " ")

    def _on_this_side(self, make: Callable[[], str]) -> str:
        while True:
            word = make()
            if is_held_out(word) == self.held_out:
                return word

    def _digits(self, count: int) -> str:
        return "".join(self.rng.choices("0123456789", k=count))

    def _syllables(self) -> str:
        pick = self.rng.choice
        parts = [pick(ONSETS) + pick(VOWELS) + pick(CODAS) for _ in range(pick((1, 2, 2, 2, 3)))]
        return "".join(parts) if len(parts) > 1 or len(parts[0]) > 3 else parts[0] + pick(VOWELS)

    def _letters(self) -> str:
        return "".join(self.rng.choices(LETTERS, k=self.rng.randint(3, 10)))

    def _one_of(self, real: list[str], made_up: Callable[[], str]) -> str:
        """A real word of this kind, by chance any common word, else a made-up one."""
        if self.rng.random() >= self.real_share:
            return made_up()
        return self.rng.choice(self.common if self.common and self.rng.random() < COMMON_SHARE else real)

    def _name(self) -> str:
        first = self._one_of(NAMES, self.any_word)
        draw = self.rng.random()
        if draw < 0.03:
            return f"{self.rng.choice(('Dr', 'Mr', 'Mrs', 'Ms', 'Prof'))}{self.rng.choice(('.', ''))} {first}"
        return first if draw < 0.9 else f"{first} {self.made_up().capitalize()}"

    def _names(self) -> str:
        names = [self._one_of(NAMES, self.any_word) for _ in range(self.rng.choice((2, 2, 2, 3)))]
        return ", ".join(names[:-1]) + " and " + names[-1]

    def _city(self) -> str:
        draw = self.rng.random()
        if draw < self.real_share:
            return self.rng.choice(CITIES)
        prefix = self.rng.choice(("New ", "Port ", "Bad ", "Saint ", "El ")) if draw > 0.88 else ""
        return prefix + self.any_word()

    def _job(self) -> str:
        job = self._one_of(JOBS, self.lower)
        return ("an " if job[0] in "aeiou" else "a ") + job

    def _place(self) -> str:
        pick = self.rng.choice
        if self.rng.random() < 0.2:
            return pick((f"at {self.any_word()}'s house", f"in {self.any_word()}", f"at {self.any_word()}"))
        if self.rng.random() < 0.04:
            return f"on {self.lower()} {self.rng.randint(1, 9)}, {self.lower()} {self.rng.randint(1, 99)}"
        spot = pick(("in", "on", "under", "behind", "next to", "near", "inside", "on top of", "at"))
        colour = self._one_of(COLOURS, self.lower) + " " if self.rng.random() < 0.3 or self.held_out else ""
        return f"{spot} {pick(('the', 'the', 'the', 'my', 'a'))} {colour}{self._one_of(THINGS, self.lower)}"

    def _when(self) -> str:
        pick, draw = self.rng.choice, self.rng.random()
        hour = f"at {self.rng.randint(1, 12)}{pick((' am', ' pm', 'pm', ':30', ':15', ''))}"
        day = f"on {pick(DAYS)}"
        date = pick(
            (f"on the {self.rng.randint(1, 31)}th of {pick(MONTHS)}", f"on {pick(MONTHS)} {self.rng.randint(1, 31)}")
        )
        if draw < 0.5 or self.held_out:
            return f"{pick((day, date))} {hour}"
        other = (
            f"on {self.rng.randint(1, 31)} {pick(MONTHS)}",
            f"on {self.number(1, 2)}.{self.number(1, 2)}.{self.number(4, 4)}",
        )
        return pick((hour, day, date, *other, "tomorrow", "next week", f"in {pick(MONTHS)}", f"in {self.number(4, 4)}"))

    def _several(self) -> str:
        items = [self.rng.choice((self.lower, self.lower, self.any_word))() for _ in range(self.rng.choice((2, 2, 3)))]
        return ", ".join(items[:-1]) + " and " + items[-1]

    def _measure(self) -> str:
        pick = self.rng.choice
        unit = pick((" cm", " kg", " euros", " dollars", " metres", "%", " pounds", "", "k", " miles"))
        return f"{pick(('', '', '', '$'))}{self.number(1, 6)}{pick(('', '', '.' + self.number(1, 2)))}{unit}"

    def _handle(self) -> str:
        """The kind of word that addresses are made of."""
        second = self.rng.choice(("", "", ".", "-", "_"))
        return self.made_up() + (second + self.made_up() if second else self.rng.choice(("", "", self.number(1, 3))))

    def _url(self) -> str:
        path = self.rng.choice(
            ("", "", f"/{self.made_up()}", f"/{self.made_up()}?{self.rng.choice(LETTERS)}={self.number(1, 4)}")
        )
        return f"{self.rng.choice(('https://', 'www.', ''))}{self._handle()}.{self.rng.choice(ENDINGS)}{path}"

    def _code(self) -> str:
        draw = self.rng.random()
        if draw < 0.5:
            return self.number(3, 8)
        if draw < 0.65:
            return self.rng.choice("-/. ").join(self.number(3, 4) for _ in range(self.rng.randint(2, 3)))
        dash = self.rng.choice(("", "", "-"))
        return self._on_this_side(lambda: self._letters()[:4].upper() + dash + self._digits(self.rng.randint(2, 4)))

    def _title(self) -> str:
        if self.rng.random() < 0.4:
            return f"The {self.any_word()} {self.made_up().capitalize()}"
        return self.any_word()

    def _address(self) -> str:
        street = self.rng.choice(("Street", "Road", "Lane", "Avenue", "Square"))
        return f"{self.rng.randint(1, 250)} {self.any_word()} {street}"
