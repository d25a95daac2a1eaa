"""The command line as a new user meets it: one line an error, exit status 2, nothing half-written."""

import json
import os
import subprocess
import sys

import pytest

from intruder import cli
from intruder.cli import main


def _config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return str(path)


@pytest.mark.parametrize(("values", "settings", "message"), [
    ({"learning_rat": 1}, [], "did you mean 'learning_rate'"),
    ({"rank": 8}, ["rank"], "is not key=value"),
    ({"rank": 8}, ["rank=129"], "rank is 129; wanted 1 to 128"),
    ({"rank": 8}, ["epsilon=0.5"], "'epsilon' is unknown"),
    ({"rank": 8}, ["model=nobody/nothing"], "cannot load 'nobody/nothing'"),
    ({"method": "full"}, ["learning_rate=-1"], "learning_rate is -1"),
    ({"rank": 8}, ["seed=1", "seed=2"], "'seed' is given twice"),
    ({"rank": 8}, ["max_length=97"], "max_length is 97; wanted at most 96"),
])
def test_a_run_that_cannot_be_is_refused_before_anything_is_written(tmp_path, capsys, values, settings, message):
    """Unknown key, malformed setting, rank above the smaller side, missing model, negative rate."""
    more = ["--set", *settings] if settings else []
    assert main(["run", _config(tmp_path, **values), "--out", str(tmp_path / "out"), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("intruder: error: ") and message in error and error.count("\n") == 1
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()] if (tmp_path / "out").exists() else []
    assert left == []


def test_count_prints_a_table_or_one_object(base_dir, tuned_dir, capsys):
    """The same numbers both ways; --json gives one object with total and matrices."""
    assert main(["count", str(base_dir), str(tuned_dir), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["total"] == sum(matrix["count"] for matrix in result["matrices"]) >= 1
    assert {"name", "count", "max_cosine"} <= set(result["matrices"][0])
    assert main(["count", str(base_dir), str(tuned_dir)]) == 0
    table = capsys.readouterr().out
    assert all(matrix["name"] in table for matrix in result["matrices"]) and str(result["total"]) in table


@pytest.mark.parametrize(("flags", "message"), [
    (["--k", "0"], "k"), (["--k", "33"], "33"), (["--epsilon", "0"], "epsilon"), (["--epsilon", "1.01"], "1.01"),
    (["--epsilon", "nan"], "nan")])
def test_count_refuses_what_is_out_of_range(base_dir, tuned_dir, capsys, flags, message):
    """k of 0 or above n, epsilon outside (0, 1]."""
    assert main(["count", str(base_dir), str(tuned_dir), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("intruder: error: ") and message in captured.err and captured.out == ""


@pytest.mark.parametrize("words", [[], ["coutn"], ["count"], ["count", "a", "b", "--k", "ten"], ["records", "list"]])
def test_wrong_words_end_with_status_2(words, capsys):
    """No command, a misspelt one, a missing argument, a word for a number."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("intruder: error: ")


def test_the_installed_command_answers_without_a_traceback(tmp_path):
    """`intruder count` on folders that do not exist, as a process."""
    done = subprocess.run([sys.executable, "-m", "intruder", "count", "none", "none"], capture_output=True, text=True,
                          cwd=tmp_path, env=os.environ)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "none" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_records_check_reports_problems(tmp_path, capsys):
    """A results folder with a broken file is named; an absent folder is an error."""
    (tmp_path / "nano" / "nli").mkdir(parents=True)
    (tmp_path / "nano" / "nli" / "full-s0.json").write_text("{\"run\": \"full-s0\"}")
    assert main(["records", "check", "--results", str(tmp_path)]) == 2
    assert main(["records", "check", "--results", str(tmp_path / "none")]) == 2
    assert "full-s0.json" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["run", "{config}"], ["sweep", "{sweep}"],
                                   ["pretrain", "nano", "--stop-after", "1"]])
def test_a_file_in_the_place_of_the_output_folder_is_refused_first(tmp_path, capsys, words):
    """--out at a file: refused before anything is trained, and the file is untouched."""
    out, sweep = tmp_path / "out", tmp_path / "sweep.json"
    out.write_text("mine")
    sweep.write_text(json.dumps({"base": {}, "methods": [{"method": "full", "learning_rates": [1e-3]}],
                                 "grid": {"seed": [0]}, "tuning": {}}))
    words = [word.format(config=_config(tmp_path, rank=8), sweep=sweep) for word in words]
    for place in (out, out / "below"):
        assert main([*words, "--out", str(place)]) == 2
        error = capsys.readouterr().err
        assert "out' is a file; wanted a folder" in error and error.count("\n") == 1
    assert out.read_text() == "mine"


def test_a_file_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    """A full disk while a record is written."""
    def full(*_):
        raise OSError(28, "No space left on device", "runs/x.json")
    monkeypatch.setattr("intruder.run.run_config", full)
    assert main(["run", _config(tmp_path, rank=8)]) == 2
    assert capsys.readouterr().err.startswith("intruder: error: runs/x.json: No space left on device; wanted")


def test_an_unknown_sweep_is_refused_with_the_known_ones(repository, capsys, monkeypatch):
    """The sweeps of lib/experiments are named; the file of a single run is none."""
    monkeypatch.chdir(repository)
    assert main(["sweep", "nanorank"]) == 2
    error = capsys.readouterr().err
    assert "no sweep 'nanorank'" in error and "nano-rank" in error and "nano-nli-lora-r8" not in error
    assert main(["sweep", "nano-rank", "--jobs", "0"]) == 2 and "jobs is 0" in capsys.readouterr().err


def test_the_recorded_command_holds_no_path_of_this_machine(monkeypatch):
    """Absolute paths keep their last name, also behind an equals sign."""
    words = ["intruder", "run", "/home/me/x.json", "--out=/home/me/runs", "--set", "model=/home/me/bert", "rank=8"]
    monkeypatch.setattr("sys.argv", words)
    assert cli._command() == "intruder run x.json --out=runs --set model=bert rank=8"
