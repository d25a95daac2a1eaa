"""From records to the numbers a page states: counts per run, mean and spread over seeds, and what may be concluded.

Pages hold no arithmetic. They call these functions, which call `count_intruders` and nothing cleverer, so a table, a
sentence, a slider and the command line cannot disagree. Needs numpy and pandas only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from .errors import InputError
from .intruders import count_intruders

METHODS = ("head", "full", "lora")
EPSILONS = (0.3, 0.5, 0.7, 0.9)
LEARNT_POINTS = 10.0
# 97.5 % points of Student's t for 1 to 30 degrees of freedom; beyond 30 the last one errs on the safe side
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
           2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


@dataclass(frozen=True)
class RunSpectra:
    """The max cosines m_j of one run, matrix by matrix, with those of its matched random null.

    cosines[a] and nulls[a] are (n_a,) float64 arrays for the matrix names[a], in order of falling singular value.
    """

    preset: str
    task: str
    label: str
    method: str
    rank: int | None
    seed: int
    names: tuple[str, ...]
    cosines: tuple[np.ndarray, ...]
    nulls: tuple[np.ndarray, ...]

    @property
    def source(self) -> str:
        """Preset and task as one phrase: `nano · nli`."""
        return f"{self.preset} · {self.task}"

    @property
    def depth(self) -> int:
        """The largest k that every matrix of the run has vectors for."""
        return min(len(cosines) for cosines in self.cosines)

    def slots(self, k: int = 10) -> int:
        """How many vectors are examined: k in each matrix, so the ceiling of the count."""
        return k * len(self.names)

    def count(self, epsilon: float = 0.5, k: int = 10) -> int:
        """Intruder dimensions of the whole run: the sum over matrices of #{j <= k : m_j < epsilon} (Algorithm 1)."""
        return sum(count_intruders(cosines, epsilon=epsilon, k=k) for cosines in self.cosines)

    def null_count(self, epsilon: float = 0.5, k: int = 10) -> int:
        """The same count for W0 plus an update with this run's singular values and random directions."""
        return sum(count_intruders(cosines, epsilon=epsilon, k=k) for cosines in self.nulls)


def label_order(label: str) -> tuple[int, int, str]:
    """Sort key for labels: head, full, then LoRA by rank, a variant after its main series; anything else last."""
    main, _, variant = label.partition(".")
    method, _, rank = main.partition("-r")
    place = METHODS.index(method) if method in METHODS else len(METHODS)
    return place, int(rank) if rank.isdigit() else 0, variant if place < len(METHODS) else label


def label_text(label: str) -> str:
    """The name a reader sees: `full` is "full fine-tuning", `lora-r8.rate_1e-3` is "r = 8 (rate 1e-3)"."""
    main, _, variant = label.partition(".")
    method, _, rank = main.partition("-r")
    named = {"full": "full fine-tuning", "head": "head only", "lora": f"LoRA r = {rank}"}
    if method not in named or (method == "lora") != rank.isdigit():
        return label
    if not variant:
        return named[method]
    return f"{named[method].removeprefix('LoRA ').removesuffix(' fine-tuning')} ({variant.replace('_', ' ')})"


def runs_of(spectra: pd.DataFrame, preset: str | None = None, task: str | None = None) -> list[RunSpectra]:
    """One `RunSpectra` for every run in a table of `load_spectra`, ordered by preset, task, label and seed.

    Cosines become float64, so that a comparison with epsilon means the same here, in `count_intruders` and in the
    browser. Raises InputError where a preset or task is asked for that the table does not hold.
    """
    for column, wanted in (("preset", preset), ("task", task)):
        held = sorted(spectra[column].unique())
        if wanted is not None and wanted not in held:
            names = ", ".join(map(repr, held)) or "none yet"
            raise InputError(f"{column} {wanted!r} has no spectra; wanted one of {names}: "
                             "call runs_of(load_spectra(folder), preset, task)")
        spectra = spectra if wanted is None else spectra[spectra[column] == wanted]
    keys = ["preset", "task", "run", "method", "rank", "seed"]
    found = [_one_run(dict(zip(keys, key)), rows) for key, rows in spectra.groupby(keys, dropna=False, sort=False)]
    return sorted(found, key=lambda run: (run.preset, run.task, label_order(run.label), run.seed))


def _one_run(key: dict, rows: pd.DataFrame) -> RunSpectra:
    rows = rows.sort_values(["matrix", "index"], kind="stable")
    groups = [(str(name), part) for name, part in rows.groupby("matrix", sort=False)]
    columns = {name: tuple(part[name].to_numpy(np.float64) for _, part in groups)
               for name in ("max_cosine", "null_max_cosine")}
    rank = None if pd.isna(key["rank"]) else int(key["rank"])
    return RunSpectra(
        preset=str(key["preset"]), task=str(key["task"]), label=str(key["run"]).rsplit("-s", 1)[0],
        method=str(key["method"]), rank=rank, seed=int(key["seed"]), names=tuple(name for name, _ in groups),
        cosines=columns["max_cosine"], nulls=columns["null_max_cosine"])


def live_run(label: str, spectra: pd.DataFrame, preset: str = "live", task: str = "live", seed: int = 0) -> RunSpectra:
    """A run that is not on disk yet, from the table that `measure_pairs` returns, under a label of the reader's."""
    keys = {"preset": preset, "task": task, "run": f"{label}-s{seed}", "method": "live", "rank": None, "seed": seed}
    return _one_run(keys, spectra)


def learnt(runs: Iterable[RunSpectra], summary: pd.DataFrame, points: float = LEARNT_POINTS) -> list[RunSpectra]:
    """The runs that learnt their task: test accuracy at most so many points below full fine-tuning's mean.

    A run that collapsed to guessing moved its weights far without learning anything; counted with the others, its
    directions would pass for a property of the method. `sentences.say_failed` names the runs that this leaves out.
    """
    accuracy = {(row.preset, row.task, row.label, row.seed): 100 * row.test_accuracy for row in summary.itertuples()}
    full = summary[summary["label"] == "full"].groupby(["preset", "task"])["test_accuracy"].mean()
    return [run for run in runs if accuracy[run.preset, run.task, run.label, run.seed]
            >= 100 * full[run.preset, run.task] - points]


def count_frame(runs: Iterable[RunSpectra], epsilon: float = 0.5, k: int = 10) -> pd.DataFrame:
    """One row per run: source, label, seed, its count, its null's count and the number of vectors examined."""
    rows = [(run.source, run.label, run.seed, run.count(epsilon, k), run.null_count(epsilon, k), run.slots(k))
            for run in runs]
    return pd.DataFrame(rows, columns=["source", "label", "seed", "count", "null", "slots"])


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation (n - 1 in the denominator) as text; a single value stands alone; none gives a dash."""
    values = np.asarray([value for value in values if value is not None and not pd.isna(value)], dtype=float)
    if len(values) == 0:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


class Comparison(NamedTuple):
    """Mean of a minus mean of b, its 95 % interval, and the word the interval permits: more, fewer or unclear."""

    difference: float
    low: float
    high: float
    word: str


def compare(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Welch's 95 % interval for mean(a) - mean(b), the two samples being seeds of two methods.

    The word is "more" or "fewer" where the interval excludes zero and "unclear" otherwise. With fewer than two values
    on a side there is no spread to judge by: the interval is infinite and the word "unclear". Where neither sample
    varies at all the interval is the difference itself.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if len(a) < 2 or len(b) < 2:
        difference = float(a.mean() - b.mean()) if len(a) and len(b) else float("nan")
        return Comparison(difference, float("-inf"), float("inf"), "unclear")
    difference = float(a.mean() - b.mean())
    share_a, share_b = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    error = float(np.sqrt(share_a + share_b))
    freedom = (share_a + share_b) ** 2 / (share_a**2 / (len(a) - 1) + share_b**2 / (len(b) - 1)) if error else 1.0
    half = STUDENT[int(np.clip(freedom, 1, len(STUDENT))) - 1] * error
    low, high = difference - half, difference + half
    return Comparison(difference, low, high, "more" if low > 0 else "fewer" if high < 0 else "unclear")


def signed(value: float) -> str:
    """One decimal with its sign, a true minus included: +1.5, −0.3."""
    return f"{value:+.1f}".replace("-", "−")


def rows_of(summary: pd.DataFrame, runs: Iterable[RunSpectra]) -> pd.DataFrame:
    """The rows of a `records.summary_table` that belong to these runs."""
    wanted = {(run.preset, run.task, run.label, run.seed) for run in runs}
    keys = zip(summary["preset"], summary["task"], summary["label"], summary["seed"])
    return summary[[key in wanted for key in keys]]


def one_source(runs: Sequence[RunSpectra]) -> None:
    """Raise InputError unless all runs are of one preset and task."""
    sources = sorted({run.source for run in runs})
    if len(sources) != 1:
        raise InputError(f"runs of {' and '.join(sources) or 'nothing'} were given; wanted those of one preset and "
                         "task: call runs_of(spectra, preset, task)")
