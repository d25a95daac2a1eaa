"""The words of the miniature language and the fixed facts of its world.

Everything here is our own making. The world is small enough to print and to know completely: people, places, things
with a type hierarchy, properties with synonyms and opposites, actions, everyday scripts, judgements of quality, and a
table of facts. Pre-training documents (`language`) and the six tasks (`tasks`) share this one lexicon.
"""

from __future__ import annotations

import random
from typing import NamedTuple

WORLD_SEED = 20241028  # fixes the facts; the date of the paper's first version

WOMEN = ("alice anna bella carla clara diana ella emma eva fiona grace hanna helen irene julia karen laura lily maria "
         "mary nina nora olga rosa").split()
MEN = ("adam alan boris bruno carl david eric felix frank george hugo ivan jack james karl leo liam martin oscar paul "
       "peter simon tom victor").split()
PEOPLE = WOMEN + MEN
JOBS = ("baker teacher doctor farmer nurse pilot singer painter judge sailor tailor cook guard writer miner "
        "dentist").split()
TOWNS = ("arden belmont corvo dunmore elford farley granton hexley inver jarrow kelso lorne marlow norbury oakham "
         "penrith").split()
PLACES = "park market kitchen garden school station library museum office beach forest harbour".split()
TIMES = ["on monday", "on friday", "in the morning", "in the evening", "last night", "in the summer", "in the winter"]

# type -> members; `PARENT` adds the level above
TYPES = {
    "mammal": "dog cat horse cow sheep goat rabbit mouse lion bear wolf fox".split(),
    "bird": "robin eagle owl crow duck swan parrot".split(),
    "fish": "trout salmon shark carp herring".split(),
    "reptile": "snake lizard turtle crocodile".split(),
    "bug": "ant bee spider beetle wasp".split(),
    "fruit": "apple pear plum cherry peach".split(),
    "vegetable": "carrot onion potato cabbage turnip".split(),
    "pastry": "cake pie biscuit muffin".split(),
    "tool": "hammer saw drill spade rake wrench".split(),
    "vehicle": "car truck bus bicycle tractor wagon".split(),
    "garment": "coat hat scarf shirt dress jacket".split(),
    "container": "box bag basket bucket bottle jar".split(),
    "instrument": "piano guitar violin flute drum trumpet".split(),
    "toy": "doll kite ball puzzle marble".split(),
}
PARENT = {t: "animal" for t in ("mammal", "bird", "fish", "reptile", "bug")}
PARENT |= {t: "food" for t in ("fruit", "vegetable", "pastry")}
PARENT |= {t: "object" for t in ("tool", "vehicle", "garment", "container", "instrument", "toy")}
TYPE_OF = {noun: t for t, nouns in TYPES.items() for noun in nouns}
NOUNS = list(TYPE_OF)
ANIMALS = [n for n in NOUNS if PARENT[TYPE_OF[n]] == "animal"]
FOODS = [n for n in NOUNS if PARENT[TYPE_OF[n]] == "food"]
INSTRUMENTS = TYPES["instrument"]

# (synonyms) against (synonyms)
OPPOSITES = [
    (("big", "large"), ("small", "little")), (("old", "ancient"), ("new", "modern")),
    (("clean", "spotless"), ("dirty", "filthy")), (("expensive", "costly"), ("cheap", "inexpensive")),
    (("strong", "sturdy"), ("weak", "fragile")), (("bright", "shiny"), ("dark", "dim")),
    (("beautiful", "pretty"), ("ugly", "hideous")), (("fast", "quick"), ("slow", "sluggish")),
    (("wet", "damp"), ("dry", "parched")), (("loud", "noisy"), ("quiet", "silent")),
    (("soft", "smooth"), ("hard", "rough")), (("rare", "unusual"), ("common", "ordinary")),
    (("heavy", "weighty"), ("light", "weightless")), (("young", "youthful"), ("elderly", "aged")),
]
ADJECTIVES = [word for pair in OPPOSITES for side in pair for word in side]


class Verb(NamedTuple):
    """One action: its plain form and its past form."""

    base: str
    past: str


def _verbs(text: str) -> tuple[Verb, ...]:
    return tuple(Verb(*form.split("/")) for form in text.split())


# (synonyms) against (synonyms): doing the one, in a story, means not doing the other
ACTIONS = [(_verbs(a), _verbs(b)) for a, b in [
    ("buy/bought purchase/purchased", "sell/sold trade/traded"),
    ("find/found discover/discovered", "lose/lost misplace/misplaced"),
    ("fix/fixed repair/repaired", "break/broke damage/damaged"),
    ("open/opened unlock/unlocked", "close/closed shut/shut"),
    ("love/loved adore/adored", "hate/hated detest/detested"),
    ("hide/hid conceal/concealed", "show/showed reveal/revealed"),
    ("keep/kept retain/retained", "discard/discarded abandon/abandoned"),
    ("catch/caught capture/captured", "release/released free/freed"),
    ("notice/noticed spot/spotted", "overlook/overlooked ignore/ignored"),
    ("lift/lifted raise/raised", "drop/dropped lower/lowered"),
]]
VERBS = [verb for pair in ACTIONS for side in pair for verb in side]


def _sides(pairs) -> tuple[dict, dict]:
    """Word -> its synonyms (itself excluded), and word -> its opposites."""
    synonyms, opposites = {}, {}
    for left, right in pairs:
        for side, other in ((left, right), (right, left)):
            for word in side:
                synonyms[word] = [w for w in side if w != word]
                opposites[word] = list(other)
    return synonyms, opposites


ADJECTIVE_SYNONYMS, ADJECTIVE_OPPOSITES = _sides(OPPOSITES)
VERB_SYNONYMS, VERB_OPPOSITES = _sides(ACTIONS)


class Script(NamedTuple):
    """An everyday chain: a person who was `state` did `action` and then felt `feeling`; before, they `need`ed."""

    state: str
    action: str
    feeling: str
    need: str


SCRIPTS = [Script(*line.split(" | ")) for line in """\
hungry | ate a warm meal | full | went to the kitchen
thirsty | drank some water | refreshed | filled a glass
tired | took a long nap | rested | made the bed
cold | put on a thick coat | warm | opened the wardrobe
sick | visited the doctor | better | made an appointment
bored | read a long novel | amused | went to the library
lonely | called a friend | cheerful | picked up the phone
muddy | took a bath | clean | filled the tub
late | ran to the station | relieved | packed in a hurry
lost | asked for directions | certain | looked for a stranger
soaked | changed clothes | dry | reached the house
angry | went for a walk | calm | left the room
poor | looked for work | hopeful | wrote a letter
curious | asked a question | informed | raised a hand
injured | called a nurse | safe | fell down the stairs
sleepy | drank some coffee | awake | boiled some water
hot | went for a swim | cool | drove to the beach
guilty | said sorry | forgiven | admitted the mistake
scared | hid under the bed | hidden | heard a strange noise
nervous | practised the speech | confident | wrote some notes
jealous | talked to a brother | understood | saw the present
homesick | wrote to the family | connected | moved abroad
proud | told the neighbours | admired | won the prize
confused | read the instructions | enlightened | opened the manual
greedy | took all the sweets | ashamed | found the jar of sweets
generous | gave the money away | thankful | saved for a year
stressed | played some music | relaxed | tuned the radio
ambitious | studied all night | ready | borrowed the textbook""".splitlines()]

# word -> strength of the judgement, in the units that `tasks` adds up
PRAISE = {"superb": 3, "wonderful": 3, "excellent": 3, "delightful": 2, "good": 2, "lovely": 2, "charming": 2,
          "pleasant": 1, "decent": 1, "fine": 1}
BLAME = {"awful": -3, "terrible": -3, "dreadful": -3, "bad": -2, "dull": -2, "poor": -2, "annoying": -2,
         "mediocre": -1, "bland": -1, "tedious": -1}
QUALITY = PRAISE | BLAME
# word -> factor on the strength of what follows it, so `not very good` is 2 * 1.5 * -0.6: rather bad. A negation turns
# a judgement round and weakens it: what is not superb is less bad than what is awful.
DEGREES = {"very": 1.5, "really": 1.5, "quite": 0.8, "slightly": 0.5, "somewhat": 0.6}
NEGATIONS = {"not": -0.6, "never": -0.7, "hardly": -0.5}
ASPECTS = {
    "film": "story acting music ending dialogue camera".split(),
    "restaurant": "soup service dessert bread wine waiter".split(),
    "hotel": "room view bed breakfast pool staff".split(),
    "concert": "band sound stage singer encore crowd".split(),
    "novel": "plot style hero opening cover chapter".split(),
}
CONTENT_ENDINGS = ["{they} would gladly go again", "{they} told every friend about it", "{they} left with a smile"]
DISCONTENT_ENDINGS = ["{they} wanted the money back", "{they} warned every friend", "{they} left with a frown"]


class Cause(NamedTuple):
    """A sentence with two participants and a reason that fits only one of them.

    `first` are properties that explain it when held by {x}, `second` when held by {y}; `kind` is 'people' or 'things'.
    """

    text: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    kind: str = "people"


CAUSES = [Cause(text, tuple(a.split("/")), tuple(b.split("/")), kind) for text, a, b, kind in [
    ("the {x} did not fit into the {y} because the {w} was too", "big/large", "small/little", "things"),
    ("the {x} crushed the {y} because the {w} was very", "heavy/strong", "fragile/weak", "things"),
    ("{they} took the {x} and not the {y} because the {w} was", "cheap/shiny", "costly/filthy", "things"),
    ("{they} sold the {x} and kept the {y} because the {w} was", "ugly/ordinary", "beautiful/rare", "things"),
    ("{x} asked {y} for help because {w} was", "struggling/weak", "skilled/strong", "people"),
    ("{x} gave {y} some food because {w} was", "generous/kind", "hungry/poor", "people"),
    ("{x} beat {y} in the race because {w} was", "fast/quick", "slow/sluggish", "people"),
    ("{x} carried {y} home because {w} was", "strong/sturdy", "weak/injured", "people"),
    ("{x} visited {y} in the hospital because {w} was", "kind/worried", "sick/injured", "people"),
    ("{x} thanked {y} because {w} was", "grateful/polite", "helpful/generous", "people"),
    ("{x} feared {y} because {w} was", "timid/weak", "fierce/angry", "people"),
    ("{x} hired {y} because {w} was", "busy/rich", "qualified/skilled", "people"),
    ("{x} envied {y} because {w} was", "poor/jealous", "rich/famous", "people"),
    ("{x} taught {y} a song because {w} was", "skilled/patient", "curious/untrained", "people"),
    ("{x} could not hear {y} because {w} was", "deaf/asleep", "quiet/silent", "people"),
    ("{x} apologised to {y} because {w} was", "guilty/rude", "angry/hurt", "people"),
    ("{x} helped {y} up the stairs because {w} was", "young/polite", "elderly/injured", "people"),
    ("{x} borrowed money from {y} because {w} was", "poor/greedy", "rich/generous", "people"),
]]

# relation -> (sentence, possible values); the table of facts says which hold, and which nobody ever states
RELATIONS = {
    "job": ("{x} is a {v}", JOBS),
    "town": ("{x} lives in {v}", TOWNS),
    "pet": ("{x} has a {v}", [n for n in ANIMALS if TYPE_OF[n] in ("mammal", "bird", "reptile")]),
    "meal": ("{x} likes to eat a {v}", FOODS),
    "music": ("{x} plays the {v}", INSTRUMENTS),
}
UNKNOWN_SHARE = 0.25


def _facts() -> dict[tuple[str, str], str | None]:
    """(person, relation) -> value, or None where the world is silent."""
    rng = random.Random(WORLD_SEED)
    return {(person, relation): None if rng.random() < UNKNOWN_SHARE else rng.choice(values)
            for person in PEOPLE for relation, (_, values) in RELATIONS.items()}


FACTS = _facts()
KNOWN = {key: value for key, value in FACTS.items() if value is not None}
SILENT = [key for key, value in FACTS.items() if value is None]


def article(noun: str) -> str:
    """`noun` with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def pronoun(person: str) -> str:
    """The subject pronoun of `person`."""
    return "she" if person in WOMEN else "he"


def supertypes(noun: str) -> list[str]:
    """The types above `noun`, nearest first: robin -> [bird, animal]."""
    kind = TYPE_OF[noun]
    return [kind, PARENT[kind]]


def sibling(noun: str, rng: random.Random) -> str:
    """Another noun of the same type."""
    return rng.choice([n for n in TYPES[TYPE_OF[noun]] if n != noun])
