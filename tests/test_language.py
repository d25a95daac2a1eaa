"""The miniature language: a pure, seeded, endless stream whose splits cannot overlap."""

import itertools

import pytest

from intruder import InputError, language, lexicon
from intruder.models import load_tokenizer, nano_folder


def test_a_document_is_a_pure_function_of_split_seed_and_index():
    """The same arguments give the same text; another seed, index or split gives another stream."""
    assert language.document("train", 3, 17) == language.document("train", 3, 17)
    stream = [language.document("train", 3, i) for i in range(50)]
    assert stream == list(itertools.islice(language.documents("train", 3), 50))
    assert stream[20:] == list(itertools.islice(language.documents("train", 3, start=20), 30))
    assert stream != [language.document("train", 4, i) for i in range(50)]


def test_no_document_is_in_two_splits():
    """Documents of different splits are disjoint even over different seeds, and each split is what its hash says."""
    drawn = {split: {language.document(split, seed, i) for seed in (0, 1) for i in range(1500)}
             for split in language.SPLITS}
    for one, two in itertools.combinations(language.SPLITS, 2):
        assert not drawn[one] & drawn[two]
    assert all(language.split_of(text) == split for split, texts in drawn.items() for text in texts)


def test_the_tokenizer_knows_every_word():
    """Fresh documents hold no unknown word: the committed vocabulary covers the language."""
    tokenizer = load_tokenizer(str(nano_folder()))
    texts = [language.document("test", 99, i) for i in range(1500)]
    assert not any(tokenizer.unk_token_id in ids for ids in tokenizer(texts)["input_ids"])


def test_what_documents_state_as_fact_is_in_the_table_of_facts():
    """A sentence of a known relation that no `it is false that` precedes agrees with the world."""
    checked = 0
    for index in range(4000):
        for line in language.document("train", 5, index).removesuffix(" .").split(" . "):
            words = line.split()
            if words[0] in lexicon.PEOPLE and words[1:3] == ["lives", "in"]:
                assert lexicon.FACTS[words[0], "town"] == words[3]
                checked += 1
    assert checked > 100


def test_an_unknown_split_is_refused_by_name():
    """The error names what was given and what is wanted."""
    with pytest.raises(InputError, match="'dev'.*train, validation, test"):
        language.document("dev", 0, 0)


def test_a_judgement_after_but_counts_three_times_one_before_it():
    """The documented rule of the sentiment score, checked on the text of reviews of that form."""
    import random
    checked = 0
    for seed in range(400):
        text, score = language.review(random.Random(seed))
        left, but, right = text.partition(" but ")
        if but and " and " not in left and "," not in left:
            assert score == pytest.approx(0.5 * _strength(left) + 1.5 * _strength(right))
            checked += 1
    assert checked > 20


def _strength(clause: str) -> float:
    words, score = clause.split(), 1.0
    for word in words:
        score *= lexicon.DEGREES.get(word, 1.0) * lexicon.NEGATIONS.get(word, 1.0) * lexicon.QUALITY.get(word, 1.0)
    return score
