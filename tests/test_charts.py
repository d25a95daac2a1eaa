"""Figures hold the records exactly, say what they show, and are inert HTML in the built page."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from fake_records import write_fake_results
from hypothesis import given
from hypothesis import strategies as st

from intruder import charts, count_intruders, findings
from intruder.errors import InputError
from intruder.records import load_records, load_spectra, summary_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_fake_results(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def runs(folder):
    return findings.runs_of(load_spectra(folder), "nano")


@pytest.fixture(scope="module")
def summary(folder):
    return summary_table(load_records(folder))


@given(st.floats(0, 1), st.integers(1, 1000))
def test_packing_is_exact_on_the_grid(m, E):
    """For every cosine m and whole E: m < E/1000 exactly when the packed v < E; no rounding can flip a count."""
    assert (m < E / 1000) == (charts.pack([np.array([m])], 1)[0] < E)


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_packing_is_exact_on_ties(g, E):
    """A cosine that is itself a grid point is no intruder at that threshold, as strict < demands."""
    assert (g / 1000 < E / 1000) == (charts.pack([np.array([g / 1000])], 1)[0] < E)


def test_packing_is_j_major():
    """All first vectors come first, so that the leading k of every matrix are one slice."""
    assert charts.pack([np.array([0.1, 0.2, 0.9]), np.array([0.3, 0.4, 0.9])], 2) == [100, 300, 200, 400]


def test_packed_rows_count_as_the_library_does(runs):
    """Summing v < E over the first k * n entries is the run's count, for every run and slider position tried."""
    labels = sorted({run.label for run in runs}, key=findings.label_order)
    for run, row in zip(runs, charts._packed_rows(runs, labels, 32), strict=True):
        for E, k in ((300, 1), (500, 10), (870, 32), (1000, 7)):
            head = slice(0, k * row["n"])
            assert sum(v < E for v in row["v"][head]) == sum(count_intruders(m, E / 1000, k) for m in run.cosines)
            assert sum(z < E for z in row["z"][head]) == sum(count_intruders(m, E / 1000, k) for m in run.nulls)


@pytest.mark.parametrize("epsilon, k, label", [(0.5, 10, "lora-r8"), (0.91, 3, "lora-r1"), (0.3, 32, "full")])
def test_the_chart_computes_the_count(runs, epsilon, k, label):
    """Rendered without a browser, the explorer's sentence holds the counts of the library, seed by seed."""
    converter = pytest.importorskip("vl_convert")
    spec = charts.explorer(runs, epsilon=epsilon, k=k, label=label).to_dict()
    svg = converter.vegalite_to_svg(json.dumps(spec))
    chosen = [run for run in runs if run.label == label and run.task == "nli"]
    counts = ", ".join(str(run.count(epsilon, k)) for run in chosen)
    nulls = [run.null_count(epsilon, k) for run in chosen]
    assert f"(seed by seed: {counts})" in svg
    assert f"Matched random null: {np.mean(nulls):.1f} ({', '.join(map(str, nulls))})" in svg


def test_explorer_starts_at_the_papers_values(runs):
    """ε = 0.5 and k = 10; k ends where a matrix has no more vectors; thresholds lie on the grid of hundredths."""
    params = {param["name"]: param for param in charts.explorer(runs).to_dict()["params"]}
    assert params["eps"]["value"] == 0.5 and params["k"]["value"] == 10
    assert params["eps"]["bind"]["step"] == 0.01 and params["k"]["bind"]["max"] == 32
    assert params["task"]["bind"]["options"] == ["nano · nli", "nano · sentiment"]
    short = charts.explorer(runs, k_max=500).to_dict()["params"]
    assert {param["name"]: param for param in short}["k"]["bind"]["max"] == runs[0].depth == 40


def test_every_figure_describes_itself(runs, summary):
    """Each figure has a description for screen readers, a caption, and a table that holds its numbers."""
    one_task = [run for run in runs if run.task == "nli"]
    for chart in (charts.explorer(runs), charts.family(one_task), charts.accuracy(summary, "nano")):
        spec = chart.to_dict()
        assert len(spec["description"]) > 40 and spec["usermeta"]["caption"]
        assert spec["usermeta"]["table"].startswith("<table>") and "LoRA r = 64" in spec["usermeta"]["table"]


def test_table_cells_are_escaped():
    """A label with markup in it stays text."""
    assert charts.table_html(["a"], [["<b>"]]).count("&lt;b&gt;") == 1


def test_static_build_emits_inert_html(runs, monkeypatch):
    """With BOOK_STATIC=1 a chart is HTML without any running script or address; otherwise Altair's default serves."""
    monkeypatch.setenv("BOOK_STATIC", "1")
    charts.enable()
    bundle = charts.alt.renderers.get()(charts.explorer(runs).to_dict())
    page = bundle["text/html"]
    assert set(bundle) == {"text/html", "text/plain"}
    assert re.findall(r"<script[^>]*>", page) == ['<script type="application/json">']
    assert "src=" not in page and page.count("</script>") == 1
    json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    monkeypatch.delenv("BOOK_STATIC")
    charts.enable()
    assert charts.alt.renderers.active == "default"


def test_rank_is_lightness_and_method_is_hue():
    """Higher ranks are lighter, so that order survives in grey; full fine-tuning keeps its colour in every figure."""
    labels = ["full", "lora-r1", "lora-r8", "lora-r64"]
    light = [sum(int(colour[i:i + 2], 16) for i in (1, 3, 5)) for colour in charts.colours(labels)[1:]]
    assert light == sorted(light) and len(set(light)) == 3
    assert charts.colours(["full"])[0] == charts.colours(labels)[0] == charts.FULL_COLOUR


def test_figures_without_runs_are_refused(summary):
    """Nothing to show is an error that says what was wanted."""
    for call in (charts.explorer, charts.family):
        with pytest.raises(InputError, match="at least one"):
            call([])
    with pytest.raises(InputError, match="'giant'.*minilm, nano"):
        charts.accuracy(summary, "giant")


def test_views_never_import_torch():
    """A page that only reads records needs no torch."""
    code = "import sys, intruder.widgets, intruder.sentences; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
