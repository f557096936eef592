"""What people say to the model and what it answers, as tables.

`KINDS` are the kinds of fact. In their templates `{k}` is the key as the user says it ("my sister"), `{r}` as the
reply says it ("your sister"), `{v}` the value and `{w}` the value in the reply. User templates are written lower-case
without a final mark; `manner` makes them formal or casual. The phrases of a group are paraphrases of each other.
"""

from dataclasses import dataclass


def rows(text: str) -> tuple[str, ...]:
    """The phrases of a table written one or several a line, parted by `|`."""
    return tuple(part.strip() for line in text.strip().splitlines() for part in line.split("|") if part.strip())


@dataclass(frozen=True)
class Kind:
    """One kind of fact: how it is told, asked for and answered.

    `keys` names the rule in `keys.Keys` that draws the key; `indirect` completes "do you remember ..."; `lacking`
    completes "You have not told me ..."; `now` is the clause after a correction; `changes` are corrections, where `{o}`
    is the old value and `{p}` a place without its preposition; `owned` needs "my" and the bare noun `{n}`; `bare` fits
    people and pets only; `supply` answers "You have not told me", where `{q}` is "his", "her" or "its".
    """

    name: str
    keys: str
    values: str
    tells: tuple[str, ...]
    asks: tuple[str, ...]
    indirect: tuple[str, ...]
    checks: tuple[str, ...]
    clause: str
    now: str
    lacking: str
    weight: float = 1.0
    by_system: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    owned: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    supply: tuple[str, ...] = ()


RELATIONS = rows("""
    sister | brother | mother | father | mum | dad | friend | best friend | wife | husband | boss | neighbour | teacher
    son | daughter | aunt | uncle | cousin | grandmother | grandfather | colleague | girlfriend | boyfriend | roommate
    niece | nephew | doctor | partner | older sister | younger brother | manager | coach | landlord | baby | twin
""")
PETS = rows("""
    dog | cat | parrot | hamster | rabbit | horse | goldfish | turtle | snake | lizard | pony | goat | kitten | puppy
    pet | hedgehog | bird | fish | guinea pig | ferret | duck | donkey | frog | spider | pig
""")
NAMED_THINGS = rows("boat | ship | car | band | robot | teddy | village | bike | plant | doll")
FAVOURITES: dict[str, str] = {
    "colour": "colour", "food": "food", "animal": "animal", "number": "number", "city": "city", "song": "title",
    "book": "title", "film": "title", "movie": "title", "drink": "drink", "sport": "hobby", "word": "word",
    "game": "title", "fruit": "food", "place": "city", "band": "title", "dish": "food", "flower": "colour",
    "country": "city", "singer": "name", "writer": "name", "teacher": "name", "snack": "food", "dessert": "food",
    "car": "word", "toy": "word", "tree": "word", "subject": "hobby", "hobby": "hobby", "restaurant": "title",
    "ice cream": "food", "planet": "word", "artist": "name", "cheese": "food", "language": "word", "shop": "word",
}  # fmt: skip
CODES: dict[str, str] = {
    "door code": "code", "phone number": "number", "pin": "number", "locker number": "number", "alarm code": "code",
    "account number": "number", "room number": "number", "flight number": "code", "gate number": "small",
    "bus number": "number", "postcode": "code", "licence plate": "code", "wifi password": "code",
    "zip code": "number", "house number": "number", "order number": "number", "ticket number": "code",
    "safe code": "number", "code": "number", "serial number": "code", "seat number": "code", "access code": "number",
    "booking code": "code", "bike lock code": "number", "membership number": "number", "password": "word",
    "secret word": "word", "code word": "word", "wifi name": "word", "locker code": "code", "phone": "number",
    "safe combination": "code", "price": "measure", "rent": "measure", "salary": "measure", "size": "measure",
    "table number": "small", "lucky number": "number", "shoe size": "small", "height": "measure", "weight": "measure",
    "extension": "number", "project number": "code", "case number": "code", "budget": "measure", "score": "number",
}  # fmt: skip
TEXTS: dict[str, str] = {
    "hobby": "hobby", "school": "word", "nickname": "word", "middle name": "name", "surname": "name",
    "last name": "name", "street": "title", "address": "address", "hotel": "title", "bank": "word", "team": "word",
    "username": "word", "home town": "city", "hometown": "city", "language": "word", "native language": "word",
    "instrument": "word", "star sign": "word", "first name": "name", "car model": "word", "operating system": "word",
    "laptop model": "word", "project": "title", "company": "word", "airline": "word", "next stop": "city",
    "destination": "city", "main dish": "food", "religion": "word", "major": "hobby", "email": "email",
    "email address": "email", "website": "url", "twitter": "word", "gym": "word", "wifi": "word", "club": "word",
    "course": "word", "country": "city", "station": "word", "brand": "word", "plan": "word", "goal": "word",
    "dream": "food",
}  # fmt: skip
SEVERAL = rows("""
    cats | dogs | sisters | brothers | kids | children | daughters | sons | friends | parents | parrots | rabbits
    horses | fish | hamsters | cousins | chickens
""")
FAVOURITES_MANY = rows("""
    favourite foods | favourite colours | favourite animals | favourite books | hobbies | languages | favourite games
    favourite drinks | favourite films | favourite sports | favourite numbers | favourite songs | interests
    favourite cities | subjects
""")
STATES = rows("""
    allergic to | afraid of | interested in | good at | bad at | married to | scared of | tired of | proud of | a fan of
    engaged to | related to | working on
""")
OF_NOUNS = rows("""
    capital | king | queen | president | colour | price | leader | language | owner | captain | size | author
    currency | mayor | river | symbol | height | code | director
""")
COUNTED = (
    *SEVERAL,
    *rows("""
        cars | bikes | books | cups | plants | phones | houses | boats | guitars | chairs | tickets | windows
        computers
    """),
)
VERBS = rows("""
    study | speak | play | drive | teach | collect | drink | read | grow | sell | build | write | paint | cook
    prefer | own | watch
""")
ADJECTIVES = rows(
    "old | new | red | blue | big | little | second | other | spare | black | white | small | good | green"
)
SECRETS = rows("password | code | pin | number | key code | login | combination | name | date | price | address")
COLOURED = rows("""
    car | bike | house | door | coat | hat | shirt | umbrella | scarf | bag | phone | kitchen | sofa | boat | jacket
    dress | room | roof | van | mug | fence | carpet | bicycle | backpack | t-shirt | front door | office
""")
OBJECTS = rows("""
    key | umbrella | passport | wallet | phone | ring | map | ladder | hammer | camera | ticket | book | letter
    torch | charger | violin | remote | coat | hat | watch | box | bag | report | laptop | spare key | bike | cake
    parcel | tape | notebook | drill | flute | pen | car | suitcase | ball | medicine | money | treasure | rope | lamp
    cookie jar
""")
OBJECTS_MANY = rows("""
    keys | glasses | gloves | shoes | scissors | tickets | boots | headphones | batteries | documents | matches | pliers
    car keys | cards | candles | socks | tools | books | cookies | spare keys | sunglasses | photos | papers | stamps
""")
EVENTS = rows("""
    meeting | exam | wedding | appointment | flight | concert | interview | party | birthday | dentist appointment
    trip | lesson | train | lecture | holiday | dinner | match | deadline | delivery | call | anniversary | game
    presentation
""")

KINDS: tuple[Kind, ...] = (
    Kind(
        "name", "none", "name",
        tells=rows("""
            my name is {v} | i am {v} | i'm {v} | call me {v} | you can call me {v} | they call me {v} | the name is {v}
            my name's {v} | {v} is my name | {v} here | this is {v} | people call me {v} | i am called {v} | i go by {v}
            name's {v} | everyone calls me {v} | please call me {v}
        """),
        asks=rows("""
            what is my name | what's my name | who am i | what am i called | say my name | my name | what was my name
            what do people call me | which name did i tell you | how am i called | what did i say my name was
            do you know who i am | do you remember me | do you know me | i wonder if you recall my name
            how do i call myself | by what name do you know me | my name is what | i am called what
            any idea what my name is | guess my name
        """),
        indirect=rows("my name | what my name is | what i am called | who i am"),
        checks=rows("is my name {v} | am i {v} | am i called {v}"),
        clause="your name is {w}", now="your name is {w}", lacking="your name", weight=3.0,
        by_system=rows("the user's name is {v} | the user is called {v} | you are talking to {v}"),
        changes=rows("""
            i changed my name to {v} | my name is now {v} | my new name is {v} | my name is not {o}, it's {v}
            i'm not {o}, i'm {v}
        """),
        supply=rows("{v} | it's {v} | it is {v} | i am {v} | i'm {v} | {v} is my name | my name is {v}"),
    ),
    Kind(
        "named", "named", "name",
        tells=rows("""
            {k} is called {v} | {k}'s name is {v} | {k} is named {v} | the name of {k} is {v} | we call {k} {v}
            {v} is the name of {k} | i call {k} {v} | {k} goes by {v}
        """),
        bare=rows("{k} is {v} | {v} is {k} | {k} is {v} | {k} {v}"),
        asks=rows("""
            what is {k} called | what is {k}'s name | what's {k}'s name | what is the name of {k} | who is {k}
            who's {k} | how is {k} called | what did i call {k} | what was {k}'s name | {k}'s name
            what do we call {k} | what was {k} called | what's the name of {k} | what's {k} called
            what name does {k} have | {k} is called what | could you say how {k} is named | i want {k}'s name from you
            give the name of {k} | {k}'s name is what | any idea what {k} is called | which name does {k} have
            the name of {k}
        """),
        indirect=rows("{k}'s name | what {k} is called | the name of {k} | what {k}'s name is | who {k} is"),
        checks=rows("is {k} called {v} | is {k}'s name {v} | is {v} the name of {k}"),
        clause="{r}'s name is {w}", now="{r}'s name is now {w}", lacking="{r}'s name", weight=5.0,
        by_system=rows("{k} is called {v} | {k}'s name is {v} | the name of {k} is {v}"),
        changes=rows("""
            {k} is now called {v} | i renamed {k} to {v} | {k}'s name is now {v} | {k} is not called {o} but {v}
            {k}'s name is not {o}, it's {v} | {k} isn't called {o}, {k} is called {v}
        """),
        supply=rows("""
            {v} | it's {v} | it is {v} | the name is {v} | called {v} | {v}, of course | {q} name is {v}
            {q} is called {v}
        """),
        owned=rows("""
            i have a {n} called {v} | i have a {n} named {v} | i've got a {n} called {v}
            i got a {n}, its name is {v} | i have a {n}, her name is {v} | i have a {n}, his name is {v}
            i own a {n} called {v} | i have a {n} and her name is {v} | we have a {n} called {v}
            we have a {n}. its name is {v} | i have a {n}. his name is {v} | i have a {n}. her name is {v}
            i have a {n} whose name is {v} | there is also my {n} {v} | i have a {n}, {v} | meet my {n} {v}
        """),
    ),
    Kind(
        "attribute", "attribute", "by key",
        tells=rows("""
            {k} is {v} | {k} is {v} | {k} is {v} | {v} is {k} | {k}: {v} | {k} = {v} | {k} would be {v}
            i'd say {k} is {v} | you should know that {k} is {v} | as for {k}, it is {v} | {k} happens to be {v}
            i think {k} is {v}
        """),
        asks=rows("""
            what is {k} | what is {k} | what's {k} | what's {k} | {k} | what was {k} | what did i say {k} was
            give me {k} | which one is {k} | what is {k} again | say {k} | what did i tell you about {k}
            what would be {k} | {k} is what | any idea what {k} might be | what have i given as {k}
            i asked you to keep {k}, what is it | {k}, what was it | could you give me {k} | i need {k} | {k} please
            show me {k} | look up {k} | what do you have for {k}
        """),
        indirect=rows("{k} | what {k} is | what {k} was"),
        checks=rows("is {k} {v} | is {v} {k} | would {k} be {v}"),
        clause="{r} is {w}", now="{r} is now {w}", lacking="{r}", weight=8.0,
        by_system=rows("{k} is {v} | note that {k} is {v} | {v} is {k}"),
        changes=rows("""
            {k} is now {v} | {k} has changed to {v} | i changed {k} to {v} | the new value of {k} is {v}
            {k} became {v} | {k} is not {o}, it is {v} | {k} is not {o} but {v} | {k} isn't {o}, it's {v}
            {k} is no longer {o} but {v}
        """),
        supply=rows("""
            {v} | it's {v} | it is {v} | its {v} | that's {v} | i think it's {v} | well, it is {v} | {k} is {v}
        """),
    ),
    Kind(
        "age", "none", "age",
        tells=rows("""
            i am {v} years old | i'm {v} years old | my age is {v} | i turned {v} | i am {v} | i'm {v} | i am aged {v}
        """),
        asks=rows("how old am i | what is my age | what's my age | my age | how many years old am i | what age am i"),
        indirect=rows("how old i am | my age | what my age is"),
        checks=rows("am i {v} years old | am i {v} | is my age {v}"),
        clause="you are {w} years old", now="you are now {w} years old", lacking="how old you are", weight=0.8,
        by_system=rows("the user is {v} years old"),
        changes=rows("i am now {v} | i just turned {v} | i'm {v} years old now"),
    ),
    Kind(
        "age of", "person", "age",
        tells=rows("{k} is {v} years old | {k} is {v} | {k} turned {v} | {k}'s age is {v} | {k} is aged {v}"),
        asks=rows("how old is {k} | what is {k}'s age | what's {k}'s age | {k}'s age | what age is {k}"),
        indirect=rows("how old {k} is | {k}'s age"),
        checks=rows("is {k} {v} years old | is {k} {v} | is {k}'s age {v}"),
        clause="{r} is {w} years old", now="{r} is now {w} years old", lacking="how old {r} is", weight=0.7,
        by_system=rows("{k} is {v} years old"),
        changes=rows("{k} is now {v} | {k} just turned {v} | {k} is {v} years old now"),
    ),
    Kind(
        "home", "none", "city",
        tells=rows("""
            i live in {v} | my home is in {v} | i come from {v} | i'm from {v} | i am from {v} | i am living in {v}
            home for me is {v} | we live in {v} | i live over in {v} | my house is in {v} | i'm based in {v}
            i reside in {v} | i live in the city of {v}
        """),
        asks=rows("""
            where do i live | which city do i live in | what city do i live in | where am i from | where is my home
            where do i come from | where am i living | where's my home | what town do i live in | where am i based
            i live where | in which place do i live | what is the town where i live | where do we live
            what is my city | which town am i from | my city
        """),
        indirect=rows("where i live | which city i live in | where my home is | where i am from"),
        checks=rows("do i live in {v} | am i from {v} | is my home in {v}"),
        clause="you live in {w}", now="you now live in {w}", lacking="where you live", weight=2.0,
        by_system=rows("the user lives in {v} | the user comes from {v}"),
        changes=rows("i moved to {v} | i now live in {v} | i have moved to {v} | i live in {v} now"),
        supply=rows("in {v} | {v} | it's {v} | i live in {v}"),
    ),
    Kind(
        "home of", "person", "city",
        tells=rows("""
            {k} lives in {v} | {k} is from {v} | {k} comes from {v} | {k}'s home is in {v} | {k} is living in {v}
        """),
        asks=rows("""
            where does {k} live | where is {k} from | which city does {k} live in | where does {k} come from
            where is {k}'s home | {k} lives where | in which town does {k} live | what is the home of {k}
            what city is {k} in
        """),
        indirect=rows("where {k} lives | which city {k} lives in | where {k} is from"),
        checks=rows("does {k} live in {v} | is {k} from {v}"),
        clause="{r} lives in {w}", now="{r} now lives in {w}", lacking="where {r} lives", weight=2.0,
        by_system=rows("{k} lives in {v}"),
        changes=rows("{k} moved to {v} | {k} now lives in {v} | {k} has moved to {v}"),
    ),
    Kind(
        "job", "none", "job",
        tells=rows("""
            i work as {v} | i'm working as {v} | i am {v} by trade | i earn my living as {v} | i am {v} | i'm {v}
            my job: {v}
        """),
        asks=rows("""
            what is my job | what's my job | what do i do for a living | what do i work as | what do i do | my job
        """),
        indirect=rows("what my job is | my job | what i work as | what i do for a living"),
        checks=rows("do i work as {v} | am i {v}"),
        clause="you are {w}", now="you are now {w}", lacking="your job",
        by_system=rows("the user works as {v}"),
        changes=rows("i now work as {v} | i became {v} | i work as {v} now"),
    ),
    Kind(
        "job of", "person", "job",
        tells=rows("{k} works as {v} | {k} is {v} | {k} is {v} by trade | {k} earns a living as {v}"),
        asks=rows("""
            what is {k}'s job | what's {k}'s job | what does {k} do for a living | what does {k} work as
            what does {k} do | what is {k} by trade
        """),
        indirect=rows("what {k}'s job is | {k}'s job | what {k} works as"),
        checks=rows("does {k} work as {v} | is {k} {v}"),
        clause="{r} is {w}", now="{r} is now {w}", lacking="{r}'s job",
        by_system=rows("{k} works as {v}"),
        changes=rows("{k} now works as {v} | {k} became {v}"),
    ),
    Kind(
        "employer", "none", "word",
        tells=rows("i work at {v} | i work for {v} | i'm employed by {v} | my employer is {v} | my office is at {v}"),
        asks=rows("""
            where do i work | who do i work for | who is my employer | what company do i work for
            where am i employed
        """),
        indirect=rows("where i work | who i work for | who my employer is"),
        checks=rows("do i work at {v} | do i work for {v}"),
        clause="you work at {w}", now="you now work at {w}", lacking="where you work",
        by_system=rows("the user works at {v}"),
        changes=rows("i now work at {v} | i work for {v} now"),
    ),
    Kind(
        "place", "object", "place",
        tells=rows("""
            {k} is {v} | {k} is {v} | i put {k} {v} | i left {k} {v} | you can find {k} {v} | {k} lies {v}
            i keep {k} {v} | {k} can be found {v} | i have hidden {k} {v} | we keep {k} {v} | i placed {k} {v}
            {k} was {v} | i parked {k} {v} | i forgot {k} {v}
        """),
        asks=rows("""
            where is {k} | where is {k} | where's {k} | where did i put {k} | where can i find {k}
            where did i leave {k} | where do i keep {k} | where can {k} be found | where was {k} | i can't find {k}
            where did i hide {k} | {k} is where | in what place is {k} | where would i look for {k}
            what is the place of {k} | have you seen {k} | i am looking for {k} | where could {k} be
        """),
        indirect=rows("where {k} is | where i put {k} | where i left {k} | where to find {k} | where {k} was"),
        checks=rows("is {k} {v} | did i put {k} {v}"),
        clause="{r} is {w}", now="{r} is now {w}", lacking="where {r} is", weight=2.5,
        by_system=rows("{k} is {v}"),
        changes=rows("""
            {k} is now {v} | i moved {k}, it is now {v} | i put {k} {v} now | i moved {k} to {p} | i took {k} to {p}
        """),
    ),
    Kind(
        "places", "objects", "place",
        tells=rows("""
            {k} are {v} | {k} are {v} | i put {k} {v} | i left {k} {v} | you can find {k} {v} | {k} lie {v}
            i keep {k} {v} | {k} can be found {v} | i have hidden {k} {v} | we keep {k} {v} | i placed {k} {v}
            {k} were {v}
        """),
        asks=rows("""
            where are {k} | where are {k} | where did i put {k} | where can i find {k} | where did i leave {k}
            where do i keep {k} | where can {k} be found | where were {k} | i can't find {k} | where did i hide {k}
            {k} are where | in what place are {k} | where would i look for {k} | what is the place of {k}
            have you seen {k} | i am looking for {k} | where could {k} be
        """),
        indirect=rows("where {k} are | where i put {k} | where i left {k} | where to find {k} | where {k} were"),
        checks=rows("are {k} {v} | did i put {k} {v}"),
        clause="{r} are {w}", now="{r} are now {w}", lacking="where {r} are", weight=2.0,
        by_system=rows("{k} are {v}"),
        changes=rows("""
            {k} are now {v} | i moved {k}, they are now {v} | i put {k} {v} now | i moved {k} to {p}
            i took {k} to {p}
        """),
    ),
    Kind(
        "colour of", "coloured", "colour",
        tells=rows("""
            {k} is {v} | i painted {k} {v} | the colour of {k} is {v} | {k} has the colour {v} | {k} is all {v}
        """),
        asks=rows("""
            what colour is {k} | which colour is {k} | what is the colour of {k} | what colour does {k} have
            what's the colour of {k} | in what colour is {k} | {k} is of what colour | {k} is what colour
        """),
        indirect=rows("what colour {k} is | the colour of {k}"),
        checks=rows("is {k} {v} | is the colour of {k} {v}"),
        clause="{r} is {w}", now="{r} is now {w}", lacking="what colour {r} is", weight=1.2,
        by_system=rows("{k} is {v}"),
        changes=rows("""
            {k} is now {v} | i painted {k} {v} now | the colour of {k} is now {v} | {k} is not {o}, it is {v}
            {k} isn't {o} but {v}
        """),
        supply=rows("{v} | it's {v} | it is {v} | all {v}"),
    ),
    Kind(
        "time", "event", "when",
        tells=rows("""
            {k} is {v} | {k} takes place {v} | {k} starts {v} | {k} will be {v} | {k} has been set for {v}
            i have {k} {v}
        """),
        asks=rows("""
            when is {k} | when's {k} | when does {k} take place | when does {k} start | when will {k} be
            what time is {k}
        """),
        indirect=rows("when {k} is | when {k} starts | when {k} takes place"),
        checks=rows("is {k} {v}"),
        clause="{r} is {w}", now="{r} is now {w}", lacking="when {r} is", weight=1.2,
        by_system=rows("{k} is {v}"),
        changes=rows("{k} is now {v} | {k} was moved, it is now {v} | {k} has been moved and is now {v}"),
        supply=rows("{v} | it is {v} | it's {v}"),
    ),
    Kind(
        "likes of", "person", "food",
        tells=rows("{k} likes {v} | {k} loves {v} | {k} really likes {v} | {k} is fond of {v}"),
        asks=rows("what does {k} like | what does {k} love | what is {k} fond of | what did i say {k} likes"),
        indirect=rows("what {k} likes | what {k} loves"),
        checks=rows("does {k} like {v} | does {k} love {v}"),
        clause="{r} likes {w}", now="{r} now likes {w}", lacking="what {r} likes",
        by_system=rows("{k} likes {v}"),
        changes=rows("{k} now likes {v} | {k} likes {v} now"),
    ),
    Kind(
        "named many", "several", "names",
        tells=rows("""
            {k} are called {v} | {k} are named {v} | the names of {k} are {v} | {k} are {v} | we call {k} {v}
            {v} are {k}
        """),
        asks=rows("""
            what are {k} called | what are the names of {k} | what are {k}' names | who are {k} | how are {k} called
            what did i call {k}
        """),
        indirect=rows("what {k} are called | the names of {k} | who {k} are"),
        checks=rows("are {k} called {v}"),
        clause="{r} are called {w}", now="{r} are now called {w}", lacking="what {r} are called", weight=1.2,
        by_system=rows("{k} are called {v}"),
        changes=rows("{k} are now called {v} | i renamed {k} to {v}"),
        owned=rows("""
            i have {c} {n}, {v} | i have {n} called {v} | i have some {n}, {v} | i have {n} named {v}
            i've got {c} {n}, {v} | i have {c} {n} called {v} | i have {c} {n}: {v} | i have {n}, their names are {v}
            i have {c} {n}, {v} | i got {c} {n}, {v} | we have {c} {n}, {v} | i have {c} {n} called {v}
            i have {c} {n}: {v} | i have {c} {n} named {v}
        """),
        supply=rows("{v} | they are called {v} | they're called {v} | their names are {v}"),
    ),
    Kind(
        "attributes", "favourites", "several",
        tells=rows("{k} are {v} | {k} are {v} | {v} are {k} | {k}: {v} | i'd say {k} are {v} | i think {k} are {v}"),
        asks=rows("""
            what are {k} | what are {k} | which are {k} | {k} | what were {k} | what did i say {k} were | {k} are what
            give me {k}
        """),
        indirect=rows("{k} | what {k} are | what {k} were"),
        checks=rows("are {k} {v}"),
        clause="{r} are {w}", now="{r} are now {w}", lacking="{r}", weight=1.2,
        by_system=rows("{k} are {v}"),
        changes=rows("{k} are now {v} | i changed {k} to {v}"),
        supply=rows("{v} | they are {v} | they're {v}"),
    ),
    Kind(
        "am", "state", "word",
        tells=rows("i am {k} {v} | i'm {k} {v} | i am {k} {v} | i am really {k} {v} | i'm {k} {v}, you know"),
        asks=rows("what am i {k} | what am i {k} | what did i say i am {k} | {k} what am i | i am {k} what"),
        indirect=rows("what i am {k} | what i'm {k}"),
        checks=rows("am i {k} {v}"),
        clause="you are {r} {w}", now="you are now {r} {w}", lacking="what you are {r}", weight=1.0,
        by_system=rows("the user is {k} {v}"),
        changes=rows("i am now {k} {v} | i am {k} {v} now"),
        supply=rows("{v} | i am {k} {v}"),
    ),
    Kind(
        "count of", "counted", "count",
        tells=rows("""
            i have {v} {k} | i've got {v} {k} | i own {v} {k} | there are {v} {k} at my home | we have {v} {k}
        """),
        asks=rows("""
            how many {k} do i have | how many {k} have i got | how many {k} do i own | how many {k} did i say i have
        """),
        indirect=rows("how many {k} i have | how many {k} i own"),
        checks=rows("do i have {v} {k}"),
        clause="you have {w} {r}", now="you now have {w} {r}", lacking="how many {r} you have", weight=1.2,
        by_system=rows("the user has {v} {k}"),
        changes=rows("i now have {v} {k} | i have {v} {k} now"),
        supply=rows("{v} | i have {v} | i have {v} {k}"),
    ),
    Kind(
        "does", "verb", "word",
        tells=rows("i {k} {v} | i {k} {v} | i always {k} {v} | i usually {k} {v} | i mostly {k} {v} | we {k} {v}"),
        asks=rows("what do i {k} | what do i {k} | what did i say i {k} | what do i usually {k}"),
        indirect=rows("what i {k} | what i usually {k}"),
        checks=rows("do i {k} {v}"),
        clause="you {r} {w}", now="you now {r} {w}", lacking="what you {r}", weight=1.5,
        by_system=rows("the user {k}s {v}"),
        changes=rows("i now {k} {v} | i {k} {v} now"),
        supply=rows("{v} | i {k} {v}"),
    ),
)  # fmt: skip

COMPOUNDS: tuple[tuple[str, str, str], ...] = (
    ("home of", "lives in {w}", "lives in {w}"),
    ("home of", "is from {w}", "lives in {w}"),
    ("age of", "is {w} years old", "is {w} years old"),
    ("age of", "is {w}", "is {w} years old"),
    ("job of", "works as {w}", "is {w}"),
    ("job of", "is {w}", "is {w}"),
    ("likes of", "likes {w}", "likes {w}"),
    ("likes of", "loves {w}", "likes {w}"),
)
HAS = rows("""
    {a} has a {n} called {v} | {a} has a {n} named {v} | {a} got a {n} called {v} | {a} has a {n}, {v}
    {a} has a {n} and its name is {v}
""")
WITH_SOMEBODY = rows("""
    i live in {c} with my {n} {v} | my {n} {v} and i live in {c} | i live with my {n} {v} in {c}
    we live in {c}, my {n} {v} and i
""")
COMPOUND_TELLS = rows("""
    i have a {n}, {v}, who {c} | we have a {n} called {v} who {c} | {k} is called {v}, who {c}
    i have a {n} named {v} who {c} | {k}, called {v}, {c} | {k} {v} {c} | {k}, {v}, {c}
    {k} is called {v} and {e} {c} | {k}'s name is {v} and {e} {c} | i have a {n} called {v}, {e} {c}
    {k} is {v} and {e} {c} | {k} {v} {c} | i have a {n} called {v} and {e} {c} | {v} is {k}, {e} {c}
    {k} is named {v} and {e} {c}
""")
NAME_AND_HOME = rows("""
    i am {v} from {c} | i'm {v} from {c} | my name is {v} from {c} | {v} from {c} here | i'm {v}, i live in {c}
    this is {v} from {c}
""")
ANNOUNCE = rows("""
    i have a {n} | i've got a {n} | i got a {n} | i have a new {n} | did you know that i have a {n} | we have a {n}
    yes, i have a {n} | i own a {n} | guess what, i have a {n}
""")
YOURS = rows("""
    and you | and yours | what's yours | what is yours | what about you | and what is your name | what is your name
    and who are you
""")
AGAIN = rows("""
    say that again | repeat that | can you repeat that | come again | what did you say | please repeat that
    once more please | again please | what was that | repeat your answer
""")
LIST_REMOVE_SHORT = rows(
    "remove {v} | take {v} off | delete {v} | cross out {v} | remove {v} again | take {v} off it | remove {v} from it"
)
LIST_SHOW_SHORT = rows(
    "show it | read it | what is on it | what's on it | show it to me | read it to me | what is on it now"
)
WHO_IS = rows("""
    who is {v} | who's {v} | who was {v} | do you know who {v} is | do you remember {v} | remind me who {v} is
    tell me who {v} is
""")

TELL_OPENERS = rows("""
    hi, | hello, | hey, | by the way, | ok so | just so you know, | please remember: | fyi | remember that | note that
    oh, | also, | well, | so, | please note that | remember: | i want you to know that | did you know that
    one more thing: | good morning, | hi! | keep in mind that | for your information, | and | listen,
    here is a fact: | don't forget that | i should mention that | btw | let me tell you that | yes, | thanks. | ok,
    great. | haha, | another thing: | true, but
""")
TELL_CLOSERS = rows("""
    , ok | :) | , remember that | , please remember it | , by the way | , you know | btw | , just so you know
    , don't forget
""")
ASK_OPENERS = rows("""
    hi, | hey, | please tell me: | quick question: | so | and | ok, | tell me, | can you tell me: | now | excuse me,
    ok so | well, | by the way, | sorry, | one question: | just checking: | remember? | hmm, | thanks. | tell me:
    great, | ok now | hello, | let me test you: | i forgot. | quiz: | wait, | btw
""")
ASK_CLOSERS = rows("""
    , please | please | again | , do you remember | , can you tell me | , do you know | , remind me | now | , i forgot
    , by the way | then
""")
INDIRECT_OPENERS = rows("""
    do you remember | tell me | can you tell me | do you know | i forgot | remind me | please tell me
    could you tell me | i forgot, can you tell me | do you still know | i would like to know | can you remember
    i want to know | remind me, | do you still remember | can you remind me | please remind me | have you any idea
    you know | i can't remember | let me know
""")
FOLLOW_UPS = rows("and {k} | what about {k} | how about {k} | and what about {k} | and for {k}")
CHANGE_OPENERS = rows("""
    actually, | no, wait, | sorry, | correction: | i changed my mind, | no, | wait, | update: | oops, | i was wrong,
    i made a mistake, | i lied,
""")
MEANT = rows("""
    no, i meant {v} | i meant {v} | sorry, i meant {v} | actually {v} | no, {v} | sorry, {v} | wait, no, {v}
    oops, {v} | i mean {v} | correction: {v} | no wait, it's {v} | it's now {v} | make that {v} | actually, it is {v}
    i meant to say {v} | not that, {v}
""")

USER_LISTS = ("shopping list", "to-do list")
LIST_ADD = rows("""
    add {v} to my {l} | put {v} on my {l} | please add {v} to my {l} | add {v} to the {l} | can you add {v} to my {l}
    put {v} on the {l} | {v} should go on my {l} | i need {v} on my {l} | my {l} needs {v} | also add {v} to my {l}
    add "{v}" to my {l} | i need to put {v} on my {l}
""")
LIST_ADD_SHORT = rows("add {v} | also {v} | also add {v} | and add {v} | please add {v} | put {v} on it | add {v} too")
LIST_SHOW = rows("""
    what is on my {l} | what's on my {l} | show my {l} | read my {l} | my {l} | tell me what is on my {l}
    show me my {l} | what is on the {l} | read me my {l} | list my {l} | what do i have on my {l}
    what did i put on my {l} | which things are on my {l}
""")
LIST_REMOVE = rows("""
    remove {v} from my {l} | take {v} off my {l} | delete {v} from my {l} | cross {v} off my {l}
    remove {v} from the {l} | please remove {v} from my {l} | i don't need {v} on my {l} anymore | mark {v} as done
    {v} is done | mark {v} as done on my {l} | i already have {v}, take it off my {l}
""")
LIST_CLEAR = rows("""
    clear my {l} | empty my {l} | delete my {l} | clear the {l} | start a new {l} | forget my {l} | make a {l}
    i need you to make a {l} | can you make a {l} | create a {l} | make me a {l} | i need a {l}
    remove everything from my {l}
""")
LIKE_TELL = rows("""
    i like {v} | i love {v} | i really like {v} | i also like {v} | i enjoy {v} | i am fond of {v}
    {v} is something i like | i like {v} a lot
""")
LIKE_ASK = rows("""
    what do i like | what things do i like | what do i love | tell me what i like | what did i say i like
    do you know what i like | list what i like | what do i enjoy
""")
NOTE_TELL = rows("""
    remember this: {v} | please remember this: {v} | note this down: {v} | take a note: {v} | make a note: {v}
    keep this in mind: {v} | memorise this: {v}
""")
NOTE_ASK = rows("""
    what did i ask you to remember | what was the note | read me the note | what is the note
    what did i want you to remember | my note | tell me the note | what did you note down | what note did i give you
    repeat the note
""")
ECHO = rows("""
    repeat after me: {v} | say: {v} | repeat: {v} | please say: {v} | please repeat: {v} | say this: {v} | echo: {v}
    repeat this: {v} | say {v} | repeat {v} | say "{v}" | repeat "{v}"
""")
CALL_YOU = rows("""
    i will call you {v} | your name is {v} | i'll call you {v} | i name you {v} | can i call you {v}
    let me call you {v} | from now on you are {v} | your name is now {v}
""")
YOUR_NAME = rows("""
    what is your name | what's your name | do you have a name | your name | what should i call you | tell me your name
    and your name | how are you called | what are you called | who are you | who am i talking to | who is this
    what do i call you | what's ur name | and who are you | who r you | may i ask your name
""")
PERSONA = rows("""
    you are {v} | your name is {v} | you are called {v} | you are {v}, a helpful assistant
    you are {v}, a friendly chat model | your name is {v} and you are polite
""")
SUMMARY = rows("""
    what do you know about me | what did i tell you | what have i told you | tell me what you know about me
    list what i told you | what do you remember | what do you remember about me | tell me about me
    tell me everything you know | what have i told you so far | what do you know | do you remember what i told you
    summarise what i told you | what facts do you know
""")
FORGET_NAME = rows("forget my name | please forget my name | delete my name")
COUNT = rows("""
    count from {a} to {b} | count from {a} to {b} please | please count from {a} to {b}
    can you count from {a} to {b} | count {a} to {b} | count up from {a} to {b} | list the numbers from {a} to {b}
    numbers from {a} to {b} | say the numbers from {a} to {b}
""")
COUNT_TO = rows(
    "count to {b} | please count to {b} | can you count to {b} | count up to {b} | count until {b} | count till {b}"
)
NUMBER_WORDS = {
    "three": 3, "five": 5, "ten": 10, "twelve": 12, "fifteen": 15, "twenty": 20, "thirty": 30, "forty": 40,
    "fifty": 50, "a hundred": 100, "one hundred": 100,
}  # fmt: skip
COUNT_DOWN = rows("count down from {b} to {a} | count from {b} down to {a} | count backwards from {b} to {a}")
COUNT_DOWN_FROM = rows("count down from {b} | countdown from {b} | count backwards from {b} | do a countdown from {b}")
HIGHEST_COUNT = 200
ALPHABET = rows("""
    recite the alphabet | say the alphabet | what is the alphabet | tell me the alphabet | abc | the alphabet
    list the letters of the alphabet | can you recite the alphabet | do you know the alphabet | give me the alphabet
    recite the abc | say the abc | write the alphabet
""")
STORY = rows("""
    tell me a story | tell a story | can you tell me a story | a story please | story | tell me a bedtime story
    i want a story | i want to hear a story | please tell me a story | do you know a story | write a story
    make up a story | write me a story | tell me a short story | tell me a long story
""")
STORY_MORE = rows("""
    tell me another story | another story | another one | one more story | tell me a different story
    another story please | more stories
""")
STORY_ABOUT = rows("""
    tell me a story about {v} | tell a story about {v} | a story about {v} | write a story about {v}
    can you tell me a story about {v} | story about {v}
""")
STORIES = (
    "Once upon a time there was {v}. Every morning {v} walked down to the sea and looked for a boat that nobody "
    "had ever seen. One day a small blue boat came out of the fog. There was no one in it, only a lamp and a "
    "letter. The letter said: follow the light. So {v} took the lamp, stepped into the boat, and the wind carried "
    "them far away, past three islands and a sleeping whale. On the last island stood a tower without a door. {v} "
    "held up the lamp, and the wall opened. Inside sat an old woman who smiled and said: I have waited a hundred "
    "years for someone who can read. {v} read to her all night, and in the morning the sea was calm. Then {v} "
    "sailed home, and the lamp still burns in the window today.",
    "A long time ago, in a village under a hill, lived {v}. The village had a clock that had stopped, and since "
    "then nobody knew when to get up. {v} climbed the hill to ask the owl. The owl said: bring me a song that I do "
    "not know. {v} sang about rain, about bread, and about the moon, but the owl knew them all. Then {v} sang "
    "about the clock, and the owl opened one eye. That one is new, said the owl, and gave {v} a golden key. {v} "
    "ran back, turned the key twice, and the clock began to tick. Everyone woke up at once and made breakfast. "
    "Since that day {v} winds the clock every evening, and the owl comes to listen.",
    "Far in the north there was a forest where it was always winter. {v} lived there in a house made of wood and "
    "snow. One night someone knocked at the door. It was a fox with a broken lantern. {v} let the fox in, made "
    "soup, and mended the lantern with a piece of string. The fox said: three wishes are too many, but one is just "
    "right. {v} thought for a long time and wished for spring. In the morning the first green leaf grew beside the "
    "door. The next day there were ten, then a hundred, and at last the whole forest was green. The fox was never "
    "seen again, but every spring {v} hangs a lantern in the oldest tree.",
)
HERO = "Mira"
JOKE = rows("""
    tell me a joke | joke | do you know a joke | a joke please | make me laugh | can you tell me a joke | tell a joke
    know any jokes | say something funny | another joke | tell me another joke | one more joke
    tell me something funny | got any jokes
""")
JOKES = (
    "Why did the page go to the doctor? It had lost its number.",
    "What do you call a fish without an eye? A fsh.",
    "Why was the cache so calm? It had seen it all before.",
    "Why do bees hum? They have forgotten the words.",
)

GREETINGS = rows("""
    hi | hello | hey | good morning | good evening | good afternoon | hi there | hello there | hey there | hiya
    howdy | greetings | yo | hallo | hi bot | hello bot | hello again | hi again | hey you | morning | heya
    hi friend | hello my friend | helo | hii | hellooo | good day | sup
""")
GOODBYES = rows("""
    bye | goodbye | good bye | see you | see you later | good night | bye bye | i have to go | cya | see you tomorrow
    talk to you later | farewell | i am leaving | gotta go | until next time | have a nice day | i must go now
    that's all | that is all for now | take care | night
""")

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (rows("""
        how are you | how are you doing | how are you today | how is it going | how's it going | are you ok
        how do you do | what's up | are you well | how are things | how have you been | how r u | everything ok
        you ok | how's life | how was your day | wassup | are you fine
    """),
     "I am fine, thank you. How are you?"),
    (rows("""
        i am fine | i'm fine | fine | i am good | i'm good, thanks | i am well | pretty good | not bad | i'm ok
        i am doing well | very well | all good | fine, and you | i am great | good thanks | i'm doing great | me too
        i am happy | i feel good | i had a good day
    """),
     "I am glad to hear that."),
    (rows("""
        i am sad | i'm sad | i feel bad | i am tired | i'm tired | i had a bad day | i am sick | not so good
        i feel lonely | i'm not well | i am angry | i am stressed | i feel terrible | i'm depressed | i am unhappy
        i have a headache | i am worried | i'm scared
    """),
     "I am sorry to hear that. I hope it gets better soon."),
    (rows("""
        thanks | thank you | thank you very much | thanks a lot | thx | many thanks | ty | thank u | cheers
        that helps | thanks for your help | great, thanks | thank you so much | ok thanks | perfect, thank you
        appreciate it
    """),
     "You are welcome."),
    (rows("""
        ok | okay | alright | fine by me | i see | got it | sure | right | cool | nice | great | good | perfect | wow
        interesting | hmm | lol | haha | well | k | oh | awesome | amazing | good to know | yes | no | yep | nope
        maybe | yeah | not really | of course | that's right | correct | exactly | true | really | fair enough
        that is nice | sounds good | very good | no problem | never mind | whatever | oh well | understood | all right
    """),
     "All right."),
    (rows("""
        well done | good job | you are great | you're smart | that was right | good answer | you are nice | nice work
        you are funny | good bot | impressive | you're the best | clever | you are amazing | that's correct, well done
        i like you | i love you | you have a good memory | great memory
    """),
     "Thank you, that is kind."),
    (rows("""
        you are stupid | that is wrong | you're wrong | bad bot | you are dumb | that's not right | wrong
        you are useless | that's false | you suck | i hate you | this is boring | you're annoying | shut up | nonsense
        that makes no sense
    """),
     "I am sorry. Please tell me again, and I will remember it."),
    (rows("""
        nice to meet you | pleased to meet you | nice meeting you | glad to meet you | good to see you
        nice to see you | great to meet you | nice to meet you too
    """),
     "Nice to meet you too."),
    (rows("""sorry | i am sorry | my bad | excuse me | pardon | i apologise | oops | sorry about that | forgive me"""),
     "No problem at all."),
    (rows("""
        what can you do | help | what can i ask you | can you help me | help me | how can you help me | what do you do
        how does this work | what are you good at | what should i say | what can i do here | i need help
        how do i use you | what do you want to know | what now | what are your skills | give me an example
        can i ask you something | let's talk | what shall we talk about
    """),
     "Tell me facts, such as names, colours, numbers or where things are, and ask me later. I also keep lists, "
     "count, recite the alphabet and tell stories."),
    (rows("""
        are you human | are you a robot | are you real | are you an ai | what are you | are you a person
        are you a bot | are you alive | are you a computer | are you chatgpt | are you siri | are you alexa
        are you gpt | are you a chatbot | are you a machine | what model are you | tell me about yourself
        introduce yourself | describe yourself | say something about yourself | who or what are you
        are you a language model | what kind of model are you | are you intelligent
    """),
     "I am a very small language model that comes with chatserve. I remember what you tell me in this chat."),
    (rows("""
        who made you | who created you | who built you | where do you come from | who trained you
        who is your creator | how were you made | where are you from | who programmed you | who are your parents
    """),
     "I come with chatserve. A script trained me on made-up conversations."),
    (rows("""
        how old are you | what is your age | when were you born | when is your birthday | how big are you
        where do you live | are you married | do you have friends | do you have a family
        what is your favourite colour | what is your favourite food | do you like music | do you sleep | do you eat
        do you dream | do you have feelings | are you happy | do you like me | do you love me | are you tired
        what do you like | what is your hobby | do you have a dog | do you have pets | what's your favourite movie
        are you a man or a woman | do you get bored | can you feel
    """),
     "I am only a small program, so I have no life of my own. Tell me about yours."),
    (rows("""
        what time is it | what day is it | what is the date | what's the date today | what time is it now
        what year is it | what's the time | do you know the time | which day is today | what month is it
    """),
     "I have no clock, so I do not know."),
    (rows("""
        how is the weather | what is the weather like | will it rain | is it raining | what's the weather
        is it sunny | it is raining | it's cold today | nice weather today | it is hot | weather
        will it snow tomorrow
    """),
     "I cannot see the weather from here."),
    (rows("""
        i am bored | i'm bored | talk to me | say something | tell me something | entertain me | let's play a game
        tell me something interesting | i don't know what to say | do something | can we play
    """),
     "I can tell you a story or a joke. Or tell me something about yourself."),
    (rows("""
        do you remember what i said | do you have a memory | will you remember this | can you remember things
        will you forget me | how long do you remember | do you forget | is your memory good | can you keep a secret
        how good is your memory | do you remember everything | can you remember | can you remember things for me
        can you remember something for me | i want you to remember something | please remember something for me
        can you remember things | will you remember what i say | can you memorise things
    """),
     "Yes, I remember what you tell me in this chat."),
    (rows("""
        what is chatserve | tell me about chatserve | what's chatserve | what is this | what is this server
        where am i chatting | how does chatserve work | what is a kv cache | what is this site
    """),
     "chatserve is a server for long conversations: it keeps what the model has read, so each turn costs only its "
     "new words."),
    (rows("""
        test | testing | this is a test | just testing | 1 2 3 test | ping | are you there | hello? are you there
        can you hear me | do you hear me | anybody there | is anyone there | does this work | are you working
        still there
    """),
     "Yes, I am here."),
)  # fmt: skip

UNKNOWN_QUESTIONS = rows("""
    who is the president of {x} | how far is it to {x} | why is the sky blue | what is {d} plus {d}
    what is {d} times {d} | how many people live in {x} | what do you think about {x} | do you like {x}
    how do i cook {x} | who invented the {x} | when did {x} end | why do {x} sleep | what is the meaning of life
    who won the {x} | is {x} better than {x} | can you explain {x} | what does {x} mean | how tall is the {x} tower
    how does a {x} work | what is the best {x} | where can i buy {x} | how much is {d} + {d} | do you believe in {x}
    what is love | why | how | how come | what should i eat today | should i buy a {x} | have you heard of {x}
    what happened in {d} | what is a {x} | how do you make {x} | which is bigger, {x} or {x}
    is it true that {x} can {x} | when will {x} come | what's {d} + {d} | {d} + {d} | who was the first {x}
    how long does it take to {x} | can {x} fly | what is the square root of {d} | how many {x} are there
    what colour are {x} | do {x} have {x} | what if {x} had {x} | how can i learn {x}
    what language do they speak in {x} | why are {x} so {x} | what is pi | who are they | do you speak {x}
    what does a {x} eat | is there life on mars | what is the fastest {x} | what's the news | who wrote {x}
    what is the difference between {x} and {x} | what is quantum {x} | are {x} dangerous
""")
UNKNOWN_ANSWER = "I do not know that. I only know what you tell me."
UNKNOWN_REQUESTS = rows("""
    write a poem | write a poem about {x} | translate {x} into {x} | write code | write a {x} program | draw a {x}
    sing a song | sing me a song about {x} | search the web for {x} | play {x} | open {x} | call {x} | buy {x}
    solve this equation | write an email to {x} | summarise this text: {x} {x} {x} {x} | set a timer
    set an alarm for {d} | turn on the light | order a pizza | send a message to {x} | book a {x} for {d} people
    show me a picture of {x} | fix my code | give me a recipe for {x} | do my homework | teach me {x} | rap about {x}
    explain {x} to me | make a list of {x} | calculate {d} * {d} | convert {d} {x} to {x} | write an essay about {x}
    correct this sentence: {x} {x} {x} | tell me a fact about {x} | recommend a {x} | help me with my {x}
    give me {d} ideas for {x} | write python code to {x} | describe {x} | compare {x} and {x} | act as a {x}
    pretend you are a {x} | generate {x} | google {x}
""")
UNKNOWN_REQUEST_ANSWER = "I cannot do that. I can remember facts, keep lists, count and tell a story."
UNKNOWN_STATEMENTS = rows("""
    i went to the {x} yesterday | the {x} was very {x} today | i had {x} for lunch | we are going to {x} tomorrow
    i saw a {x} | it was a long day | the train was late | i am going to the {x} | i bought a new {x}
    i have to {x} the {x} | the movie was great | i just woke up | i'm at work | i am cooking dinner | my head hurts
    i think {x} is {x} | people say that {x} is {x} | there was a {x} in the {x} | i need to buy some {x}
    the food was {x} | i don't like {x} | i hate {x} | i played {x} all day | we watched {x} last night
    the {x} {x} and the {x} {x} | i want to {x} | i might {x} tomorrow | i was in {x} last year
    someone told me about {x} | i am learning {x} | i am hungry | i need coffee | i am on the bus
    the internet is slow | my {x} broke | i lost my {x} | i could not sleep | it is late | life is {x} | {x} {x} {x}
    {x} | {x} {x} | {x}! | i can't believe it | i had a dream about {x} | the {x} is broken again
    we had a lot of {x} | nobody likes {x} | everything is {x} | i guess {x} will {x} | this {x} is so {x}
    today was {x} | i finished my {x} | my friends are coming over | i am waiting for the {x} | guess what
    you know what
""")
UNKNOWN_STATEMENT_ANSWER = "I see."

FILLER_WORDS = rows("""
    river | harbour | winter | engine | paper | garden | bridge | market | mountain | window | letter | summer
    island | forest | station | kitchen | valley | castle | village | morning | evening | question | answer
    teacher | story | painter | journey | silver | quiet | narrow | gentle | bright | ancient | wooden | distant
    careful | common | simple | heavy | open | early | late | slow | deep | wide | warm | cold | empty | busy
    carry | follow | build | measure | collect | repair | visit | explain | describe | notice | prepare | compare
    finish | begin | travel | listen | wander | weather | history | music | science | number | season | corner
    traffic | cloud | shadow | coffee | newspaper | camera | ticket | doctor | farmer | clock | bread | cheese
    lamp | stone | glass | metal | water | fire | earth | wind | field | road | street | tower | wall | roof | floor
    ceiling
""")
FILLER = rows("""
    The {x} near the {x} is {x} in the {x}. | Answer in short sentences. | A {x} {x} can {x} the {x}.
    Be polite and {x}. | When the {x} is {x}, people {x} the {x}. | Use plain words. | Every {x} has a {x} and a {x}.
    Most {x} are {x}, but some are {x}. | Do not make things up. | In the {x} the {x} becomes {x} and {x}.
    The {x} of the {x} was {x} by {x}. | Keep the {x} {x}. | If you do not know something, say so.
    Remember what the user says. | There were {d} {x} beside the {x}, and {d} of them were {x}.
    It takes {d} days to {x} a {x}. | The {x} opened in {d}{d}{d}{d}. | Stay friendly.
    Some say that a {x} {x} brings {x}. | The {x} closes at {d}, the {x} at {d}.
    Nobody should {x} a {x} without a {x}. | First {x} the {x}, then {x} the {x}. | A good {x} is {x}, {x} and {x}.
    You help people. | Policy {d}.{d}: the {x} must {x} before the {x}. | Section {d} is about {x} and {x}.
    Visitors {x} the {x} from the {x}. | Please be brief. | The old {x} still {x}. | Write in English.
    Reply to the user.
""")
SYSTEM_SHORT = rows("""
    You are a helpful assistant. | You are a friendly assistant.
    You are a chat model that remembers what it is told. | Answer briefly. | You are helpful, honest and brief.
    Be kind. | You are a helpful assistant who answers questions about what the user said.
    You are a memory assistant. | Have a nice conversation with the user. | You are an assistant. | Help the user.
""")

SENTENCE_OPENINGS = frozenset(
    rows("""
    My | What | Where | Do | The | Tell | How | When | Who | Which | Hi | Hello | Can | Remind | Please
""")
)
STRUCTURE_WORDS = frozenset(
    rows("""
    name | names | called | named | please | from | with | that | this | your | what | where | when | which | have
    does | know | tell | remember | remind | also | actually | sorry | correction | meant | mean | said | know
    number | from | down | list | note | repeat | story | about | live | lives | works | work | years | moved
    changed | became | longer | once | again | remove | delete | clear | take | forget | they | there | their | then
""")
)


def all_texts() -> list[str]:
    """Every template of the tables above, for their words."""
    kinds = [text for kind in KINDS for text in (*kind.tells, *kind.asks, *kind.owned)]
    talk = [text for texts, reply in SMALL_TALK for text in (*texts, reply)]
    nouns = [
        *RELATIONS,
        *PETS,
        *FAVOURITES,
        *CODES,
        *TEXTS,
        *OBJECTS,
        *OBJECTS_MANY,
        *EVENTS,
        *COLOURED,
        *SEVERAL,
        *COUNTED,
        *OF_NOUNS,
    ]
    other = [*STORIES, *JOKES, *FILLER, *FILLER_WORDS, *UNKNOWN_QUESTIONS, *UNKNOWN_REQUESTS, *UNKNOWN_STATEMENTS]
    return [*kinds, *talk, *nouns, *other, *SUMMARY, *STORY, *GREETINGS, *GOODBYES]
