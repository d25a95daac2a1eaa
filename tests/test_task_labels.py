"""The labels of every task but sentiment, judged again from the text alone by brute force: none contradicts them."""

import random
import re

from intruder import language, tasks
from intruder import lexicon as lx

DRAWS = 3000
ADJECTIVES = {word: (i, side) for i, pair in enumerate(lx.OPPOSITES) for side in (0, 1) for word in pair[side]}
VERBS = {(form, getattr(verb, form)): (i, side) for i, pair in enumerate(lx.ACTIONS) for side in (0, 1)
         for verb in pair[side] for form in ("base", "past")}


def _read(sentence: str) -> tuple[dict, bool]:
    """(the event: person, verb, noun, adjective, place, time, negated; whether it is said to be false)."""
    text = sentence.removesuffix(" .")
    words, false = text.removeprefix("it is false that "), text.startswith("it is false that ")
    time = next((t for t in lx.TIMES if words.endswith(f" {t}")), None)
    words = words.removesuffix(f" {time}")
    place = next((p for p in lx.PLACES if words.endswith(f" in the {p}")), None)
    person, *words = words.removesuffix(f" in the {place}").split()
    negated = words[:2] == ["did", "not"]
    verb = VERBS["base", words[2]] if negated else VERBS["past", words[0]]
    article, *adjective, noun = words[3 if negated else 1:]
    assert article == ("an" if (adjective + [noun])[0][0] in "aeiou" else "a")
    event = {"person": person, "verb": verb, "noun": noun, "place": place, "time": time, "negated": negated,
             "adjective": ADJECTIVES[adjective[0]] if adjective else None}
    return event, false


def _includes(narrow: dict, broad: dict) -> bool:
    """Whether every event that fits `narrow` fits `broad`."""
    noun = narrow["noun"]
    above = {noun, *(lx.supertypes(noun) if noun in lx.TYPE_OF else [lx.PARENT.get(noun)])}
    return broad["noun"] in above and all(narrow[key] == broad[key] for key in ("person", "verb")) and all(
        broad[key] in (None, narrow[key]) for key in ("adjective", "place", "time"))


def _judge(premise: dict, said: dict) -> int:
    """0 it follows, 1 it is open, 2 it is excluded; a story tells of one event, so opposites exclude each other."""
    if premise["negated"]:
        return (0 if said["negated"] else 2) if _includes(said, premise) else 1
    if _includes(premise, said):
        return 2 if said["negated"] else 0
    turned = [premise | {key: (premise[key][0], 1 - premise[key][1])} for key in ("verb", "adjective") if premise[key]]
    return 2 if not said["negated"] and any(_includes(other, said) for other in turned) else 1


def test_nli_labels_are_what_the_two_sentences_say():
    """Inclusion of events, turned round under negation; opposite verbs and adjectives exclude each other."""
    rng, seen = random.Random(1), set()
    for _ in range(DRAWS):
        text, pair, label = tasks._nli(rng)
        (premise, _), (said, false) = _read(text), _read(pair)
        found = _judge(premise, said)
        assert label == (2 - found if false else found), (text, pair)
        seen.add((premise["negated"], said["negated"], false, label))
    assert len(seen) == 14, "a kind of example was not judged"


def _meaning(question: str) -> tuple:
    """What a question asks: two ways to ask how are one, and so are synonyms."""
    for form, text in enumerate(language.QUESTIONS):
        pattern = text.format(v=r"(\w+)", np=r"an? (\w+) (\w+)", town=r"(\w+)", p=r"(\w+)")
        if match := re.fullmatch(pattern + r" \?", question):
            *person, verb, adjective, noun, town = match.groups()
            return min(form, language.SAME_QUESTION.get(form, form)), person, VERBS["base", verb], ADJECTIVES[
                adjective], noun, town
    raise AssertionError(question)


def test_different_questions_ask_different_things_and_duplicates_the_same():
    """No true paraphrase is labelled different."""
    rng = random.Random(2)
    for _ in range(DRAWS):
        text, pair, label = tasks._paraphrase(rng)
        assert (_meaning(text) == _meaning(pair)) == bool(label), (text, pair)


def _holds(person: str, part: str) -> int:
    """0 the table of facts says so, 1 it says otherwise, 2 it is silent."""
    for relation, (sentence, _) in lx.RELATIONS.items():
        pattern = sentence.removeprefix("{x} ").replace("a {v}", "an? {v}").format(v=r"(\w+)")
        if match := re.fullmatch(pattern, part):
            fact = lx.FACTS[person, relation]
            kinds = lx.supertypes(fact) if relation in ("pet", "meal") and fact else []
            return 2 if fact is None else int(match[1] not in (fact, *kinds))
    raise AssertionError(part)


def test_claims_are_judged_by_the_table_of_facts():
    """One false part refutes; otherwise one silent part leaves the claim open; `it is false that` turns it round."""
    rng = random.Random(3)
    for _ in range(DRAWS):
        text, _, label = tasks._claim(rng)
        claim = text.removesuffix(" .")
        for frame in tasks.FRAMES:
            claim = claim.removeprefix(frame)
        person, parts = claim.removeprefix("it is false that ").split(" ", 1)
        truths = [_holds(person, part) for part in parts.split(" and ")]
        found = 1 if 1 in truths else max(truths)
        assert label == ((1, 0, 2)[found] if claim.startswith("it is false") else found), text


ASKED = {"what will do next": ("action",), "how will feel in the end": ("feeling",), "how was before": ("state",),
         "what did do before": ("need", "action")}  # stages that the question may ask for; never the one told


def test_one_answer_of_three_fits_the_story_and_the_question():
    """Read from the text: the labelled answer belongs to the person's script and to the question, no other does both."""
    rng = random.Random(4)
    for _ in range(DRAWS):
        text, _, label = tasks._social(rng)
        story, rest = text.split(" . ", 1)
        question, options = rest.split(" ? ")
        person, told = story.split(" ", 1)
        told = told.removeprefix("was ").removeprefix("felt ")
        script = next(s for s in lx.SCRIPTS if told in s)
        asked = [getattr(script, stage) for stage in ASKED[question.replace(f"{person} ", "")]]
        answers = re.split(r" ?answer\d : ", options)[1:]
        fitting = [i for i, answer in enumerate(answers) if answer in asked and answer != told]
        if told == script.feeling or told == script.need:  # before the end, or next, one acts; a need is met earlier
            fitting = [i for i in fitting if answers[i] != script.need]
        assert fitting == [label], text


def test_the_blank_stands_for_the_one_whom_the_reason_fits():
    """Read from the text: template, participants and reason decide; the options stand in the sentence's order."""
    rng = random.Random(5)
    for _ in range(DRAWS):
        text, _, label = tasks._pronoun(rng)
        sentence, one, two = re.fullmatch(r"(.*) \. option1 : (\w+) option2 : (\w+)", text).groups()
        assert re.search(rf"\b{one}\b.*\b{two}\b", sentence) and one != two
        judged = set()
        for cause in lx.CAUSES:
            for they in ("she", "he"):
                stem = cause.text.format(x=one, y=two, w="_", they=they)
                if sentence.startswith(f"{stem} "):
                    reason = sentence.removeprefix(f"{stem} ")
                    judged |= {0} if reason in cause.first else set()
                    judged |= {1} if reason in cause.second else set()
        assert judged == {label}, text
