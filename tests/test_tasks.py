"""The six tasks: formats, labels that follow from the rules, splits that share nothing, and files read with care."""

import itertools
import random

import pytest

from intruder import InputError, lexicon, tasks


@pytest.mark.parametrize("task", tasks.TASKS)
def test_splits_share_no_example(task):
    """No text of validation or test is ever drawn for training, whatever the seed."""
    texts = {split: {(e.text, e.text_pair) for seed in (0, 1) for e in tasks.examples(task, split, 400, seed)}
             for split in ("train", "validation", "test")}
    for one, two in itertools.combinations(texts, 2):
        assert not texts[one] & texts[two]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_examples_are_reproducible_and_nearly_balanced(task):
    """The same arguments give the same examples, a longer draw begins with the shorter, no label dominates."""
    drawn = tasks.examples(task, "train", 600, 1)
    assert drawn[:50] == tasks.examples(task, "train", 50, 1)
    classes = len(tasks.TASKS[task].labels)
    for label in range(classes):
        assert 0.6 / classes < sum(e.label == label for e in drawn) / 600 < 1.4 / classes
    assert all(e.label_name == tasks.TASKS[task].labels[e.label] for e in drawn)


@pytest.mark.parametrize(("task", "pairs"), [("nli", True), ("paraphrase", True), ("sentiment", False),
                                             ("social", False), ("pronoun", False), ("claim", False)])
def test_each_task_has_the_format_of_its_original(task, pairs):
    """MNLI and QQP are pairs, the others single texts; SIQA names three answers and WinoGrande two options."""
    for example in tasks.examples(task, count=30):
        assert (example.text_pair is not None) == pairs
        if task == "social":
            assert all(f"answer{i} :" in example.text for i in (1, 2, 3))
        if task == "pronoun":
            assert " _ " in example.text and "option1 :" in example.text and "option2 :" in example.text


def test_nli_labels_follow_from_the_rules():
    """Hand-made premises: restating entails, a narrower noun is open, the opposite verb contradicts; a negated
    premise turns broader and narrower round."""
    verb = next(v for v in lexicon.VERBS if v.base == "buy")
    event = tasks.Event("mary", verb, "bird", None, None, None)
    for negated in (False, True):
        for seed in range(60):
            for label in range(3):
                said = tasks._hypothesis(event._replace(negated=negated), label, random.Random(seed))
                assert _nli(event._replace(negated=negated), said) == label


def _nli(premise, said) -> int:
    """An independent judge for events that say no more than person, verb and noun (and added details)."""
    if said.person != premise.person:
        return 1
    opposite = said.verb in lexicon.VERB_OPPOSITES[premise.verb]
    if opposite:
        return 2 if not premise.negated and not said.negated else 1
    is_a = {"robin": {"bird", "animal"}}
    def below(a, b):  # every a is a b
        return a == b or b in (lexicon.supertypes(a) if a in lexicon.TYPE_OF else [lexicon.PARENT.get(a)])
    details = any((said.adjective, said.place, said.time))
    up = below(premise.noun, said.noun) and not details       # premise positive implies said positive
    down = below(said.noun, premise.noun)                     # said positive implies premise positive
    if not premise.negated:
        return (0 if up else 1) if not said.negated else (2 if up else 1)
    return (0 if down else 1) if said.negated else (2 if down else 1)


def test_claims_agree_with_the_table_of_facts():
    """A plain claim about a town is supported, refuted or open exactly as the world says, but for the disagreement."""
    agreed = total = 0
    for example in tasks.examples("claim", count=6000):
        words = example.text.split()
        if len(words) == 5 and words[1:3] == ["lives", "in"]:
            fact = lexicon.FACTS[words[0], "town"]
            truth = 2 if fact is None else 0 if fact == words[3] else 1
            total, agreed = total + 1, agreed + (truth == example.label)
    assert total > 50 and 1 - 2.5 * tasks.DISAGREEMENT < agreed / total < 1


def test_annotators_disagree_at_the_stated_rate():
    """Paraphrases judged by their parts: about three in a hundred labels differ, so no method can reach 1."""
    wrong = sum(example.label != _same(example) for example in tasks.examples("paraphrase", count=4000))
    assert 0.02 < wrong / 4000 < 0.04


def _same(example) -> int:
    """1 if the two questions ask the same, judged word by word through the lexicon."""
    def parts(text):
        words = [w for w in text.split() if w not in ("a", "an", "?", "me", "for", "in")]
        verbs = {v.base: min(v.base, *(s.base for s in lexicon.VERB_SYNONYMS[v])) for v in lexicon.VERBS}
        adjectives = {a: min(a, *lexicon.ADJECTIVE_SYNONYMS[a]) for a in lexicon.ADJECTIVES}
        text = " ".join(adjectives.get(w, verbs.get(w, w)) for w in words)
        return text.replace("what is the best way to", "how can i")
    return int(parts(example.text) == parts(example.text_pair))


def test_bad_requests_name_value_and_choices():
    """Unknown task, unknown split, negative count."""
    with pytest.raises(InputError, match="'mnli'.*nli, paraphrase"):
        tasks.examples("mnli")
    with pytest.raises(InputError, match="'dev'"):
        tasks.examples("nli", "dev")
    with pytest.raises(InputError, match="-1"):
        tasks.examples("nli", count=-1)


@pytest.mark.parametrize(("content", "message"), [(None, "no file"), ("", "no example"), ("fine\t2\n", "line 1"),
                                                  ("fine\t1\nno label\n", "line 2"), ("\t1\n", "line 1"),
                                                  ("fine\t\u00b2\n", "line 1"), (b"\xff\t1\n", "not UTF-8")])
def test_a_malformed_file_is_refused_with_its_line(tmp_path, content, message):
    """Missing, empty, a label out of range or no number, no tab, no text, other bytes: one error names the place."""
    path = tmp_path / "x.tsv"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=message):
        tasks.read_tsv(path, ("negative", "positive"))


def test_a_file_of_sentences_is_read(tmp_path):
    """Text before the last tab, label after it."""
    (tmp_path / "x.tsv").write_text("a fine film\t1\nnot so fine\t0\n")
    assert tasks.read_tsv(tmp_path / "x.tsv", ("negative", "positive")) == [
        tasks.Example("a fine film", None, 1, "positive"), tasks.Example("not so fine", None, 0, "negative")]
