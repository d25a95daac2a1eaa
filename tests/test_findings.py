"""Tables, intervals and sentences say what the records say, whichever way those went."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from fake_records import write_fake_results

from intruder import count_intruders, findings, sentences, tables
from intruder.errors import InputError
from intruder.records import load_records, load_spectra, summary_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_fake_results(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def spectra(folder):
    return load_spectra(folder)


@pytest.fixture(scope="module")
def summary(folder):
    return summary_table(load_records(folder))


def test_counts_are_count_intruders_summed_over_matrices(spectra):
    """A run's count is the sum of count_intruders over its matrices, and so is its null's."""
    for run in findings.runs_of(spectra, "nano", "nli"):
        rows = spectra[(spectra["preset"] == "nano") & (spectra["task"] == "nli") & (spectra["seed"] == run.seed)]
        rows = rows[rows["run"] == f"{run.label}-s{run.seed}"].sort_values("index")
        for epsilon, k in ((0.5, 10), (0.31, 1), (0.97, 40)):
            for column, count in (("max_cosine", run.count), ("null_max_cosine", run.null_count)):
                matrices = [part[column].to_numpy() for _, part in rows.groupby("matrix")]
                assert count(epsilon, k) == sum(count_intruders(cosines, epsilon, k) for cosines in matrices)


def test_runs_come_in_reading_order(spectra):
    """Full fine-tuning first, then LoRA by rank, not by the letters of its label; seeds in order."""
    runs = findings.runs_of(spectra, "nano", "nli")
    assert [run.label for run in runs[::3]] == ["full", "lora-r1", "lora-r8", "lora-r64"]
    assert [run.seed for run in runs[:3]] == [0, 1, 2]
    assert runs[0].rank is None and runs[-1].rank == 64 and runs[0].slots(10) == 120


@pytest.mark.parametrize("wanted", [{"preset": "giant"}, {"preset": "nano", "task": "sst2"}])
def test_unknown_preset_or_task_is_named(spectra, wanted):
    """The error says what was asked for and what there is."""
    with pytest.raises(InputError, match="giant.*'minilm', 'nano'|sst2.*'nli', 'sentiment'"):
        findings.runs_of(spectra, **wanted)


def test_mixed_tasks_make_no_table(spectra):
    """Totals over different tasks are not averaged."""
    for call in (tables.count_table, sentences.say_counts):
        with pytest.raises(InputError, match="one preset and task"):
            call(findings.runs_of(spectra, "nano"))


@pytest.mark.parametrize("label, text", [
    ("full", "full fine-tuning"), ("head", "head only"), ("lora-r8", "LoRA r = 8"),
    ("lora-r8.a_16", "r = 8 (a 16)"), ("mine", "mine")])
def test_labels_read_as_words(label, text):
    """Labels of runs become what a reader sees; a reader's own label stays."""
    assert findings.label_text(label) == text


def test_spread_is_the_sample_standard_deviation():
    """n - 1 in the denominator; one value has no spread; missing values are left out, never counted as 0."""
    assert findings.spread([1, 2, 3]) == "2.0 ± 1.0"
    assert findings.spread([4]) == "4.0"
    assert findings.spread([2.0, float("nan"), None, 4.0]) == "3.0 ± 1.4"
    assert findings.spread([]) == "–"


def test_compare_gives_welch_interval():
    """A hand-worked case: means 3 and 1, variances 1 and 1, three each: t(4) = 2.776, error sqrt(2/3)."""
    result = findings.compare([2, 3, 4], [0, 1, 2])
    half = 2.776 * math.sqrt(2 / 3)
    assert result[:3] == pytest.approx((2, 2 - half, 2 + half)) and result.word == "unclear"
    assert findings.compare([12, 13, 14], [0, 1, 2]).word == "more"
    assert findings.compare([0, 1, 2], [12, 13, 14]).word == "fewer"


def test_compare_without_spread():
    """One seed permits no judgement; samples that do not vary differ by exactly their difference."""
    assert findings.compare([9], [1, 2, 3]).word == "unclear"
    assert findings.compare([0, 0, 0], [0, 0, 0]) == (0, 0, 0, "unclear")
    assert findings.compare([5, 5], [0, 0]).word == "more"


def test_compare_covers_the_truth_as_often_as_it_says():
    """Of 2,000 intervals for two samples of five from one distribution about 95 % cover zero."""
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((2000, 2, 5))
    covered = np.mean([findings.compare(a, b).word == "unclear" for a, b in draws])
    assert 0.93 < covered < 0.98


def test_sentences_follow_the_runs_both_ways(spectra):
    """Exchanging measured and null exchanges "fewer" and "more": no direction is written into the sentence."""
    part = spectra[spectra["run"].str.startswith("full") & (spectra["task"] == "nli")]
    swapped = part.rename(columns={"max_cosine": "null_max_cosine", "null_max_cosine": "max_cosine"})
    said, reverse = (sentences.say_counts(findings.runs_of(table), 0.6, 40) for table in (part, swapped))
    assert "nulls: **fewer**: full fine-tuning" in said and "nulls: **more**: full fine-tuning" in reverse


def test_sentences_compare_every_rank_with_full_fine_tuning(spectra):
    """Exchanging the names of full fine-tuning and a rank that has more turns "more" into "fewer"."""
    part = spectra[(spectra["task"] == "nli") & spectra["run"].str.match("full|lora-r1-")]
    swapped = part.assign(run=part["run"].map(lambda run: {"f": "lora-r1-s", "l": "full-s"}[run[0]] + run[-1]))
    said, reverse = (sentences.say_counts(findings.runs_of(table), 0.5, 10) for table in (part, swapped))
    assert "Against full fine-tuning: **more**: LoRA r = 1" in said
    assert "Against full fine-tuning: **fewer**: LoRA r = 1" in reverse


def test_one_seed_makes_no_comparison(spectra):
    """With a single seed the sentence and the table say so."""
    runs = [run for run in findings.runs_of(spectra, "nano", "nli") if run.seed == 0]
    assert "one seed, so nothing can be compared" in sentences.say_counts(runs)
    assert "more" not in sentences.say_counts(runs) and "fewer" not in sentences.say_counts(runs)
    assert set(tables.verdict_table(runs)["count − null"]) == {"one seed"}


def test_verdict_table_agrees_with_compare(spectra):
    """Its interval and word are those of the two samples of counts."""
    runs = findings.runs_of(spectra, "nano", "nli")
    counts = [[run.count() for run in runs if run.label == label] for label in ("lora-r1", "full")]
    result = findings.compare(*counts)
    cell = tables.verdict_table(runs).loc["LoRA r = 1", "count − full's"]
    assert cell == f"{findings.signed(result.low)} to {findings.signed(result.high)}: {result.word}"


def test_gap_sentence_sorts_ranks_by_distance(summary):
    """Ranks inside and outside the tolerance are told apart, the latter with their gap."""
    table = summary[summary["preset"] == "nano"].copy()
    table["test_accuracy"] = table["label"].map({"full": 0.9, "head": 0.6, "lora-r1": 0.85}).fillna(0.895)
    said = sentences.say_gap(table, "nano", points=2)
    assert "Within 2 points: LoRA r = 8, LoRA r = 64. Further away: LoRA r = 1 (−5.0)." in said


def test_ladder_sentence_notices_a_broken_order(summary):
    """The order majority < head < full < ceiling is checked in every seed."""
    assert sentences.say_ladder(summary, "nano").count("the order holds in every seed") == 2
    broken = summary.assign(test_accuracy=summary["test_accuracy"].where(summary["label"] != "full", 0.5))
    assert "does not hold" in sentences.say_ladder(broken, "nano")
    assert "does not hold" in sentences.say_ladder(summary, "nano", ceiling=50)


def test_predicted_weights_is_the_formula():
    """m·n for full fine-tuning, r·(m + n) for LoRA, summed over matrices."""
    assert tables.predicted_weights([(512, 128), (128, 128)]) == 512 * 128 + 128 * 128
    assert tables.predicted_weights([(512, 128), (128, 128)], rank=8) == 8 * (640 + 256)


def test_weight_table_lays_the_formula_beside_the_runs(folder):
    """Predicted from the shapes, trained from the records, and their ratio."""
    table = tables.weight_table(load_records(folder), "nano")
    assert list(table.index) == ["full fine-tuning", "LoRA r = 1", "LoRA r = 8", "LoRA r = 64"]
    assert list(table["ratio"]) == ["1.0000"] * 4 and table.loc["LoRA r = 8", "formula"] == "Σ 8·(m + n)"


def test_tables_hold_every_method(summary, spectra):
    """Accuracy, settings and count tables have one row per method, in reading order."""
    rows = ["majority class", "head only", "full fine-tuning", "LoRA r = 1", "LoRA r = 8", "LoRA r = 64"]
    assert list(tables.accuracy_table(summary, "nano").index) == rows
    settings = tables.settings_table(summary, "nano")
    assert list(settings[settings["task"] == "nli"]["method"]) == rows[1:]
    table = tables.count_table(findings.runs_of(spectra, "nano", "nli"))
    assert list(table.index) == rows[2:] and list(table["seeds"]) == [3] * 4


def test_a_run_of_the_readers_stands_beside_ours(spectra):
    """live_run takes the table of measure_pairs, which knows no preset, task or run."""
    one = spectra[(spectra["run"] == "lora-r8-s0") & (spectra["task"] == "nli")]
    bare = one[["matrix", "index", "singular_value", "max_cosine", "null_max_cosine"]]
    recorded = next(run for run in findings.runs_of(one) if run.label == "lora-r8")
    assert findings.live_run("mine", bare).count(0.7, 20) == recorded.count(0.7, 20)
    assert isinstance(bare, pd.DataFrame)


def test_overview_table_holds_counts_accuracy_and_loss(summary, spectra):
    """Each cell is the mean ± sd of the runs' own numbers; the pseudo-loss column goes where no run has one."""
    runs = findings.runs_of(spectra, "nano", "nli")
    table = tables.overview_table(summary, runs)
    frame = findings.count_frame(runs, 0.9, 10)
    assert table.loc["LoRA r = 8", "ε = 0.9"] == findings.spread(frame[frame["label"] == "lora-r8"]["count"])
    part = summary[(summary["preset"] == "nano") & (summary["task"] == "nli") & (summary["label"] == "full")]
    assert table.loc["full fine-tuning", "accuracy, %"] == findings.spread(100 * part["test_accuracy"])
    assert any(str(name).startswith("pseudo-loss") for name in table.columns)
    without = tables.overview_table(summary.assign(pseudo_loss=float("nan")), runs)
    assert not any(str(name).startswith("pseudo-loss") for name in without.columns)


def test_a_variant_follows_its_main_series():
    """Sorted head, full, its variant, LoRA by rank; a reader sees the variant in brackets."""
    labels = ["lora-r16", "lora-r8.rate_1e-3", "full.rate_3e-4", "lora-r8", "full", "head"]
    ordered = ["head", "full", "full.rate_3e-4", "lora-r8", "lora-r8.rate_1e-3", "lora-r16"]
    assert sorted(labels, key=findings.label_order) == ordered
    assert findings.label_text("full.rate_3e-4") == "full (rate 3e-4)"
    assert findings.label_text("lora-r8.rate_1e-3") == "r = 8 (rate 1e-3)"
    assert findings.label_text("mine") == "mine"


def test_rates_are_compared_side_by_side(summary, spectra):
    """A variant's line holds trial, accuracy, count and loss of both rates, each computed from its own rows."""
    runs = findings.runs_of(spectra, "nano", "nli")
    full = [run for run in runs if run.label == "full"]
    gentle = [dataclasses.replace(run, label="full.rate_1e-5") for run in runs if run.label == "lora-r1"]
    rows = summary[(summary["preset"] == "nano") & (summary["task"] == "nli")]
    other = rows[rows["label"] == "lora-r1"].assign(label="full.rate_1e-5", learning_rate=1e-5)
    both = pd.concat([rows, other])
    rate = rows[rows["label"] == "full"]["learning_rate"].iloc[0]
    trials = pd.DataFrame({"preset": "nano", "task": "nli", "label": "full", "learning_rate": [rate, 1e-5],
                           "validation_accuracy": [0.801, 0.799]})
    line = sentences.say_rates(both, trials, full + gentle)
    counts = [findings.spread([run.count() for run in group]) for group in (full, gentle)]
    assert f"**{counts[0]}** and **{counts[1]}**" in line and "80.1 %" in line and "(79.9 %)" in line
    assert sentences.say_rates(summary, trials, full) == ""


def test_runs_that_did_not_learn_are_named(summary):
    """A LoRA run far below full fine-tuning is named with task, rank and seed; without one the sentence says so."""
    assert sentences.say_failed(summary, "nano", points=90).startswith("No run")
    weak = summary.copy()
    row = weak[(weak["preset"] == "nano") & (weak["label"] == "lora-r8")].index[0]
    weak.loc[row, "test_accuracy"] = 0.01
    said = sentences.say_failed(weak, "nano", points=50)
    assert "LoRA r = 8, seed" in said and "(1.0 %)" in said and said.startswith("1 of")


def test_runs_that_collapsed_are_not_counted(summary, spectra):
    """A run ten points below full fine-tuning's mean is left out of the counts; all others stay, in order."""
    runs = findings.runs_of(spectra, "nano", "nli")
    assert findings.learnt(runs, summary, points=100) == runs
    weak = summary.copy()
    lost = (weak["preset"] == "nano") & (weak["task"] == "nli") & (weak["label"] == "lora-r8") & (weak["seed"] == 0)
    weak.loc[lost, "test_accuracy"] = 0.01
    kept = findings.learnt(runs, weak, points=50)
    assert [run for run in runs if run not in kept] == [run for run in runs if (run.label, run.seed) == ("lora-r8", 0)]
    assert len(findings.rows_of(weak, kept)) == len(kept)
