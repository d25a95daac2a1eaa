"""Records to Altair charts. The same chart answers to its sliders in the built page, without a kernel or a network.

In the book's build (BOOK_STATIC=1) a renderer writes inert HTML that lib/static/hydrate.js brings to life; elsewhere
Altair's default renderer shows it. Works with Altair 5.5 (Colab) and 6. Never imports torch.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence

import altair as alt
import numpy as np
import pandas as pd

from .errors import InputError
from .findings import EPSILONS, RunSpectra, count_frame, label_order, label_text, spread

# Grid points of 1/1000. A cosine m is stored as v, the number of grid points <= m, so that for a whole number E
# m < E/1000 exactly when v < E: the browser's counts equal count_intruders on every slider position, without rounding.
GRID = np.arange(1, 1001) / 1000
FULL_COLOUR, NULL_COLOUR, INTRUDER_COLOUR = "#3b7dd8", "#888888", "#d6336c"
FULL_LIGHT = "#9dc0f2"  # a variant of full fine-tuning, such as another learning rate
LORA_DARK, LORA_LIGHT = (146, 64, 14), (245, 176, 92)


def static() -> bool:
    """True while the book is being built, where no kernel will be there to answer a reader."""
    return os.environ.get("BOOK_STATIC") == "1"


def enable() -> None:
    """Choose Altair's renderer: the book's own in the static build, the default one in Jupyter, Colab and VS Code."""
    alt.data_transformers.disable_max_rows()
    if static():
        alt.renderers.register("book", book_html)
        alt.renderers.enable("book")
    else:
        alt.renderers.enable("default")


def book_html(spec: dict, **_) -> dict[str, str]:
    """The MIME bundle of a chart in the built page: a figure with its specification, caption and table of numbers."""
    meta = dict(spec.get("usermeta") or {})
    table, caption = meta.pop("table", ""), html.escape(meta.pop("caption", ""))
    body = json.dumps({**spec, "usermeta": meta}, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
    label = html.escape(spec.get("description", ""), quote=True)
    return {"text/plain": spec.get("description", "chart"), "text/html": (
        f'<figure class="book-figure"><div class="book-vega" role="group" aria-label="{label}">'
        f'<script type="application/json">{body}</script><div class="book-controls"></div>'
        '<div class="book-vega-target"></div><output class="book-readout" aria-live="polite"></output>'
        "<noscript><p>This figure needs JavaScript; the table below holds its numbers.</p></noscript></div>"
        f"<figcaption>{caption}</figcaption><details class=\"book-table\">"
        f"<summary>The numbers of this figure as a table</summary>{table}</details></figure>")}


def table_html(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain HTML table with column headers; every cell is escaped."""
    head = "".join(f'<th scope="col">{html.escape(str(column))}</th>' for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def count_table_html(runs: Sequence[RunSpectra], k: int) -> str:
    """The text alternative of a figure of counts: mean ± sd of count and null, per method, at four thresholds."""
    frames = [count_frame(runs, epsilon, k) for epsilon in EPSILONS]
    rows = []
    for source, label in dict.fromkeys((run.source, run.label) for run in runs):
        parts = [frame[(frame["source"] == source) & (frame["label"] == label)] for frame in frames]
        cells = [f"{spread(part['count'])} (null {spread(part['null'])})" for part in parts]
        rows.append([source, label_text(label), *cells])
    return table_html(["runs", "method", *(f"ε = {epsilon:g}, k = {k}" for epsilon in EPSILONS)], rows)


def pack(cosines: Sequence[np.ndarray], k: int) -> list[int]:
    """The first k cosines of each matrix as whole per-mille (see GRID): first all with j = 1, then all with j = 2, …"""
    by_index = np.stack([values[:k] for values in cosines], axis=1).ravel()
    return np.searchsorted(GRID, by_index, side="right").tolist()


def colours(labels: Sequence[str]) -> list[str]:
    """One colour per label: the method gives the hue, the LoRA rank the lightness (low ranks dark)."""
    lora = [label for label in labels if label.startswith("lora")]
    shades = {label: FULL_LIGHT if "." in label else FULL_COLOUR for label in labels if label.startswith("full")}
    for place, label in enumerate(lora):
        part = place / max(len(lora) - 1, 1)
        shades[label] = "#" + "".join(f"{round(a + part * (b - a)):02x}" for a, b in zip(LORA_DARK, LORA_LIGHT))
    return [shades.get(label, NULL_COLOUR) for label in labels]


def explorer(runs: Sequence[RunSpectra], epsilon: float = 0.5, k: int = 10, label: str = "lora-r8",
             k_max: int = 32) -> alt.HConcatChart:
    """Intruder counts that answer to method or rank, epsilon, k and task.

    Left: max cosine of each of the k leading vectors of every matrix, for one seed of the chosen method. Right: the
    count of every method as mean over seeds, with each seed as a dot and the matched random null as a tick. The
    sentence beneath gives the chosen method's count, seed by seed. k_max is lowered to the smallest matrix's n.
    Raises InputError if there are no runs.
    """
    _some(runs, "explorer")
    k_max = min(k_max, *(run.depth for run in runs))
    labels = sorted({run.label for run in runs}, key=label_order)
    texts = [label_text(name) for name in labels]
    sources = list(dict.fromkeys(run.source for run in runs))
    sliders = {
        "choice": (labels.index(label) if label in labels else len(labels) - 1, 0, len(labels) - 1, 1, "method, rank"),
        "eps": (epsilon, 0.01, 1, 0.01, "threshold ε"),
        "k": (min(k, k_max), 1, k_max, 1, "top k"),
    }
    controls = [alt.param(name=name, value=value, bind=alt.binding_range(min=low, max=high, step=step, name=text))
                for name, (value, low, high, step, text) in sliders.items()]
    controls += [
        alt.param(name="task", value=sources[0], bind=alt.binding_select(options=sources, name="runs")),
        alt.param(name="cut", expr="round(1000 * eps)"),
        alt.param(name="names", value={run.source: list(run.names) for run in runs}),
        alt.param(name="numbers_at", value=148),
    ]
    data = alt.Data(values=_packed_rows(runs, labels, k_max))
    chart = alt.hconcat(_scatter(), _bars(labels), data=data, spacing=12).add_params(*controls)
    return chart.resolve_scale(color="independent", shape="independent").properties(
        usermeta={
            "slider": {"choice": texts}, "table": count_table_html(runs, min(k, k_max)),
            "caption": "Left: one seed of the chosen method, one mark per vector; triangles lie below ε. "
                       "Right: bar = mean over seeds, dots = seeds, grey tick = matched random null (mean)."},
        description="Intruder explorer: scatter of max cosine against vector index with the threshold as a line, and "
                    "bars of the count per method, with sliders for method or rank, threshold and k.")


def _some(runs: Sequence[RunSpectra], call: str) -> None:
    if not runs:
        raise InputError(f"no runs were given; wanted at least one with spectra: call {call}(runs_of(spectra, preset))")


def _packed_rows(runs: Sequence[RunSpectra], labels: list[str], k_max: int) -> list[dict]:
    first: dict[tuple[str, str], int] = {}
    return [{"source": run.source, "order": labels.index(run.label), "label": label_text(run.label), "seed": run.seed,
             "shown": first.setdefault((run.source, run.label), run.seed) == run.seed, "n": len(run.names),
             "v": pack(run.cosines, k_max), "z": pack(run.nulls, k_max)} for run in runs]


def match_encoding() -> dict:
    """Colour and shape of a vector, the same in every scatter: hollow circles match, full triangles are intruders."""
    kinds, hues = ["matched", "intruder"], [NULL_COLOUR, INTRUDER_COLOUR]
    return {"color": alt.Color("kind:N", scale=alt.Scale(domain=kinds, range=hues), legend=None),
            "fill": alt.condition("datum.kind == 'intruder'", alt.value(INTRUDER_COLOUR), alt.value("transparent")),
            "shape": alt.Shape("kind:N", scale=alt.Scale(domain=kinds, range=["circle", "triangle-up"]), legend=None)}


def _scatter() -> alt.LayerChart:
    axis = alt.Axis(tickMinStep=1, format="d", grid=False)
    width = alt.Scale(domainMin=0.5, domainMax=alt.ExprRef("k + 0.5"), nice=False, zero=False)
    points = (
        alt.Chart()
        .transform_filter("datum.source == task && datum.order == choice && datum.shown")
        .transform_calculate(i="sequence(0, k * datum.n)").transform_flatten(["i"])
        .transform_calculate(j="floor(datum.i / datum.n) + 1", m="datum.v[datum.i] / 1000", at="datum.i % datum.n")
        .transform_calculate(x="datum.j + 0.7 * ((datum.at + 0.5) / datum.n - 0.5)",
                             matrix="names[datum.source][datum.at]",
                             kind="datum.v[datum.i] < cut ? 'intruder' : 'matched'")
        .mark_point(size=26, strokeWidth=1.2)
        .encode(x=alt.X("x:Q", title="j (by falling singular value)", axis=axis, scale=width),
                y=alt.Y("m:Q", title="max cosine", scale=alt.Scale(domain=[0, 1])),
                tooltip=["matrix:N", "j:Q", alt.Tooltip("m:Q", title="max cosine", format=".3f")], **match_encoding())
    )
    line = alt.Chart(alt.Data(values=[{}])).transform_calculate(e="eps").mark_rule(
        strokeDash=[5, 4], strokeWidth=2, color=INTRUDER_COLOUR).encode(y="e:Q")
    return alt.layer(points, line).properties(width=270, height=250)


def _bars(labels: list[str]) -> alt.LayerChart:
    texts = [label_text(label) for label in labels]
    base = alt.Chart().encode(y=alt.Y("label:N", sort=texts, title=None, axis=alt.Axis(labelLimit=120)))
    over_seeds = {"count": "mean(count)", "sd": "stdev(count)", "null": "mean(null)", "seeds": "count()",
                  "listed": "values(seed)", "slots": "mean(slots)", "groupby": ["label", "order"]}
    means = base.transform_aggregate(**over_seeds)
    count = alt.X("count:Q", title="intruder dimensions", axis=alt.Axis(tickMinStep=1, tickCount=4))
    bars = means.mark_bar(height=alt.RelativeBandSize(0.6)).encode(
        x=count, color=alt.Color("label:N", scale=alt.Scale(domain=texts, range=colours(labels)), legend=None),
        opacity=alt.condition("datum.order == choice", alt.value(1), alt.value(0.45)))
    seeds = base.mark_circle(size=22, opacity=1, stroke="white", strokeWidth=0.6, color="#444").encode(
        x=count, tooltip=["label:N", "seed:O", "count:Q", alt.Tooltip("null:Q", title="matched null")])
    null = means.mark_tick(thickness=3, color=NULL_COLOUR).encode(x="null:Q")
    number = "format(datum.count, '.1f') + (datum.seeds > 1 ? ' ± ' + format(datum.sd, '.1f') : '')"
    words = means.transform_calculate(t=number).mark_text(align="left", fontSize=11).encode(
        text="t:N", x=alt.value(alt.ExprRef("numbers_at")))
    # The whole sentence, worked out where the counts are, as the description of an invisible mark: screen readers find
    # it there, and hydrate.js shows it as text.
    sentence = (f"datum.label + ', ' + task + ': ' + {number} + ' intruder dimensions among ' + datum.slots"
                " + ' vectors (seed by seed: ' + join(pluck(datum.listed, 'count'), ', ') + '). Matched random null: '"
                " + format(datum.null, '.1f') + ' (' + join(pluck(datum.listed, 'null'), ', ') + ').'")
    readout = alt.Chart(name="readout").transform_filter("datum.order == choice").transform_aggregate(
        **over_seeds).transform_calculate(t=sentence).mark_point(opacity=0, size=1).encode(
        description="t:N", x=alt.value(0), y=alt.value(0))
    return (
        alt.layer(bars, null, seeds, words, readout)
        .transform_filter("datum.source == task")
        .transform_calculate(i="sequence(0, k * datum.n)").transform_flatten(["i"])
        .transform_calculate(hit="datum.v[datum.i] < cut ? 1 : 0", null_hit="datum.z[datum.i] < cut ? 1 : 0")
        .transform_aggregate(count="sum(hit)", null="sum(null_hit)", slots="count()",
                             groupby=["label", "order", "seed"])
        .properties(width=140, height=250)
    )


def family(runs: Sequence[RunSpectra], k: int = 10) -> alt.FacetChart:
    """Count against epsilon, one line per method (mean over seeds), beside the same lines for the matched nulls.

    The runs are of one preset and task. Raises InputError if there are none.
    """
    _some(runs, "family")
    labels = sorted({run.label for run in runs}, key=label_order)
    texts, source = [label_text(label) for label in labels], " and ".join(dict.fromkeys(run.source for run in runs))
    frame = pd.concat([count_frame(runs, step / 20, k).assign(epsilon=step / 20) for step in range(2, 20)])
    means = frame.groupby(["label", "epsilon"], sort=False)[["count", "null"]].mean().reset_index()
    kinds = {"count": "measured", "null": "matched random null"}
    rows = [{"method": label_text(row.label), "epsilon": row.epsilon, "kind": kinds[kind],
             "mean": round(float(getattr(row, kind)), 2)} for row in means.itertuples(index=False) for kind in kinds]
    legend = alt.Legend(orient="bottom", columns=4, symbolStrokeWidth=3, symbolType="stroke")
    dashes = [[6, 3] if label.startswith("full") else [1, 0] for label in labels]
    chart = alt.Chart(alt.Data(values=rows)).mark_line(strokeWidth=2).encode(
        x=alt.X("epsilon:Q", title="threshold ε", scale=alt.Scale(domain=[0, 1])),
        y=alt.Y("mean:Q", title=f"intruder dimensions, k = {k}"),
        color=alt.Color("method:N", sort=texts, title=None, legend=legend,
                        scale=alt.Scale(domain=texts, range=colours(labels))),
        strokeDash=alt.StrokeDash("method:N", sort=texts, title=None, legend=legend,
                                  scale=alt.Scale(domain=texts, range=dashes)),
        tooltip=["method:N", alt.Tooltip("epsilon:Q", title="ε"), alt.Tooltip("mean:Q", title="mean count")])
    facet = alt.Facet("kind:N", sort=list(kinds.values()), title=None)
    return chart.properties(width=260, height=220).facet(facet=facet, columns=2).properties(
        usermeta={"table": count_table_html(runs, k),
                  "caption": f"Mean count over seeds against ε ({source}, k = {k}); dashed: full fine-tuning."},
        description=f"Lines of the mean intruder count against the threshold for {source}, one per method: measured, "
                    "and for the matched random null.")


def accuracy(summary: pd.DataFrame, preset: str) -> alt.FacetChart:
    """Test accuracy against the number of trained weights inside the adapted matrices, one panel per task.

    `summary` is `summary_table(records)`; head-only runs, which train no such weights, are left out, and so are tasks
    with one method only, where there is nothing to compare. Raises InputError for a preset without other records.
    """
    part = summary[(summary["preset"] == preset) & (summary["method"] != "head")]
    part = part[part.groupby("task")["label"].transform("nunique") > 1]
    if part.empty:
        held = ", ".join(sorted(summary["preset"].unique())) or "no records yet"
        raise InputError(f"preset {preset!r} has no records; wanted one of: {held}")
    labels, tasks = sorted(part["label"].unique(), key=label_order), sorted(part["task"].unique())
    texts = [label_text(label) for label in labels]
    rows = [{"task": row.task, "method": label_text(row.label), "weights": int(row.trainable_adapted),
             "seed": int(row.seed), "accuracy": round(100 * row.test_accuracy, 3)} for row in part.itertuples()]
    legend = alt.Legend(orient="bottom", columns=4)
    base = alt.Chart().encode(
        x=alt.X("weights:Q", title="trained weights in the adapted matrices", scale=alt.Scale(type="log"),
                axis=alt.Axis(format="~s", tickCount=4)),
        color=alt.Color("method:N", sort=texts, title=None, legend=legend,
                        scale=alt.Scale(domain=texts, range=colours(labels))))
    seeds = base.mark_circle(size=18, opacity=0.7).encode(y="accuracy:Q", tooltip=[
        "method:N", "seed:O", alt.Tooltip("accuracy:Q", format=".1f"), alt.Tooltip("weights:Q", format=",")])
    means = base.mark_point(size=90, filled=True, stroke="white", strokeWidth=0.6).encode(
        y=alt.Y("mean(accuracy):Q", title="test accuracy, %", scale=alt.Scale(zero=False)),
        shape=alt.Shape("method:N", sort=texts, title=None, legend=legend, scale=alt.Scale(
            domain=texts, range=["square" if label.startswith("full") else "circle" for label in labels])))
    table = []
    for task in tasks:
        for label in labels:
            group = part[(part["task"] == task) & (part["label"] == label)]
            if len(group):
                weights = f"{int(group['trainable_adapted'].iloc[0]):,}"
                table.append([task, label_text(label), weights, spread(100 * group["test_accuracy"])])
    chart = alt.layer(seeds, means).properties(width=520 if len(tasks) == 1 else 240, height=200)
    return chart.facet(facet=alt.Facet("task:N", title=None), columns=2, data=alt.Data(values=rows)).resolve_scale(
        y="independent").properties(
        usermeta={"table": table_html(["task", "method", "trained weights", "test accuracy, %"], table),
                  "caption": f"Test accuracy on {preset}: large marks are means over seeds, small ones single seeds."},
        description=f"Test accuracy against the number of trained weights, one panel per task of {preset}.")
