"""Sentences about results, computed from records: every number and every word of judgement comes from the data.

A sentence here stays true whichever way the runs went: "more" and "fewer" are said only where the 95 % interval of the
difference excludes zero. Each function returns Markdown. Needs numpy and pandas only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .findings import RunSpectra, one_source, compare, count_frame, label_order, label_text, spread


def say_counts(runs: Sequence[RunSpectra], epsilon: float = 0.5, k: int = 10) -> str:
    """A Markdown list, one line per method: its count over seeds, against its null and against full fine-tuning.

    Every number and every word comes from the runs, so the sentence stays true whichever way they went.
    """
    one_source(runs)
    frame = count_frame(runs, epsilon, k)
    full = frame[frame["label"] == "full"]["count"]
    lines = []
    for label in sorted(frame["label"].unique(), key=label_order):
        part = frame[frame["label"] == label]
        line = (f"- **{label_text(label)}**: {spread(part['count'])} of {part['slots'].iloc[0]} vectors, seeds: "
                f"{len(part)}; matched null {spread(part['null'])}{_verdict(part['count'], part['null'], 'its null')}")
        if label != "full" and len(full):
            line += _verdict(part["count"], full, "full fine-tuning")
        lines.append(line + ".")
    return "\n".join(lines)


def _verdict(a: Sequence[float], b: Sequence[float], name: str) -> str:
    result = compare(a, b)
    if not np.isfinite(result.low):
        return f"; one seed only, so no comparison with {name}"
    interval = f"difference {result.difference:+.1f}, 95 % interval {result.low:+.1f} to {result.high:+.1f}"
    words = {"more": f"more than {name}", "fewer": f"fewer than {name}", "unclear": f"no clear difference from {name}"}
    return f"; {words[result.word]} ({interval})"


def say_gap(summary: pd.DataFrame, preset: str, points: float = 2.0) -> str:
    """A Markdown list, one line per task: which ranks are within so many points of full fine-tuning, which are not."""
    lines = []
    for task, part in summary[summary["preset"] == preset].groupby("task"):
        means = 100 * part.groupby("label")["test_accuracy"].mean()
        if "full" not in means:
            continue
        labels = [label for label in sorted(means.index, key=label_order) if label.startswith("lora")]
        gaps = {label: means[label] - means["full"] for label in labels}
        near = [label_text(label) for label, gap in gaps.items() if abs(gap) <= points]
        far = [f"{label_text(label)} ({gap:+.1f})" for label, gap in gaps.items() if abs(gap) > points]
        lines.append(f"- **{preset} · {task}**: full fine-tuning {means['full']:.1f} %. Within {points:g} points: "
                     f"{', '.join(near) or 'none'}. Further away: {', '.join(far) or 'none'}.")
    return "\n".join(lines)


def say_ladder(summary: pd.DataFrame, preset: str, ceiling: float = 99.5) -> str:
    """A Markdown list, one line per task: is majority class < head only < full < the ceiling, in every seed?"""
    lines = []
    for task, part in summary[summary["preset"] == preset].groupby("task"):
        head, full = (100 * part[part["label"] == label]["test_accuracy"] for label in ("head", "full"))
        if not len(head) or not len(full):
            continue
        majority = 100 * part["majority_accuracy"].iloc[0]
        holds = majority < head.min() and head.max() < full.min() and full.max() < ceiling
        verdict = "the order holds in every seed" if holds else "**the order does not hold in every seed**"
        lines.append(f"- **{task}**: majority {majority:.1f} %, head only {spread(head)} %, full fine-tuning "
                     f"{spread(full)} %, at most {full.max():.1f} %; {verdict}.")
    return "\n".join(lines)
