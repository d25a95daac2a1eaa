"""The same call gives controls that drive the library where a kernel lives, and the static chart where none does."""

from __future__ import annotations

import re

import altair as alt
import pytest
from fake_records import fake_spectra, write_fake_results

from intruder import charts, findings
from intruder.errors import InputError
from intruder.records import load_spectra
from intruder.widgets import Explorer, explore


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_fake_results(tmp_path_factory.mktemp("results"))


@pytest.fixture(autouse=True)
def living_kernel(monkeypatch):
    monkeypatch.delenv("BOOK_STATIC", raising=False)


def test_controls_drive_count_intruders(folder):
    """After any move of any control the sentence holds the counts of the library, seed by seed."""
    widget = explore("nano", folder=folder)
    runs = findings.runs_of(load_spectra(folder), "nano")
    moves = [("choice", "lora-r64"), ("epsilon", 0.93), ("k", 31), ("task", "nano · sentiment"), ("choice", "full")]
    for name, value in [*moves, ("k", 1)]:
        getattr(widget, name).value = value
        chosen = [run for run in runs if run.label == widget.choice.value and run.source == widget.task.value]
        counts = [run.count(round(widget.epsilon.value, 2), widget.k.value) for run in chosen]
        assert f"(seed by seed: {', '.join(map(str, counts))})" in widget.text.value


def test_controls_start_at_the_papers_values(folder):
    """ε = 0.5, k = 10, rank 8; only ranks with records are offered."""
    widget = explore("nano", folder=folder)
    assert (widget.choice.value, widget.epsilon.value, widget.k.value) == ("lora-r8", 0.5, 10)
    assert [value for _, value in widget.choice.options] == ["full", "lora-r1", "lora-r8", "lora-r64"]
    assert explore("minilm", rank=16, folder=folder).choice.value == "lora-r16"


def test_a_move_redraws_the_chart_in_place(folder):
    """The chart widget stays the same object; its specification changes."""
    widget = explore("nano", "nli", folder=folder)
    chart, before = widget.chart, widget.chart.chart.to_dict()
    widget.epsilon.value = 0.9
    assert widget.chart is chart and chart.chart.to_dict() != before


def test_live_runs_stand_beside_the_committed(folder):
    """A reader's run is one more position of the first slider, counted like the others."""
    spectra = fake_spectra("x", "lora", 1, 9, 2, 40).drop(columns="run")
    widget = explore("nano", "nli", live={"mine": spectra}, folder=folder)
    widget.choice.value = "mine"
    assert f"<b>mine, nano · nli: {findings.live_run('mine', spectra).count()}.0</b>" in widget.text.value


def test_static_build_gets_the_chart(folder, monkeypatch):
    """With BOOK_STATIC=1 the call returns an Altair chart with the same starting values, no widget."""
    monkeypatch.setenv("BOOK_STATIC", "1")
    chart = explore("nano", folder=folder, epsilon=0.7)
    assert isinstance(chart, alt.HConcatChart) and not isinstance(chart, Explorer)
    assert chart.to_dict() == charts.explorer(findings.runs_of(load_spectra(folder), "nano"), epsilon=0.7).to_dict()


def test_unknown_rank_and_preset_are_refused(folder):
    """The error names what was asked and what there is."""
    with pytest.raises(InputError, match="rank=3 .*LoRA r = 8"):
        explore("nano", rank=3, folder=folder)
    with pytest.raises(InputError, match="'giant'"):
        explore("giant", folder=folder)


def test_method_without_a_run_says_so(folder):
    """A method recorded for one task only leaves no stale number when the other task is chosen."""
    runs = findings.runs_of(load_spectra(folder), "nano")
    runs = [run for run in runs if (run.task, run.label) != ("sentiment", "lora-r64")]
    widget = Explorer(runs, epsilon=0.5, k=10, label="lora-r64", k_max=32)
    assert re.search(r"seed by seed: \d", widget.text.value)
    widget.task.value = "nano · sentiment"
    assert widget.text.value == "No run of this method is recorded here."
