"""Six tasks in the miniature language, each in the format of one of the paper's, and one real task from local files.

Examples are sampled without end: example `index` of (task, split, seed) is a pure function. Train, validation and test
never share a text (`language.split_of`). As people do, the annotators of these tasks disagree now and then: with
probability `DISAGREEMENT` a label is replaced by another one, so that no method can reach an accuracy of 1. And as in
data that people write, every task has some surface cue that a head on a frozen model can use, and that does not suffice.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import language as lg
from . import lexicon as lx
from .errors import InputError

DISAGREEMENT = 0.03
SENTIMENT_NOISE = 0.75  # standard deviation of an annotator's judgement, in the units of `lexicon.QUALITY`


class Example(NamedTuple):
    """One labelled example; `text_pair` is None for tasks on single texts."""

    text: str
    text_pair: str | None
    label: int
    label_name: str


class Task(NamedTuple):
    """A task: its label names, the data set whose format it has, and the maker of one example (text, pair, label)."""

    labels: tuple[str, ...]
    format_of: str
    make: Callable[[random.Random], tuple[str, str | None, int]]


# -- natural language inference (MNLI) --------------------------------------------------------------------------------

class Event(NamedTuple):
    """Someone did something: `adjective`, `place` and `time` may be unsaid (None)."""

    person: str
    verb: lx.Verb
    noun: str
    adjective: str | None
    place: str | None
    time: str | None
    negated: bool = False


def _say(event: Event) -> str:
    did = f"did not {event.verb.base}" if event.negated else event.verb.past
    place = f" in the {event.place}" if event.place else ""
    time = f" {event.time}" if event.time else ""
    return f"{event.person} {did} {lg.noun_phrase(event.noun, event.adjective)}{place}{time}"


def _broader(noun: str) -> list[str]:
    return lx.supertypes(noun) if noun in lx.TYPE_OF else [lx.PARENT[noun]] if noun in lx.PARENT else []


def _narrower(noun: str) -> list[str]:
    if noun in lx.TYPES:
        return lx.TYPES[noun]
    return [n for n in lx.NOUNS if lx.PARENT[lx.TYPE_OF[n]] == noun] if noun not in lx.TYPE_OF else []


def _synonyms(event: Event, rng: random.Random) -> Event:
    """The same event in other words."""
    if rng.random() < 0.6:
        event = event._replace(verb=rng.choice(lx.VERB_SYNONYMS[event.verb]))
    if event.adjective and rng.random() < 0.6:
        event = event._replace(adjective=rng.choice(lx.ADJECTIVE_SYNONYMS[event.adjective]))
    return event


def _weaker(event: Event, rng: random.Random) -> list[Event]:
    """Events that follow from a positive `event`, each saying less in one way."""
    less = [event._replace(noun=noun) for noun in _broader(event.noun)]
    less += [event._replace(**{slot: None}) for slot in ("adjective", "place", "time") if getattr(event, slot)]
    return less


def _stronger(event: Event, rng: random.Random) -> list[Event]:
    """Events from which a positive `event` follows, each saying more in one way."""
    more = [event._replace(noun=rng.choice(_narrower(event.noun)))] if _narrower(event.noun) else []
    for slot, words in (("adjective", lx.ADJECTIVES), ("place", lx.PLACES), ("time", lx.TIMES)):
        if getattr(event, slot) is None:
            more.append(event._replace(**{slot: rng.choice(words)}))
    return more


def _hypothesis(event: Event, label: int, rng: random.Random) -> Event:
    """A hypothesis that stands to `event` as `label` says: 0 entailment, 1 neutral, 2 contradiction."""
    said = _synonyms(event, rng)
    weaker, stronger = _weaker(said, rng), _stronger(said, rng)
    follows, leaves_open = (stronger, weaker) if event.negated else (weaker, stronger)
    follows = follows + [said]
    if label == 0:
        return rng.choice(follows)
    if label == 1:
        other = [said._replace(person=rng.choice([p for p in lx.PEOPLE if p != said.person]))]
        return rng.choice(leaves_open * 2 + other)
    denials = [choice._replace(negated=not event.negated) for choice in follows]
    if not event.negated:
        denials.append(said._replace(verb=rng.choice(lx.VERB_OPPOSITES[said.verb])))
        if said.adjective:
            denials.append(said._replace(adjective=rng.choice(lx.ADJECTIVE_OPPOSITES[said.adjective])))
    return rng.choice(denials)


def _nli(rng: random.Random) -> tuple[str, str | None, int]:
    noun = rng.choice(lx.NOUNS) if rng.random() < 0.75 else rng.choice(list(lx.TYPES))
    event = Event(rng.choice(lx.PEOPLE), rng.choice(lx.VERBS), noun,
                  rng.choice(lx.ADJECTIVES) if rng.random() < 0.6 else None,
                  rng.choice(lx.PLACES) if rng.random() < 0.5 else None,
                  rng.choice(lx.TIMES) if rng.random() < 0.3 else None, negated=rng.random() < 0.25)
    label = rng.randrange(3)
    text = _say(_hypothesis(event, label, rng))
    if rng.random() < 0.15:
        text, label = f"it is false that {text}", 2 - label
    return f"{_say(event)} .", f"{text} .", label


# -- the other five ---------------------------------------------------------------------------------------------------

def _ask_same(parts: dict) -> tuple:
    """What a question asks: equal for two questions if and only if they are duplicates."""
    form = min(parts["form"], lg.SAME_QUESTION.get(parts["form"], parts["form"]))
    verb, adjective = parts["verb"], parts["adjective"]
    person = parts["person"] if "{p}" in lg.QUESTIONS[form] else None
    return (form, min(verb, *lx.VERB_SYNONYMS[verb]), min(adjective, *lx.ADJECTIVE_SYNONYMS[adjective]),
            parts["noun"], parts["town"], person)


def _near(parts: dict, rng: random.Random) -> dict:
    """The question in other words with one part exchanged for a near one: another question."""
    other, slot = lg.reword(parts, rng), rng.choice(["verb", "adjective", "noun", "town", "form"])
    if slot == "verb":
        other["verb"] = rng.choice(lx.VERB_OPPOSITES[parts["verb"]])
    elif slot == "adjective":
        other["adjective"] = rng.choice(lx.ADJECTIVE_OPPOSITES[parts["adjective"]])
    elif slot == "noun":
        other["noun"] = lx.sibling(parts["noun"], rng)
    elif slot == "town":
        other["town"] = rng.choice([town for town in lx.TOWNS if town != parts["town"]])
    else:
        same = {parts["form"], lg.SAME_QUESTION.get(parts["form"])}
        other["form"] = rng.choice([form for form in range(len(lg.QUESTIONS)) if form not in same])
    return other


def _far(parts: dict, rng: random.Random) -> dict:
    """A question of its own that shares one part with `parts`."""
    slot, other = rng.choice(["verb", "adjective", "noun", "town"]), parts
    while _ask_same(other) == _ask_same(parts):
        other = lg.question(rng) | {slot: parts[slot]}
    return other


def _paraphrase(rng: random.Random) -> tuple[str, str | None, int]:
    """Two questions: the same in other words (1), or different (0), half of these by one near part only.

    As in data that people collect, the classes differ in more than their meaning: `how` is worded in two ways, so
    duplicates ask how more often.
    """
    parts, label = lg.question(rng), rng.randrange(2)
    if label == 1:
        if rng.random() < 0.4:
            parts["form"] = rng.choice(list(lg.SAME_QUESTION))
        other = lg.reword(parts, rng)
    else:
        other = _far(parts, rng) if rng.random() < 0.5 else _near(parts, rng)
    return lg.ask(parts), lg.ask(other), label


def _sentiment(rng: random.Random) -> tuple[str, str | None, int]:
    """Whether a review is negative (0) or positive (1), as an annotator with some noise judges it."""
    text, score = lg.review(rng)
    return f"{text} .", None, int(score + rng.gauss(0, SENTIMENT_NOISE) > 0)


QUESTIONS = {  # (told, asked): the question about {x}
    ("state", "action"): "what will {x} do next", ("state", "feeling"): "how will {x} feel in the end",
    ("need", "action"): "what will {x} do next", ("action", "state"): "how was {x} before",
    ("action", "need"): "what did {x} do before", ("action", "feeling"): "how will {x} feel in the end",
    ("feeling", "action"): "what did {x} do before"}
STAGES = {"state": "{x} was {v}", "need": "{x} {v}", "action": "{x} {v}", "feeling": "{x} felt {v}"}  # in order of time


def _social(rng: random.Random) -> tuple[str, str | None, int]:
    """A question about someone's everyday script: one wrong answer is of another script, one answers another question.

    The answers stand in order of time, so the question alone tells something about the place of the right one.
    """
    person, (mine, other) = rng.choice(lx.PEOPLE), rng.sample(lx.SCRIPTS, 2)
    told, asked = rng.choice(list(QUESTIONS))
    line = STAGES[told].format(x=person, v=getattr(mine, told))
    unclear = "need" if asked == "action" else asked  # a need is met before and next, too
    others = [stage for stage in STAGES if stage not in (told, asked, unclear)]
    answers = [(asked, mine), (rng.choice([asked, asked, *others]), other), (rng.choice(others), mine)]
    order = sorted(rng.sample(range(3), 3), key=lambda i: list(STAGES).index(answers[i][0]))
    options = " ".join(f"answer{i + 1} : {getattr(answers[j][1], answers[j][0])}" for i, j in enumerate(order))
    return f"{line} . {QUESTIONS[told, asked].format(x=person)} ? {options}", None, order.index(0)


def _pronoun(rng: random.Random) -> tuple[str, str | None, int]:
    """Whom the blank stands for: option1 (0) or option2 (1), listed in the order in which the sentence names them."""
    chosen, x, y, reason, fits_first = lg.cause(rng)
    text = chosen.text.format(x=x, y=y, w="_", they=rng.choice(["she", "he"]))
    return f"{text} {reason} . option1 : {x} option2 : {y}", None, int(not fits_first)


def _assertion(person: str, relation: str, truth: int, rng: random.Random) -> str:
    """A sentence about `relation` of `person`; truth: 0 as it is, 1 otherwise, 2 where the world is silent."""
    actual, values = lx.FACTS[person, relation], lx.RELATIONS[relation][1]
    value = actual if truth == 0 else rng.choice([v for v in values if v != actual])
    if relation in ("pet", "meal") and rng.random() < 0.3:
        general = rng.choice(lx.supertypes(value))
        if truth != 1 or general not in lx.supertypes(actual):
            value = general
    return lg.fact_sentence(person, relation, value)


def _claim(rng: random.Random) -> tuple[str, str | None, int]:
    """A claim about the world, without evidence: supported (0), refuted (1), or not enough information (2).

    Half the claims join two facts of one person: both must hold for support, and one false fact refutes. How a claim is
    introduced leans on the label: known things are called known, rumours are often false.
    """
    label, person = rng.randrange(3), rng.choice(MIXED_PEOPLE)
    known = [r for r in lx.RELATIONS if (person, r) in lx.KNOWN]
    silent = [r for r in lx.RELATIONS if r not in known]
    first = rng.choice(silent if label == 2 else known)
    text = _assertion(person, first, label, rng)
    if rng.random() < 0.5:
        second = rng.choice([r for r in known if r != first] or [first])
        other = _assertion(person, second, rng.choice([0, 1]) if label == 1 else 0, rng)
        parts = [text, other.removeprefix(f"{person} ")]
        if rng.random() < 0.5:
            parts = [other, text.removeprefix(f"{person} ")]
        text = " and ".join(parts)
    elif rng.random() < 0.3:
        text, label = f"it is false that {text}", (1, 0, 2)[label]
    frame = rng.choices(FRAMES, [3 if i == label + 1 else 1 if i else 4 for i in range(len(FRAMES))])[0]
    return f"{frame}{text} .", None, label


FRAMES = ("", "it is known that ", "people say that ", "i read that ")  # none, then each one's favourite by label
MIXED_PEOPLE = [p for p in lx.PEOPLE  # the world says something about them, and is silent about something
                if 0 < sum((p, r) in lx.KNOWN for r in lx.RELATIONS) < len(lx.RELATIONS)]


TASKS = {
    "nli": Task(("entailment", "neutral", "contradiction"), "MNLI", _nli),
    "paraphrase": Task(("different", "duplicate"), "QQP", _paraphrase),
    "sentiment": Task(("negative", "positive"), "SST-2", _sentiment),
    "social": Task(("answer1", "answer2", "answer3"), "SIQA", _social),
    "pronoun": Task(("option1", "option2"), "WinoGrande", _pronoun),
    "claim": Task(("supported", "refuted", "not enough information"), "FEVER", _claim),
}
LABELS = {name: task.labels for name, task in TASKS.items()} | {"sst2": ("negative", "positive")}


def _maker(name: str) -> Callable[[random.Random], tuple[str, Example]]:
    """One draw of the task `name`: the text that decides its split, and the example with its annotator's label."""
    task = TASKS[name]

    def make(rng: random.Random) -> tuple[str, Example]:
        text, pair, label = task.make(rng)
        if name != "sentiment" and rng.random() < DISAGREEMENT:
            label = rng.choice([other for other in range(len(task.labels)) if other != label])
        return f"{text} {pair}" if pair else text, Example(text, pair, label, task.labels[label])
    return make


def examples(task: str, split: str = "train", count: int = 3, seed: int = 0) -> list[Example]:
    """The first `count` examples of a task of the miniature language; a pure function of its arguments.

    task: nli, paraphrase, sentiment, social, pronoun or claim; split: train, validation or test.
    Raises InputError for any other task or split, and for a negative count.
    """
    if task not in TASKS:
        raise InputError(f"task is {task!r}; wanted one of {', '.join(TASKS)}")
    if count < 0:
        raise InputError(f"count is {count}; wanted 0 or more examples")
    lg.check_split(split)
    make = _maker(task)
    return [lg.sample(make, split, f"{task}:{seed}:{index}")[1] for index in range(count)]


def read_tsv(path: str | Path, labels: tuple[str, ...]) -> list[Example]:
    """Examples from a UTF-8 file of lines `sentence<TAB>label`, the label an index into `labels`.

    Raises InputError that names the file and the line if the file is missing, empty, or a line is malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file {path}; wanted lines of sentence<TAB>label")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error}); wanted lines of sentence<TAB>label") from error
    found = []
    for number, line in enumerate(lines, start=1):
        text, tab, label = line.rpartition("\t")
        if not tab or not label.isdecimal() or int(label) >= len(labels) or not text.strip():
            raise InputError(f"{path} line {number} is {line[:60]!r}; wanted sentence<TAB>label, "
                             f"label 0 to {len(labels) - 1}")
        found.append(Example(text, None, int(label), labels[int(label)]))
    if not found:
        raise InputError(f"{path} holds no example; wanted lines of sentence<TAB>label")
    return found
