"""Records: what is refused, what survives a round trip, how run folders are packed, and what the checker finds."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intruder import InputError
from intruder.records import (
    RunRecord,
    check_records,
    gather,
    load_records,
    load_spectra,
    parse_run,
    results_folder,
    summary_table,
    write_record,
    write_spectra,
)

MATRICES = {"encoder.layer.0.query": (6, 4), "encoder.layer.0.output": (4, 4)}


def record_values(run: str = "lora-r2-s0", **config) -> dict:
    method, rank, seed = parse_run(run)
    stage = "tuning" if seed is None else "report"
    matrices = [
        {"name": name, "shape": list(shape), "effective_rank": 1.5, "update_norm": 0.1, "pretrained_norm": 2.0}
        for name, shape in MATRICES.items()
    ]
    return {
        "schema": 1,
        "run": run,
        "status": "complete",
        "config": {
            "preset": "nano",
            "task": "nli",
            "method": method,
            "rank": rank,
            "alpha": None if rank is None else 2.0 * rank,
            "learning_rate": 1e-3,
            "steps": 10,
            "batch_size": 4,
            "seed": seed or 0,
            "stage": stage,
        }
        | config,
        "provenance": {
            "command": "intruder run nli.json",
            "commit": "0123abc",
            "dirty": False,
            "versions": {"python": "3.12"},
            "device": "cpu",
            "threads": 1,
            "started": "2026-11-21T12:00:00Z",
            "wall_seconds": 1.5,
            "model": {"id": "nano", "sha256": "00"},
            "data": {"id": "nli", "sha256": "00"},
        },
        "training": {
            "steps": 10,
            "best_step": 8,
            "trainable": {"adapted": 100, "head": 10},
            "curve": [{"step": 10, "loss": 0.5, "validation_accuracy": 0.8}],
        },
        "metrics": {
            "validation_accuracy": 0.8,
            "test_accuracy": 0.75,
            "majority_accuracy": 0.34,
            "pseudo_loss": None,
            "base_pseudo_loss": 1.25,
        },
        "missing": {"pseudo_loss": "not measured in this test"},
        "matrices": [] if method == "head" or stage == "tuning" else matrices,
    }


def record(run: str = "lora-r2-s0", **config) -> RunRecord:
    return RunRecord(**record_values(run, **config))


def spectra(run: str = "lora-r2-s0", seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for name, shape in MATRICES.items():
        n = min(shape)
        singular = np.sort(rng.uniform(0.1, 5, n))[::-1]
        for j in range(n):
            rows.append((run, name, j + 1, singular[j], rng.uniform(), rng.uniform()))
    return pd.DataFrame(rows, columns=["run", "matrix", "index", "singular_value", "max_cosine", "null_max_cosine"])


def write_run(folder: Path, run: str, seed: int = 0, **config) -> None:
    write_record(record(run, **config), folder)
    if not run.startswith("head") and "-lr" not in run:
        write_spectra(spectra(run, seed), folder / f"{run}.spectra.parquet")


def test_a_record_survives_the_round_trip():
    """to_json then from_json gives the same record, and the JSON is the schema's."""
    original = record()
    text = original.to_json()
    assert RunRecord.from_json(text) == original
    assert json.loads(text) == record_values()
    assert text.endswith("}\n")


@settings(max_examples=20, deadline=None)
@given(accuracy=st.floats(0, 1), loss=st.floats(0, 100), seed=st.integers(0, 10**6))
def test_numbers_survive_the_round_trip_exactly(accuracy, loss, seed):
    """Every finite float comes back bit for bit."""
    values = record_values(f"full-s{seed}")
    values["metrics"] |= {"test_accuracy": accuracy, "pseudo_loss": loss}
    assert RunRecord.from_json(RunRecord(**values).to_json()).metrics == values["metrics"]


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("config.seed", ..., "'seed' is missing"),
        ("config.seed", None, "'seed' is null"),
        ("config.seed", 1, "config.seed.*wanted 0"),
        ("config.seed", 0.5, "config.seed"),
        ("config.method", "prefix", "config.method.*'prefix'.*full, lora, head"),
        ("config.rank", None, "config.rank"),
        ("config.rank", 4, "contradicts.*lora-r4-s0"),
        ("config.stage", "draft", "config.stage"),
        ("config.learning_rate", math.nan, "config.learning_rate.*nan"),
        ("provenance.commit", ..., "'commit' is missing"),
        ("provenance.commit", "", "provenance.commit"),
        ("provenance.versions", ..., "'versions' is missing"),
        ("metrics.test_accuracy", None, "test_accuracy.*null"),
        ("metrics.test_accuracy", math.nan, "metrics.test_accuracy.*nan"),
        ("metrics.test_accuracy", "0.9", "test_accuracy"),
        ("metrics.test_accuracy", ..., "'test_accuracy' is missing"),
        ("missing.pseudo_loss", "", "pseudo_loss.*null"),
        ("training.curve", [{"loss": math.inf}], r"training.curve\[0\].loss.*inf"),
        ("training.trainable", ..., "'trainable' is missing"),
        ("matrices", [{"name": "q"}], "'shape' is missing"),
        ("metrics", 3, "'metrics'"),
        ("status", "running", "'running'"),
        ("schema", 2, "'schema' is 2"),
        ("run", "lora-s0", "'lora-s0' is not a run name"),
        ("surprise", 1, "unknown field 'surprise'"),
        ("training", ..., "'training' is missing"),
    ],
)
def test_a_record_that_is_not_whole_is_refused_by_the_name_of_the_field(path, value, words):
    """A missing, unknown, null, NaN or contradictory field is an InputError that names it."""
    values = record_values()
    *outer, last = path.split(".")
    place = values
    for name in outer:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    with pytest.raises(InputError, match=words):
        RunRecord.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_text_that_is_no_record_is_refused(text):
    """Text that is not one JSON object is an InputError, not a traceback of the parser."""
    with pytest.raises(InputError, match="not a record"):
        RunRecord.from_json(text)


def test_run_names_say_method_rank_and_seed():
    """full-s0, lora-r8-s3, head-s1 and tuning names parse; anything else is refused."""
    assert parse_run("full-s0") == ("full", None, 0)
    assert parse_run("lora-r128-s3") == ("lora", 128, 3)
    assert parse_run("head-s1") == ("head", None, 1)
    assert parse_run("lora-r8-lr1e-05") == ("lora", 8, None)
    for name in ("lora-s0", "lora-r0-s0", "full-r8-s0", "full", "full-s", "../full-s0", None):
        with pytest.raises(InputError, match="not a run name"):
            parse_run(name)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    """Writing goes through a temporary file in the same folder and one rename: nothing is ever half-written."""
    path = write_record(record(), tmp_path)
    before = path.read_text()

    def fail(source, target):
        assert Path(source).parent == Path(target).parent
        raise OSError("no rename today")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no rename today"):
        write_record(record("lora-r2-s0", learning_rate=0.5), tmp_path)
    with pytest.raises(OSError, match="no rename today"):
        write_spectra(spectra(), tmp_path / "spectra.parquet")
    assert [entry.name for entry in tmp_path.iterdir()] == ["lora-r2-s0.json"]
    assert path.read_text() == before


def test_spectra_are_float32_zstd_and_sorted(tmp_path):
    """The Parquet holds the agreed columns and types, zstd-compressed, sorted by run, matrix and index."""
    shuffled = spectra().sample(frac=1, random_state=0)
    path = write_spectra(shuffled, tmp_path / "spectra.parquet")
    file = pq.ParquetFile(path)
    assert [str(field.type) for field in file.schema_arrow] == ["string", "string", "int32", "float", "float", "float"]
    assert file.metadata.row_group(0).column(3).compression == "ZSTD"
    table = pq.read_table(path).to_pandas()
    expected = spectra().sort_values(["run", "matrix", "index"]).reset_index(drop=True)
    np.testing.assert_array_equal(table["max_cosine"], expected["max_cosine"].astype(np.float32))
    assert list(table["index"]) == list(expected["index"])


@pytest.mark.parametrize("damage", ["column", "nan", "twice"])
def test_damaged_spectra_are_refused(tmp_path, damage):
    """A missing column, NaN or a row that occurs twice is an InputError, and no file appears."""
    table = spectra()
    if damage == "column":
        table = table.drop(columns="null_max_cosine")
    elif damage == "nan":
        table.loc[2, "max_cosine"] = np.nan
    else:
        table = pd.concat([table, table.head(1)])
    with pytest.raises(InputError, match="null_max_cosine|NaN|twice"):
        write_spectra(table, tmp_path / "spectra.parquet")
    assert not list(tmp_path.iterdir())


def test_gathering_packs_run_folders_into_the_layout_of_the_results(tmp_path):
    """Records go to preset/task, tuning runs below it, spectra into one file a task; the checker finds no fault."""
    out, results = tmp_path / "out", tmp_path / "results"
    write_run(out, "full-s0")
    write_run(out / "deeper", "lora-r2-s0", seed=1)
    write_run(out, "head-s0")
    write_run(out, "full-lr0.001")
    (out / "checkpoint").mkdir()
    (out / "checkpoint" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    gather(out, results)
    assert sorted(path.relative_to(results).as_posix() for path in results.rglob("*.*")) == [
        "nano/nli/full-s0.json",
        "nano/nli/head-s0.json",
        "nano/nli/lora-r2-s0.json",
        "nano/nli/spectra.parquet",
        "nano/nli/tuning/full-lr0.001.json",
    ]
    assert check_records(results) == []
    assert [r.run for r in load_records(results)] == ["full-s0", "lora-r2-s0", "head-s0"]
    assert [r.run for r in load_records(results, stage="tuning")] == ["full-lr0.001"]
    assert len(load_records(results, stage=None)) == 4


def test_gathering_again_replaces_the_rows_of_the_same_run_only(tmp_path):
    """A rerun replaces its own rows of the spectra; the rows of the other runs stay; nothing is doubled."""
    results = tmp_path / "results"
    for name, run, seed in (("a", "full-s0", 1), ("b", "lora-r2-s0", 2), ("c", "full-s0", 3)):
        write_run(tmp_path / name, run, seed=seed)
        gather(tmp_path / name, results)
    table = load_spectra(results)
    assert len(table) == 2 * 8
    full = table[table["run"] == "full-s0"].sort_values(["matrix", "index"])
    expected = spectra("full-s0", seed=3).sort_values(["matrix", "index"])
    np.testing.assert_array_equal(full["max_cosine"], expected["max_cosine"].astype(np.float32))
    assert check_records(results) == []


def test_gathering_a_run_without_its_spectra_writes_nothing(tmp_path):
    """A report run whose spectra are missing or belong to other matrices is refused before anything is written."""
    out = tmp_path / "out"
    write_run(out, "full-s0")
    write_record(record("lora-r2-s0"), out)
    with pytest.raises(InputError, match="no lora-r2-s0.spectra.parquet"):
        gather(out, tmp_path / "results")
    write_spectra(spectra("lora-r2-s0").head(3), out / "lora-r2-s0.spectra.parquet")
    with pytest.raises(InputError, match="lora-r2-s0"):
        gather(out, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_gathering_two_records_of_one_run_writes_nothing(tmp_path):
    """Two folders with a run of one name (another alpha, say): neither is lost silently, both are named."""
    for name in ("a", "b"):
        write_run(tmp_path / "out" / name, "lora-r2-s0")
    with pytest.raises(InputError, match="b.lora-r2-s0.json and .*a.lora-r2-s0.json are two records of one run"):
        gather(tmp_path / "out", tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_the_table_of_spectra_says_preset_task_method_rank_and_seed(tmp_path):
    """load_spectra reads preset and task from the folders and method, rank and seed from the run's name."""
    write_run(tmp_path / "out", "full-s0")
    write_run(tmp_path / "out", "lora-r2-s1")
    gather(tmp_path / "out", tmp_path / "results")
    table = load_spectra(tmp_path / "results")
    assert list(table.columns) == [
        *("preset", "task", "run", "method", "rank", "seed"),
        *("matrix", "index", "singular_value", "max_cosine", "null_max_cosine"),
    ]
    row = table[table["run"] == "lora-r2-s1"].iloc[0]
    assert (row["preset"], row["task"], row["method"], row["rank"], row["seed"]) == ("nano", "nli", "lora", 2, 1)
    assert table.loc[table["run"] == "full-s0", "rank"].isna().all()
    assert table["max_cosine"].dtype == np.float32


def test_records_come_full_first_then_lora_by_rank(tmp_path):
    """Sorted by task, method, rank and seed, with rank 16 after rank 2."""
    for run in ("lora-r16-s0", "head-s0", "lora-r2-s1", "full-s0", "lora-r2-s0"):
        write_record(record(run), tmp_path)
    runs = [item.run for item in load_records(tmp_path)]
    assert runs == ["full-s0", "lora-r2-s0", "lora-r2-s1", "lora-r16-s0", "head-s0"]


def test_the_summary_has_one_row_per_run_and_no_zero_for_a_missing_metric(tmp_path):
    """A null metric is NaN in the table, a missing rank is missing, and the numbers are those of the records."""
    table = summary_table([record("full-s0"), record("lora-r2-s0")])
    assert list(table["label"]) == ["full", "lora-r2"]
    assert table["rank"].isna().tolist() == [True, False]
    assert table["pseudo_loss"].isna().all()
    assert table["test_accuracy"].tolist() == [0.75, 0.75]
    assert table["trainable_adapted"].tolist() == [100, 100]
    assert len(summary_table([])) == 0


def test_the_checker_names_every_fault(tmp_path):
    """Missing spectra, spectra of no run, missing rows, unknown matrices, bad cosines, files in the wrong place."""
    place = tmp_path / "nano" / "nli"
    for run in ("full-s0", "full-s1", "full-s2", "full-s3", "head-s0"):
        write_record(record(run), place)
    write_record(record("full-s4"), tmp_path / "nano" / "wrong")
    short = spectra("full-s1").query("index != 2")
    other = spectra("full-s2").replace("encoder.layer.0.query", "encoder.layer.9.query")
    wrong = spectra("full-s3").assign(max_cosine=1.5)
    write_spectra(pd.concat([short, other, wrong, spectra("lora-r2-s7")]), place / "spectra.parquet")
    faults = "\n".join(check_records(tmp_path))
    for words in (
        "no spectra of full-s0",
        "full-s1: 3 rows of encoder.layer.0.query; wanted the indices 1 to 4",
        "full-s2: no spectrum of encoder.layer.0.query",
        "full-s2: spectrum of encoder.layer.9.query",
        "full-s3: cosines of encoder.layer.0.output outside",
        "spectra of lora-r2-s7, which has no record",
        "nano/wrong/full-s4.json: wanted at nano/nli/full-s4.json",
    ):
        assert words in faults
    assert "head-s0" not in faults


def test_a_broken_file_is_named(tmp_path):
    """A record that is not JSON, or Parquet that is not Parquet, is an InputError with the file's name."""
    (tmp_path / "full-s0.json").write_text("{")
    with pytest.raises(InputError, match="full-s0.json"):
        load_records(tmp_path)
    (tmp_path / "full-s0.json").unlink()
    (tmp_path / "spectra.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="spectra.parquet"):
        load_spectra(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        load_records(tmp_path / "absent")
    with pytest.raises(InputError, match="stage='draft'"):
        load_records(tmp_path, stage="draft")


def test_checkpoints_of_a_run_under_way_are_passed_over(tmp_path):
    """Hidden folders hold the checkpoints of runs under way and are not read."""
    (tmp_path / ".full-s0").mkdir()
    (tmp_path / ".full-s0" / "full-s0.json").write_text("{")
    assert load_records(tmp_path) == []
    assert load_spectra(tmp_path).empty


def test_the_results_folder_is_found_from_the_top_level_and_from_the_book(tmp_path, monkeypatch):
    """book/results from the top level, results inside book, and an InputError anywhere else."""
    (tmp_path / "book" / "results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert results_folder() == Path("book/results")
    monkeypatch.chdir(tmp_path / "book")
    assert results_folder() == Path("results")
    monkeypatch.chdir(tmp_path / "book" / "results")
    with pytest.raises(InputError, match="book/results"):
        results_folder()


def test_a_variant_is_part_of_the_label_and_not_of_the_method():
    """full.rate_3e-4-s0 is a full fine-tune with seed 0 whose label keeps it apart from full-s0."""
    assert parse_run("full.rate_3e-4-s0") == ("full", None, 0)
    assert parse_run("lora-r8.rate_1e-3-s12") == ("lora", 8, 12)
    for broken in ("full.-s0", "full.RATE-s0", "full..x-s0"):
        with pytest.raises(InputError):
            parse_run(broken)
