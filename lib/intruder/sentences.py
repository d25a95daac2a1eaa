"""Sentences about results, computed from records: every number and every word of judgement comes from the data.

A sentence here stays true whichever way the runs went: "more" and "fewer" are said only where the 95 % interval of the
difference excludes zero. Each function returns Markdown. Needs numpy and pandas only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from .findings import (LEARNT_POINTS, RunSpectra, compare, count_frame, label_order, label_text, one_source, rows_of,
                       signed, spread)


def say_counts(runs: Sequence[RunSpectra], epsilon: float = 0.5, k: int = 10) -> str:
    """A Markdown list: full fine-tuning's count, which ranks have more or fewer, and who differs from its matched null.

    "More" and "fewer" stand only where the 95 % interval of the difference excludes zero (`tables.verdict_table` has
    the intervals); with one seed nothing is compared. The runs are of one preset and task, else InputError.
    """
    one_source(runs)
    frame = count_frame(runs, epsilon, k)
    groups = {label: frame[frame["label"] == label] for label in sorted(frame["label"].unique(), key=label_order)}
    mean = {label: f"{label_text(label)} ({spread(part['count'])})" for label, part in groups.items()}
    against_null = {label: f"{mean[label][:-1]} against {spread(part['null'])})" for label, part in groups.items()}
    lines = []
    if "full" in groups:
        full = groups["full"]["count"]
        others = {label: compare(part["count"], full).word for label, part in groups.items() if label != "full"}
        lines.append(f"- At ε = {epsilon:g} and k = {k}, full fine-tuning has **{spread(full)}** intruder dimensions "
                     f"among {groups['full']['slots'].iloc[0]} vectors ({_seeds(full)}).")
        lines += [f"- Against full fine-tuning: {_sorted_by_word(others, mean)}."] if others else []
    nulls = {label: compare(part["count"], part["null"]).word for label, part in groups.items()}
    lines.append(f"- Against their matched random nulls: {_sorted_by_word(nulls, against_null)}.")
    return "\n".join(lines)


def _seeds(values: Sequence[float]) -> str:
    return f"{len(values)} seeds" if len(values) != 1 else "one seed, so nothing can be compared"


def _sorted_by_word(words: dict[str, str], names: dict[str, str]) -> str:
    shown = {"more": "**more**", "unclear": "no clear difference", "fewer": "**fewer**"}
    parts = [(text, [names[label] for label in words if words[label] == word]) for word, text in shown.items()]
    return "; ".join(f"{text}: {', '.join(held)}" for text, held in parts if held)


def say_gap(summary: pd.DataFrame, preset: str, points: float = 2.0) -> str:
    """A Markdown list, one line per task: which ranks are within so many points of full fine-tuning, which are not."""
    lines = []
    for task, part in summary[summary["preset"] == preset].groupby("task"):
        means = 100 * part.groupby("label")["test_accuracy"].mean()
        if "full" not in means:
            continue
        labels = [label for label in sorted(means.index, key=label_order) if label.startswith("lora")]
        gaps = {label: means[label] - means["full"] for label in labels}
        if not gaps:
            continue
        near = [label_text(label) for label, gap in gaps.items() if abs(gap) <= points]
        far = [f"{label_text(label)} ({signed(gap)})" for label, gap in gaps.items() if abs(gap) > points]
        lines.append(f"- **{preset} · {task}**: full fine-tuning {means['full']:.1f} %. Within {points:g} points: "
                     f"{', '.join(near) or 'none'}. Further away: {', '.join(far) or 'none'}.")
    return "\n".join(lines)


def say_ladder(summary: pd.DataFrame, preset: str, ceiling: float = 99.5, step: float = 2.0) -> str:
    """A Markdown list, one line per task: is majority class < head only < full < the ceiling, in every seed?

    A step counts if it is at least `step` points high: on 2,000 test examples less can be chance.
    """
    lines = []
    for task, part in summary[summary["preset"] == preset].groupby("task"):
        head, full = (100 * part[part["label"] == label]["test_accuracy"] for label in ("head", "full"))
        if not len(head) or not len(full):
            continue
        majority = 100 * part["majority_accuracy"].iloc[0]
        holds = majority + step <= head.min() and head.max() + step <= full.min() and full.max() < ceiling
        verdict = "the order holds in every seed" if holds else "**the order does not hold in every seed**"
        lines.append(f"- **{task}**: majority {majority:.1f} %, head only {spread(head)} %, full fine-tuning "
                     f"{spread(full)} %, at most {full.max():.1f} %; {verdict}.")
    return "\n".join(lines)


def say_rates(summary: pd.DataFrame, trials: pd.DataFrame, runs: Sequence[RunSpectra], epsilon: float = 0.5,
              k: int = 10) -> str:
    """A Markdown list, one line per variant: the same method at the rate its trials chose and at another one.

    `trials` is the `summary_table` of the learning-rate trials. Each line sets side by side what the two rates scored
    in the trials, and accuracy, count and pseudo-loss of the reported runs. One preset and task, else InputError.
    """
    one_source(runs)
    counts, lines = count_frame(runs, epsilon, k), []
    mine = rows_of(summary, runs)
    tried_here = trials[(trials["preset"] == runs[0].preset) & (trials["task"] == runs[0].task)]
    for label in sorted({run.label for run in runs if "." in run.label}, key=label_order):
        pair = []
        for name in (label.partition(".")[0], label):
            rows = mine[mine["label"] == name]
            rate, count = rows["learning_rate"].iloc[0], counts[counts["label"] == name]
            trial = tried_here[(tried_here["label"] == label.partition(".")[0]) & (tried_here["learning_rate"] == rate)]
            pair.append((f"{rate:g}", spread(100 * trial["validation_accuracy"]), spread(100 * rows["test_accuracy"]),
                         spread(count["count"]), spread(count["null"]), spread(rows["pseudo_loss"], 2)))
        (rate, tried, accuracy, count, null, loss), other = pair
        lines.append(
            f"- **{label_text(label.partition('.')[0])}** at rate {rate} (chosen: {tried} % in its trial) and at "
            f"{other[0]} ({other[1]} %): test accuracy {accuracy} % and {other[2]} %; intruder dimensions **{count}** "
            f"and **{other[3]}** (matched nulls {null} and {other[4]}); pseudo-loss {loss} and {other[5]}.")
    return "\n".join(lines)


def say_failed(summary: pd.DataFrame, preset: str, points: float = LEARNT_POINTS) -> str:
    """One Markdown sentence naming the runs that did not learn: so many points below full fine-tuning's mean."""
    found, part = [], summary[summary["preset"] == preset]
    for task, rows in part.groupby("task"):
        floor = 100 * rows[rows["label"] == "full"]["test_accuracy"].mean() - points
        weak = rows[(100 * rows["test_accuracy"] < floor) & (rows["method"] != "head")]
        found += [f"{task}, {label_text(row.label)}, seed {row.seed} ({100 * row.test_accuracy:.1f} %)"
                  for row in weak.itertuples()]
    if not found:
        return f"No run of `{preset}` ended more than {points:g} points below full fine-tuning."
    return (f"{len(found)} of the {len(part)} runs of `{preset}` ended more than {points:g} points below full "
            f"fine-tuning: {'; '.join(found)}. They stay in the accuracies and in every figure; where "
            "intruders are counted in sentences and tables they are left out, because the directions they grew belong to "
            "no learnt task.")


def say_base(record: dict) -> str:
    """One Markdown paragraph on the nano base: how long it was pre-trained, what it learnt, what its spectra are."""
    settings, curve, rows = record["settings"], record["curve"], record["spectral_head"]
    first, last = curve[0], curve[-1]
    heads = [row["head"] for row in rows]
    return (f"It has {record['parameters']:,} parameters and {record['vocabulary']} words, and was pre-trained for "
            f"{settings['steps']:,} steps of {settings['batch_size']} documents. Its loss on held-out documents fell "
            f"from {first['held_out_loss']:.2f} nats per hidden word after {first['step']:,} steps to "
            f"**{last['held_out_loss']:.2f}** (guessing among all words: {math.log(record['vocabulary']):.2f}). "
            f"In its {len(rows)} matrices, {min(heads)} to {max(heads)} singular values stand clear of the random "
            f"bulk, that is above the largest one of the same entries in random places.")


def say_sizes(sizes: Sequence[dict]) -> str:
    """One Markdown paragraph: which size of the base leads on which reading, and what longer training adds.

    `sizes` is what `records.load_base_sizes` returns: the alternatives under one schedule, then the base that is used.
    """
    *others, base = sizes

    def name(record: dict) -> str:
        return f"{record['settings']['layers']} × {record['settings']['hidden_size']}"

    def heads(record: dict) -> float:
        return 100 * sum(record["head_accuracy"].values()) / len(record["head_accuracy"])
    lowest, best = min(others, key=lambda record: record["held_out_loss"]), max(others, key=heads)
    short = next(record for record in others if name(record) == name(base))
    spread_of_sizes = max(record["held_out_loss"] for record in others) - lowest["held_out_loss"]
    gain = short["held_out_loss"] - base["held_out_loss"]
    leads = "also" if best is lowest else name(best)
    return (f"After {short['settings']['steps']:,} steps {name(lowest)} has the lowest held-out loss "
            f"({lowest['held_out_loss']:.3f}) and {leads} the best heads in the mean ({heads(best):.1f} %); "
            f"{name(short)} stands at {short['held_out_loss']:.3f} and {heads(short):.1f} %. Trained for "
            f"{base['settings']['steps']:,} steps, {name(base)} comes to **{base['held_out_loss']:.3f}** and "
            f"{heads(base):.1f} %: longer training lowers the loss by {gain:.2f}, where all the sizes together differ "
            f"by {spread_of_sizes:.2f}.")
