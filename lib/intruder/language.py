"""Documents of the miniature language: the pre-training distribution, known exactly and sampled without end.

`document(split, seed, index)` is a pure function, so a stream can be entered anywhere, a run can resume, and two
machines see the same text. Training and held-out documents never share a text: a text belongs to the split that its
hash says (`split_of`), and the sampler draws again until the split fits.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator

from . import lexicon as lx
from .errors import InputError

SPLITS = ("train", "validation", "test")
HELD_OUT_BUCKETS = {8: "validation", 9: "test"}  # of ten


def split_of(text: str) -> str:
    """The split that owns `text`: eighty per cent of all texts train, ten validate, ten test, by hash.

    A text has one hash, so no two splits can share it, whatever the seeds and however many are drawn.
    """
    bucket = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 10
    return HELD_OUT_BUCKETS.get(bucket, "train")


def check_split(split: str) -> None:
    """Raise InputError unless `split` is one of train, validation and test."""
    if split not in SPLITS:
        raise InputError(f"split is {split!r}; wanted one of {', '.join(SPLITS)}")


def sample(make: Callable[[random.Random], tuple], split: str, key: str) -> tuple:
    """The first draw of `make` under the random stream `key` whose text (its first item) belongs to `split`."""
    check_split(split)
    rng = random.Random(f"{key}:{split}")
    while True:
        item = make(rng)
        if split_of(item[0]) == split:
            return item


def document(split: str, seed: int, index: int) -> str:
    """Document number `index` of the stream `seed`, lower-case words separated by blanks; a pure function."""
    return sample(lambda rng: (rng.choices(MAKERS, WEIGHTS)[0](rng),), split, f"document:{seed}:{index}")[0]


def documents(split: str, seed: int, start: int = 0) -> Iterator[str]:
    """The endless stream of documents of `seed`, from number `start` on."""
    check_split(split)
    index = start
    while True:
        yield document(split, seed, index)
        index += 1


# -- one maker per kind of document -----------------------------------------------------------------------------------

def noun_phrase(noun: str, adjective: str | None) -> str:
    """`a dog`, or with an adjective `a big dog`."""
    return lx.article(f"{adjective} {noun}" if adjective else noun)


def _story(rng: random.Random) -> str:
    """Something happens, and is then restated, weakened, or said not to be the case."""
    person, verb, noun = rng.choice(lx.PEOPLE), rng.choice(lx.VERBS), rng.choice(lx.NOUNS)
    adjective = rng.choice(lx.ADJECTIVES) if rng.random() < 0.6 else None
    place = f" in the {rng.choice(lx.PLACES)}" if rng.random() < 0.5 else ""
    time = f" {rng.choice(lx.TIMES)}" if rng.random() < 0.3 else ""
    lines = [f"{person} {verb.past} {noun_phrase(noun, adjective)}{place}{time}"]
    same_verb, same_adjective = rng.choice(lx.VERB_SYNONYMS[verb]), adjective
    if adjective and rng.random() < 0.7:
        same_adjective = rng.choice(lx.ADJECTIVE_SYNONYMS[adjective])
    general = rng.choice(lx.supertypes(noun))
    opposite = rng.choice(lx.VERB_OPPOSITES[verb])
    follow = [
        f"in other words {person} {same_verb.past} {noun_phrase(noun, same_adjective)}{place}",
        f"so {person} {verb.past} {noun_phrase(general, None)}",
        f"so {person} {same_verb.past} {noun_phrase(general, same_adjective)}{place}",
        f"it is false that {person} {opposite.past} the {noun}",
        f"it is false that {person} did not {verb.base} the {noun}",
        f"{lx.pronoun(person)} did not {opposite.base} the {noun}{place}",
    ]
    if adjective:
        follow += [f"the {noun} was {same_adjective}",
                   f"the {noun} was not {rng.choice(lx.ADJECTIVE_OPPOSITES[adjective])}"]
    if not place:
        follow.append(f"maybe {lx.pronoun(person)} {verb.past} it in the {rng.choice(lx.PLACES)}")
    if not adjective:
        follow.append(f"maybe the {noun} was {rng.choice(lx.ADJECTIVES)}")
    lines += rng.sample(follow, rng.choice([1, 2, 2, 3]))
    return " . ".join(lines) + " ."


def _absence(rng: random.Random) -> str:
    """Something did not happen, so nothing narrower happened either."""
    person, verb, noun = rng.choice(lx.PEOPLE), rng.choice(lx.VERBS), rng.choice(lx.NOUNS)
    general = rng.choice(lx.supertypes(noun))
    same = rng.choice(lx.VERB_SYNONYMS[verb])
    adjective = rng.choice(lx.ADJECTIVES)
    return (f"{person} did not {verb.base} {noun_phrase(general, None)} . "
            f"so {lx.pronoun(person)} did not {same.base} {noun_phrase(noun, None)} . "
            f"it is false that {person} {verb.past} {noun_phrase(noun, adjective)} .")


def fact_sentence(person: str, relation: str, value: str) -> str:
    """`value` stands for the relation's value of `person`: `alice is a baker`."""
    text = lx.RELATIONS[relation][0].format(x=person, v=value)
    return text.replace(f" a {value}", f" {lx.article(value)}")


def _facts(rng: random.Random) -> str:
    """Known facts about one person, and now and then what they imply or exclude."""
    person = rng.choice(lx.PEOPLE)
    relations = [r for r in lx.RELATIONS if (person, r) in lx.KNOWN]
    if not relations:
        return _taxonomy(rng)
    lines = []
    for relation in rng.sample(relations, min(len(relations), rng.choice([2, 3, 4]))):
        value = lx.KNOWN[person, relation]
        lines.append(fact_sentence(person if rng.random() < 0.75 else lx.pronoun(person), relation, value)
                     if lines else fact_sentence(person, relation, value))
        if rng.random() < 0.25:
            other = rng.choice([v for v in lx.RELATIONS[relation][1] if v != value])
            lines.append(f"it is false that {fact_sentence(person, relation, other)}")
        if relation in ("pet", "meal") and rng.random() < 0.3:
            lines.append(f"so {fact_sentence(person, relation, rng.choice(lx.supertypes(value)))}")
    return " . ".join(lines) + " ."


def _taxonomy(rng: random.Random) -> str:
    """What kind of thing something is, and is not."""
    noun = rng.choice(lx.NOUNS)
    kind, top = lx.supertypes(noun)
    other = rng.choice([t for t in lx.TYPES if t != kind])
    lines = [f"{lx.article(noun)} is {lx.article(kind)}", f"every {kind} is {lx.article(top)}",
             f"{lx.article(noun)} is not {lx.article(other)}", f"{lx.article(noun)} is {lx.article(top)}"]
    return " . ".join(rng.sample(lines, rng.choice([2, 3]))) + " ."


def _meaning(rng: random.Random) -> str:
    """Synonyms and opposites, stated."""
    if rng.random() < 0.5:
        word = rng.choice(lx.ADJECTIVES)
        same, opposite = rng.choice(lx.ADJECTIVE_SYNONYMS[word]), rng.choice(lx.ADJECTIVE_OPPOSITES[word])
    else:
        verb = rng.choice(lx.VERBS)
        word, same = verb.base, rng.choice(lx.VERB_SYNONYMS[verb]).base
        opposite = rng.choice(lx.VERB_OPPOSITES[verb]).base
    return f"{word} means {same} . the opposite of {word} is {opposite} ."


def _script(rng: random.Random) -> str:
    """A state, what one does about it, and how that feels."""
    person, script = rng.choice(lx.PEOPLE), rng.choice(lx.SCRIPTS)
    they = lx.pronoun(person)
    return rng.choice([
        f"{person} was {script.state} . so {they} {script.action} . then {they} felt {script.feeling} .",
        f"{person} {script.need} . then {they} {script.action} because {they} was {script.state} .",
        f"{they} {script.need} because {person} was {script.state} . in the end {they} felt {script.feeling} .",
        f"{person} {script.action} . {they} was {script.state} before and felt {script.feeling} after that .",
    ])


def judgement(rng: random.Random) -> tuple[str, float]:
    """One judged property, such as `was not very good`, and its strength."""
    word = rng.choice(list(lx.QUALITY))
    score, text = float(lx.QUALITY[word]), word
    if rng.random() < 0.4:
        degree = rng.choice(list(lx.DEGREES))
        score, text = score * lx.DEGREES[degree], f"{degree} {word}"
    if rng.random() < 0.3:
        negation = rng.choice(list(lx.NEGATIONS))
        score, text = score * lx.NEGATIONS[negation], f"{negation} {text}"
    return f"was {text}", score


def review(rng: random.Random) -> tuple[str, float]:
    """A review of two or three judged aspects and its total: what follows `but` counts three times what precedes it."""
    topic = rng.choice(list(lx.ASPECTS))
    aspects = rng.sample(lx.ASPECTS[topic], 3)
    (a, x), (b, y), (c, z) = judgement(rng), judgement(rng), judgement(rng)
    form = rng.randrange(5)
    if form == 0:
        return f"the {aspects[0]} of the {topic} {a} and the {aspects[1]} {b}", x + y
    if form == 1:
        return f"the {aspects[0]} of the {topic} {a} but the {aspects[1]} {b}", 0.5 * x + 1.5 * y
    if form == 2:
        return f"although the {aspects[0]} {a} the {aspects[1]} of the {topic} {b}", 0.5 * x + 1.5 * y
    if form == 3:
        return (f"in this {topic} the {aspects[0]} {a} , the {aspects[1]} {b} and the {aspects[2]} {c}", x + y + z)
    return (f"the {aspects[0]} of the {topic} {a} and the {aspects[1]} {b} but the {aspects[2]} {c}",
            0.5 * (x + y) + 1.5 * z)


def _review(rng: random.Random) -> str:
    """A review and what its author did next: pleased people return, displeased ones want their money back."""
    text, score = review(rng)
    ending = rng.choice(lx.CONTENT_ENDINGS if score > 0 else lx.DISCONTENT_ENDINGS)
    person = rng.choice(lx.PEOPLE)
    return f"{person} said that {text} . {ending.format(they=lx.pronoun(person))} ."


def cause(rng: random.Random) -> tuple[lx.Cause, str, str, str, bool]:
    """A cause, its two participants, a reason, and whether the reason fits the first of them."""
    chosen = rng.choice(lx.CAUSES)
    x, y = rng.sample(lx.PEOPLE if chosen.kind == "people" else lx.NOUNS, 2)
    fits_first = rng.random() < 0.5
    return chosen, x, y, rng.choice(chosen.first if fits_first else chosen.second), fits_first


def _cause(rng: random.Random) -> str:
    """Who did what to whom, and the reason, with the one it applies to named again."""
    chosen, x, y, reason, fits_first = cause(rng)
    text = chosen.text.format(x=x, y=y, w=x if fits_first else y, they=rng.choice(["she", "he"]))
    return f"{text} {reason} ."


QUESTIONS = ["how can i {v} {np} in {town}", "where can i {v} {np} in {town}", "why did {p} {v} {np} in {town}",
             "what is the best way to {v} {np} in {town}", "who can {v} {np} for me in {town}"]
SAME_QUESTION = {0: 3, 3: 0}  # two ways to ask how


def question(rng: random.Random) -> dict:
    """The parts of a question: form, verb, adjective, noun, town and person."""
    return {"form": rng.randrange(len(QUESTIONS)), "verb": rng.choice(lx.VERBS), "noun": rng.choice(lx.NOUNS),
            "adjective": rng.choice(lx.ADJECTIVES), "town": rng.choice(lx.TOWNS), "person": rng.choice(lx.PEOPLE)}


def ask(parts: dict) -> str:
    """The parts as a question."""
    return QUESTIONS[parts["form"]].format(v=parts["verb"].base, np=noun_phrase(parts["noun"], parts["adjective"]),
                                           town=parts["town"], p=parts["person"]) + " ?"


def reword(parts: dict, rng: random.Random) -> dict:
    """The same question in other words: synonyms, and the other way to ask how."""
    changed = dict(parts)
    if rng.random() < 0.7:
        changed["verb"] = rng.choice(lx.VERB_SYNONYMS[parts["verb"]])
    if rng.random() < 0.7:
        changed["adjective"] = rng.choice(lx.ADJECTIVE_SYNONYMS[parts["adjective"]])
    if rng.random() < 0.7:
        changed["form"] = SAME_QUESTION.get(parts["form"], parts["form"])
    return changed


def _question(rng: random.Random) -> str:
    """A question, asked again in other words."""
    parts = question(rng)
    return f"{ask(parts)} that is , {ask(reword(parts, rng))}"


MAKERS = [_story, _absence, _facts, _taxonomy, _meaning, _script, _review, _cause, _question]
WEIGHTS = [0.26, 0.08, 0.17, 0.05, 0.04, 0.10, 0.12, 0.08, 0.10]
