"""Tables of results, every cell computed from records: what the chapters show and nobody types.

Each function returns a DataFrame of texts and numbers ready to be displayed. Needs numpy and pandas only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from .findings import (EPSILONS, Comparison, RunSpectra, compare, count_frame, label_order, label_text, live_run,
                       one_source, rows_of, signed, spread)
from .records import RunRecord


def overview_table(summary: pd.DataFrame, runs: Sequence[RunSpectra], k: int = 10) -> pd.DataFrame:
    """Rows: methods of one preset and task. Columns: rate, accuracy, counts at four epsilons, pseudo-loss; mean ± sd.

    The pseudo-loss (nats per token) has the base's own in its heading; the column is left out where no run has one.
    """
    one_source(runs)
    part = rows_of(summary, runs)
    counts, rows = {epsilon: count_frame(runs, epsilon, k) for epsilon in EPSILONS}, {}
    loss = f"pseudo-loss (base {part['base_pseudo_loss'].mean():.3f})"
    for label in sorted({run.label for run in runs}, key=label_order):
        mine = part[part["label"] == label]
        cells = {"seeds": len(mine), "rate": f"{mine['learning_rate'].iloc[0]:g}",
                 "accuracy, %": spread(100 * mine["test_accuracy"])}
        cells |= {f"ε = {epsilon:g}": spread(frame[frame["label"] == label]["count"])
                  for epsilon, frame in counts.items()}
        rows[label_text(label)] = cells | {loss: spread(mine["pseudo_loss"], 3)}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table = table if part["pseudo_loss"].notna().any() else table.drop(columns=loss)
    return table.rename_axis(columns=f"k = {k}")


def count_table(runs: Sequence[RunSpectra], epsilons: Sequence[float] = EPSILONS, k: int = 10) -> pd.DataFrame:
    """Rows: methods. Columns: epsilon. Cells: mean ± sd of the count over seeds, and the null's mean in brackets.

    The runs are of one preset and task; otherwise InputError, since their totals are over different matrices or data.
    """
    one_source(runs)
    frames = {epsilon: count_frame(runs, epsilon, k).groupby("label") for epsilon in epsilons}
    labels = sorted({run.label for run in runs}, key=label_order)
    cells = [[f"{spread(frame.get_group(label)['count'])} ({frame.get_group(label)['null'].mean():.1f})"
              for frame in frames.values()] for label in labels]
    seeds = [sum(run.label == label for run in runs) for label in labels]
    table = pd.DataFrame(cells, columns=[f"ε = {epsilon:g}" for epsilon in epsilons])
    table.insert(0, "seeds", seeds)
    return table.set_axis(map(label_text, labels)).rename_axis(columns=f"k = {k}")


def verdict_table(runs: Sequence[RunSpectra], epsilon: float = 0.5, k: int = 10) -> pd.DataFrame:
    """Rows: methods. Columns: count and null's count (mean ± sd), the 95 % interval of each difference with its word.

    The intervals are Welch's (`compare`), one by one, not corrected for their number. One preset and task only.
    """
    one_source(runs)
    frame = count_frame(runs, epsilon, k)
    full, rows = frame[frame["label"] == "full"]["count"], {}
    for label in sorted(frame["label"].unique(), key=label_order):
        part = frame[frame["label"] == label]
        rows[label_text(label)] = (
            spread(part["count"]), spread(part["null"]), _interval(compare(part["count"], part["null"])),
            _interval(compare(part["count"], full)) if label != "full" and len(full) else "–")
    columns = ["count", "matched null", "count − null", "count − full's"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    return table.rename_axis(columns=f"ε = {epsilon:g}, k = {k}")


def _interval(result: Comparison) -> str:
    if not np.isfinite(result.low):
        return "one seed"
    return f"{signed(result.low)} to {signed(result.high)}: {result.word}"


def accuracy_table(summary: pd.DataFrame, preset: str) -> pd.DataFrame:
    """Rows: majority class, then methods. Columns: tasks of the preset. Cells: test accuracy in per cent, mean ± sd."""
    part = summary[summary["preset"] == preset]
    tasks = sorted(part["task"].unique())
    labels = sorted(part["label"].unique(), key=label_order)
    cells = {}
    for task in tasks:
        rows = part[part["task"] == task]
        cells[task] = [spread(100 * rows["majority_accuracy"].iloc[:1])]
        cells[task] += [spread(100 * rows[rows["label"] == label]["test_accuracy"]) for label in labels]
    rows = ["majority class", *map(label_text, labels)]
    return pd.DataFrame(cells, index=rows).rename_axis(columns="test accuracy, %")


def size_table(sizes: Sequence[dict]) -> pd.DataFrame:
    """Rows: sizes of the base, as `records.load_base_sizes` returns them. Columns: what the choice was made on.

    Held-out loss in nats per hidden word, validation accuracy of a head on the frozen encoder (mean over tasks), and
    how many singular values of a matrix stand clear of the random bulk (median, least to most).
    """
    rows = {}
    for record in sizes:
        settings, heads, clear = record["settings"], record["head_accuracy"], record["spectral_head"]
        name = f"{settings['layers']} × {settings['hidden_size']}, {settings['steps']:,} steps"
        rows[name] = {"parameters": f"{record['parameters']:,}", "held-out loss": f"{record['held_out_loss']:.3f}",
                      "heads, mean %": f"{100 * np.mean(list(heads.values())):.1f}"}
        rows[name] |= {"clear of the bulk": f"{np.median(clear):g} ({min(clear)}–{max(clear)})"}
    return pd.DataFrame.from_dict(rows, orient="index")


def predicted_weights(shapes: Iterable[Sequence[int]], rank: int | None = None) -> int:
    """Weights trained inside matrices of shapes (m, n): all m·n of them, or r·(m + n) for LoRA of rank r (B and A)."""
    return sum(m * n if rank is None else rank * (m + n) for m, n in shapes)


def weight_table(records: Iterable[RunRecord], preset: str) -> pd.DataFrame:
    """Rows: methods. Columns: the formula, the number it predicts, the number the runs trained, and their ratio."""
    rows = {}
    for record in records:
        shapes = [matrix["shape"] for matrix in record.matrices]
        if record.config["preset"] != preset or not shapes:
            continue
        rank = record.config["rank"]
        predicted, trained = predicted_weights(shapes, rank), record.training["trainable"]["adapted"]
        formula = "Σ m·n" if rank is None else f"Σ {rank}·(m + n)"
        cells = (formula, f"{predicted:,}", f"{trained:,}", f"{trained / predicted:.4f}")
        rows[record.label] = (label_text(record.label), *cells)
    cells = {rows[label][0]: rows[label][1:] for label in sorted(rows, key=label_order)}
    return pd.DataFrame.from_dict(cells, orient="index", columns=["formula", "predicted", "trained", "ratio"])


def settings_table(summary: pd.DataFrame, preset: str) -> pd.DataFrame:
    """Rows: tasks and methods. Columns: learning rate, alpha, steps and number of seeds of the reported runs."""
    part = summary[summary["preset"] == preset]
    keys = sorted({(row.task, row.label) for row in part.itertuples()}, key=lambda key: (key[0], label_order(key[1])))
    rows = []
    for task, label in keys:
        runs = part[(part["task"] == task) & (part["label"] == label)]
        cells = [", ".join(f"{value:g}" for value in sorted(runs[name].dropna().unique())) or "–"
                 for name in ("learning_rate", "alpha", "steps")]
        rows.append((task, label_text(label), *cells, len(runs)))
    return pd.DataFrame(rows, columns=["task", "method", "learning rate", "α", "steps", "seeds"])


def live_table(live: Mapping[str, object], epsilon: float = 0.5, k: int = 10) -> pd.DataFrame:
    """Rows: runs made a moment ago, {name: result of quick_run}. Columns: accuracy, weights, count, null's count.

    A result has a `record` (RunRecord) and its `spectra`, as `run.quick_run` returns them.
    """
    rows = {}
    for name, result in live.items():
        run = live_run(name, result.spectra)
        rows[name] = (f"{100 * result.record.metrics['test_accuracy']:.1f}",
                      f"{result.record.training['trainable']['adapted']:,}", run.count(epsilon, k),
                      run.null_count(epsilon, k), run.slots(k))
    columns = ["test accuracy, %", "trained weights", "intruders", "matched null", "vectors"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    return table.rename_axis(columns=f"ε = {epsilon:g}, k = {k}")
