"""One call for every use: sliders that a live kernel answers, or the chart that answers by itself in the built page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import altair as alt
import ipywidgets
import pandas as pd

from .charts import INTRUDER_COLOUR, NULL_COLOUR, colours, explorer, match_encoding, static
from .errors import InputError
from .findings import RunSpectra, count_frame, label_order, label_text, live_run, runs_of, spread
from .records import load_spectra, results_folder


def explore(preset: str | None = None, task: str | None = None, live: Mapping[str, object] | None = None, *,
            epsilon: float = 0.5, k: int = 10, rank: int | None = None, k_max: int = 32,
            folder: str | Path | None = None) -> alt.HConcatChart | Explorer:
    """Sliders for method or rank, epsilon, k and task over the committed runs of a preset.

    In the book's static build this is `charts.explorer`, which counts in the browser; with a live kernel it is an
    `Explorer`, whose controls call `count_intruders`. Both start at the paper's epsilon = 0.5 and k = 10.

    Without a task, every task is offered on which more than one method was run.
    `live` adds runs of the reader's, {name: run}, beside the committed ones of the first task shown: a run is a result
    of `quick_run`, or the table of spectra that `measure_pairs` returns. `rank` says where the first slider starts,
    `k_max` where the third ends, `folder` where the records are (the committed ones by default).
    Raises InputError for a preset, task or rank without records.
    """
    runs = runs_of(load_spectra(folder or results_folder()), preset, task)
    if not runs:
        raise InputError("the records hold no spectra; wanted some: `intruder run CONFIG --out DIR`, then gather DIR")
    if task is None:  # a task with a single method has nothing to compare
        methods = {source: {run.label for run in runs if run.source == source} for source in {r.source for r in runs}}
        most = max(map(len, methods.values()))
        runs = [run for run in runs if len(methods[run.source]) > 1 or most == 1]
    for name, run in (live or {}).items():
        runs.append(live_run(name, getattr(run, "spectra", run), runs[0].preset, runs[0].task))
    label = _start(runs, rank)
    if static():
        return explorer(runs, epsilon=epsilon, k=k, label=label, k_max=k_max)
    return Explorer(runs, epsilon=epsilon, k=k, label=label, k_max=k_max)


def _start(runs: list[RunSpectra], rank: int | None) -> str:
    labels = sorted({run.label for run in runs}, key=label_order)
    wanted = f"lora-r{8 if rank is None else rank}"
    if rank is not None and wanted not in labels:
        held = ", ".join(map(label_text, labels))
        raise InputError(f"rank={rank!r} has no run; wanted one of {held}: call explore(preset, rank=...)")
    return wanted if wanted in labels else labels[min(1, len(labels) - 1)]


class Explorer(ipywidgets.VBox):
    """Controls over runs, for a live kernel: method or rank, epsilon, k, task; a sentence; a chart redrawn in place."""

    def __init__(self, runs: list[RunSpectra], epsilon: float, k: int, label: str, k_max: int) -> None:
        self.runs = runs
        k_max = min(k_max, *(run.depth for run in runs))
        labels = sorted({run.label for run in runs}, key=label_order)
        sources = list(dict.fromkeys(run.source for run in runs))
        look = {"style": {"description_width": "8em"}, "layout": ipywidgets.Layout(width="30em")}
        late = {"continuous_update": False, **look}  # one count per move, not one per pixel
        self.choice = ipywidgets.SelectionSlider(
            options=[(label_text(name), name) for name in labels], value=label, description="method, rank", **late)
        self.epsilon = ipywidgets.FloatSlider(
            value=epsilon, min=0.01, max=1, step=0.01, description="threshold ε", **late)
        self.k = ipywidgets.IntSlider(value=min(k, k_max), min=1, max=k_max, description="top k", **late)
        self.task = ipywidgets.Dropdown(options=sources, value=sources[0], description="runs", **look)
        self.text = ipywidgets.HTML()
        self.chart = alt.JupyterChart(self.draw())
        controls = (self.choice, self.epsilon, self.k, self.task)
        for control in controls:
            control.observe(self.redraw, "value")
        super().__init__([*controls, self.text, self.chart])

    def redraw(self, _=None) -> None:
        """Count again with the controls' values, and show the sentence and the chart."""
        self.chart.chart = self.draw()

    def draw(self) -> alt.HConcatChart:
        """The chart at the controls' values; sets the sentence above it."""
        epsilon, k = round(self.epsilon.value, 2), self.k.value
        runs = [run for run in self.runs if run.source == self.task.value]
        chosen = [run for run in runs if run.label == self.choice.value]
        frame = count_frame(runs, epsilon, k)
        part = frame[frame["label"] == self.choice.value]
        self.text.value = self.sentence(part) if chosen else "No run of this method is recorded here."
        left = [_points(chosen[0], epsilon, k)] if chosen else []
        return alt.hconcat(*left, _bars(frame)).resolve_scale(color="independent", shape="independent")

    def sentence(self, part: pd.DataFrame) -> str:
        """The count of the chosen method, seed by seed, with its matched null's."""
        seeds, nulls = (", ".join(map(str, part[name])) for name in ("count", "null"))
        return (f"<b>{label_text(self.choice.value)}, {self.task.value}: {spread(part['count'])}</b> intruder "
                f"dimensions among {part['slots'].iloc[0]} vectors (seed by seed: {seeds}). "
                f"Matched random null: {part['null'].mean():.1f} ({nulls}).")


def _points(run: RunSpectra, epsilon: float, k: int) -> alt.LayerChart:
    count = len(run.names)
    rows = []
    for place, (name, cosines) in enumerate(zip(run.names, run.cosines)):
        shift = 0.7 * ((place + 0.5) / count - 0.5)  # matrices side by side within one j
        rows += [{"matrix": name, "j": j + 1, "x": j + 1 + shift, "m": round(float(cosines[j]), 4),
                  "kind": "intruder" if cosines[j] < epsilon else "matched"} for j in range(k)]
    points = alt.Chart(alt.Data(values=rows)).mark_point(size=26).encode(
        x=alt.X("x:Q", title="j (by falling singular value)", scale=alt.Scale(domain=[0.5, k + 0.5], nice=False)),
        y=alt.Y("m:Q", title="max cosine", scale=alt.Scale(domain=[0, 1])),
        tooltip=["matrix:N", "j:Q", "m:Q"], **match_encoding())
    line = alt.Chart(alt.Data(values=[{"e": epsilon}])).mark_rule(strokeDash=[5, 4], color=INTRUDER_COLOUR)
    return alt.layer(points, line.encode(y="e:Q")).properties(width=260, height=250)


def _bars(frame: pd.DataFrame) -> alt.LayerChart:
    labels = sorted(frame["label"].unique(), key=label_order)
    texts = [label_text(label) for label in labels]
    rows = [{"method": label_text(row["label"]), "count": row["count"], "null": row["null"], "seed": row["seed"]}
            for row in frame.to_dict("records")]
    base = alt.Chart(alt.Data(values=rows)).encode(y=alt.Y("method:N", sort=texts, title=None))
    bars = base.mark_bar(height=alt.RelativeBandSize(0.6)).encode(
        x=alt.X("mean(count):Q", title="intruder dimensions (grey tick: matched null)"),
        color=alt.Color("method:N", scale=alt.Scale(domain=texts, range=colours(labels)), legend=None))
    null = base.mark_tick(thickness=3, color=NULL_COLOUR).encode(x="mean(null):Q")
    seeds = base.mark_circle(size=22, color="#444").encode(x="count:Q", tooltip=["seed:O", "count:Q", "null:Q"])
    return alt.layer(bars, null, seeds).properties(width=200, height=250)
