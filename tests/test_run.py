"""From configuration to record, end to end on a tiny model; data from local files; sweeps that resume."""

import json
import sys
import types

import numpy as np
import pandas as pd
import pytest

from intruder import InputError, count_intruders, sweep
from intruder.config import make_config
from intruder.data import load_examples, majority_accuracy
from intruder.findings import live_run
from intruder.records import RunRecord, check_records, gather, load_records
from intruder.run import quick_run, run_config
from intruder.tasks import Example

SMALL = {"task": "sentiment", "steps": 4, "batch_size": 8, "train_size": 64, "validation_size": 40, "test_size": 40,
         "evaluations": 2, "pseudo_loss_documents": 2, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def done(tiny_nano, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    config = make_config(SMALL | {"rank": 4, "model": str(tiny_nano)})
    return config, out, run_config(config, out, "test", progress=False)


def test_a_run_writes_one_valid_record_and_its_spectra(done):
    """Two files, no checkpoint left; the record says config, seed, commit, versions, device, time and every metric."""
    config, out, run = done
    assert sorted(path.name for path in out.iterdir()) == ["lora-r4-s0.json", "lora-r4-s0.spectra.parquet"]
    record = RunRecord.from_json((out / "lora-r4-s0.json").read_text())
    assert record.config["seed"] == 0 and record.config["learning_rate"] == 5e-3 and record.config["alpha"] == 8
    assert len(record.matrices) == 12 and all(0 < m["effective_rank"] <= 4.01 for m in record.matrices)
    assert all(value is not None for value in record.metrics.values()) and not record.missing
    assert {"torch", "transformers", "peft", "accelerate"} <= set(record.provenance["versions"])
    assert str(config.model) not in (out / "lora-r4-s0.json").read_text(), "a path of this machine is in the record"


def test_spectra_hold_every_index_of_every_matrix(done):
    """12 matrices x 32 vectors; cosines in [0, 1]; singular values fall."""
    spectra = pd.read_parquet(done[1] / "lora-r4-s0.spectra.parquet")
    assert len(spectra) == 12 * 32
    for _, rows in spectra.groupby("matrix"):
        assert list(rows["index"]) == list(range(1, 33)) and (np.diff(rows["singular_value"]) <= 0).all()


def test_a_record_is_never_overwritten(done):
    """Running the same configuration into the same folder says what to do instead."""
    with pytest.raises(InputError, match="already exists"):
        run_config(done[0], done[1], "test", progress=False)


def test_gathered_records_are_whole(done, tmp_path):
    """`records gather` packs them where the book reads them, and `records check` finds nothing wrong."""
    gather(done[1], tmp_path)
    place = tmp_path / "nano" / "sentiment"
    assert (place / "lora-r4-s0.json").is_file() and (place / "spectra.parquet").is_file()
    assert check_records(tmp_path) == [] and len(load_records(tmp_path)) == 1


def test_the_head_alone_forgets_nothing(tiny_nano):
    """No matrix is adapted, so there is no spectrum and the pseudo-loss is the base's own."""
    run = run_config(make_config(SMALL | {"method": "head", "model": str(tiny_nano)}), progress=False)
    assert run.spectra is None and not run.record.matrices
    assert run.record.metrics["pseudo_loss"] == run.record.metrics["base_pseudo_loss"]


def test_a_rerun_agrees_with_its_record(done, tiny_nano):
    """The same configuration on the same machine gives the same numbers."""
    again = run_config(done[0], progress=False)
    assert again.record.metrics == done[2].record.metrics and again.record.matrices == done[2].record.matrices
    pd.testing.assert_frame_equal(again.spectra, done[2].spectra)


def test_quick_runs_feed_the_figures(tiny_nano):
    """What a notebook trains can be counted like a committed run."""
    run = quick_run("nli", "lora", rank=2, steps=3, model=str(tiny_nano), progress=False, validation_size=20,
                    test_size=20)
    live = live_run("mine", run.spectra)
    counted = sum(count_intruders(rows["max_cosine"].to_numpy(), 0.9, 10) for _, rows in run.spectra.groupby("matrix"))
    assert live.count(0.9, 10) == counted and live.slots(10) == 120


def test_majority_accuracy_uses_the_training_labels():
    """The commonest training label, judged on the test labels."""
    rows = [Example("x", None, label, "") for label in (1, 1, 0)]
    assert majority_accuracy(rows, [Example("x", None, label, "") for label in (0, 0, 0, 1)]) == 0.25


def _sst2(folder, rows=60):
    folder.mkdir()
    for name, start in (("train", 0), ("dev", 1000), ("test", 2000)):
        lines = [f"film number {start + i} is {'fine' if i % 2 else 'dull'}\t{i % 2}" for i in range(rows)]
        (folder / f"sst2_{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_the_real_preset_runs_from_local_files(tmp_path, tiny_bert, tiny_nano):
    """minilm's path on a small BERT and small TSV files: no LM head, so pseudo-loss is missing with its reason."""
    import transformers
    model = tmp_path / "bert"
    config = transformers.BertConfig(vocab_size=655, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=64, max_position_embeddings=98)
    transformers.BertModel(config).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_text((tiny_nano / name).read_text())
    values = {"preset": "minilm", "rank": 2, "steps": 3, "batch_size": 8, "model": str(model),
              "data": str(_sst2(tmp_path / "data")), "evaluations": 1}
    record = run_config(make_config(values), progress=False).record
    assert record.metrics["pseudo_loss"] is None and "no masked-LM head" in record.missing["pseudo_loss"]
    assert len(record.matrices) == 12


def test_local_splits_share_no_sentence(tmp_path):
    """A test sentence that also trains is dropped."""
    folder = _sst2(tmp_path / "data")
    first = (folder / "sst2_train.tsv").read_text().splitlines()[0]
    (folder / "sst2_test.tsv").write_text(first + "\nsomething else\t1\n")
    found, _ = load_examples(make_config({"preset": "minilm", "method": "full", "data": str(folder)}))
    assert [e.text for e in found["test"]] == ["something else"]


def test_missing_data_says_what_was_wanted(tmp_path):
    """No folder; no network."""
    with pytest.raises(InputError, match="no folder.*sst2_train.tsv"):
        load_examples(make_config({"preset": "minilm", "method": "full", "data": str(tmp_path / "none")}))
    with pytest.raises(InputError, match="cannot load 'nyu-mll/glue'.*--set data="):
        load_examples(make_config({"preset": "minilm", "method": "full"}))


def test_a_sweep_tunes_reports_and_resumes(tiny_nano, tmp_path, capsys):
    """Trials first, then the best rate for every seed; a second call finds nothing to do."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({
        "base": SMALL | {"preset": "nano"}, "grid": {"task": ["sentiment"], "seed": [0, 1]},
        "methods": [{"method": "lora", "rank": 2, "learning_rates": [1e-3, 1e-2]},
                    {"method": "head", "learning_rates": [1e-2]}],
        "tuning": {"seed": 1000}}))
    out = tmp_path / "runs"
    assert sweep.run_sweep(path, out, jobs=1, model=str(tiny_nano)) == 6
    trials, reports = load_records(out, "tuning"), load_records(out)
    best = sweep.best_rate([{"learning_rate": r.config["learning_rate"],
                             "validation_accuracy": r.metrics["validation_accuracy"]} for r in trials])
    assert {r.config["learning_rate"] for r in reports if r.config["method"] == "lora"} == {best}
    assert {r.config["seed"] for r in trials} == {1000} and len(reports) == 4
    assert sweep.run_sweep(path, out, jobs=1, model=str(tiny_nano)) == 0
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"base": values["base"] | {"steps": 3}}))
    with pytest.raises(InputError, match="was made with steps 4, and this sweep wants 3: remove it"):
        sweep.run_sweep(path, out, jobs=1, model=str(tiny_nano))


def test_a_sweep_whose_runs_fail_says_so_at_the_end(tiny_nano, tmp_path):
    """A rank above the smaller side fails in its own process; the other run is made, and the error names the failed."""
    path = tmp_path / "tiny.json"
    methods = [{"method": "lora", "rank": rank, "learning_rates": [1e-3]} for rank in (33, 2)]
    path.write_text(json.dumps({"base": SMALL, "grid": {"seed": [0]}, "methods": methods, "tuning": {}}))
    with pytest.raises(InputError, match="1 of 2 runs failed; nano/sentiment/lora-r33-s0: rank is 33"):
        sweep.run_sweep(path, tmp_path / "runs", jobs=1, model=str(tiny_nano))
    assert [record.run for record in load_records(tmp_path / "runs")] == ["lora-r2-s0"]


def test_the_smaller_of_two_equal_rates_wins():
    """A tie is no reason to prefer the more violent rate."""
    trials = ((3e-3, .8), (1e-3, .8), (1e-2, .7))
    assert sweep.best_rate([{"learning_rate": rate, "validation_accuracy": a} for rate, a in trials]) == 1e-3


def test_a_broken_sweep_file_is_refused(tmp_path):
    """A missing part, an unknown part, a part of the wrong kind, a method without rates, a grid of unknown keys."""
    path = tmp_path / "x.json"
    whole = {"base": {}, "grid": {"seed": [0]}, "tuning": {}, "methods": [{"method": "full", "learning_rates": [1]}]}
    assert sweep.read_sweep(_written(path, whole)) == whole
    for content, message in (({}, "missing part 'base'"), (whole | {"x": 1}, "unknown part 'x'"),
                             (whole | {"base": []}, "base is \\[\\]"),
                             (whole | {"methods": {}}, "wanted a list of methods"),
                             (whole | {"methods": [{"method": "full"}]}, "no learning_rates"),
                             (whole | {"methods": ["full"]}, "no learning_rates"),
                             (whole | {"grid": {}}, "list of seeds"), (whole | {"grid": {"seed": []}}, "list of seeds"),
                             (whole | {"grid": {"seed": [0], "rank": [1]}}, "list of seeds")):
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            sweep.read_sweep(path)


def _written(path, content):
    path.write_text(json.dumps(content))
    return path


def test_a_sweep_with_two_runs_of_one_name_is_refused(tmp_path):
    """Rank 2 at two alphas, or one seed twice: the second would never be made."""
    lora = {"method": "lora", "rank": 2, "learning_rates": [1e-3]}
    for methods, seeds in (([lora, lora | {"alpha": 1}], [0]), ([lora], [0, 0])):
        whole = {"base": SMALL, "grid": {"seed": seeds}, "tuning": {}, "methods": methods}
        with pytest.raises(InputError, match="two runs named nano/sentiment/lora-r2-s0"):
            sweep.run_sweep(_written(tmp_path / "x.json", whole), tmp_path / "runs")


@pytest.mark.parametrize("name", ["nano-rank", "nano-tasks", "minilm-rank"])
def test_the_committed_sweeps_are_valid(repository, name):
    """Every run of every sweep that comes with the repository is a configuration with a name of its own."""
    sweep.check_runs(sweep.read_sweep(repository / "lib" / "experiments" / f"{name}.json"))


def test_splits_from_the_hub_share_no_sentence(monkeypatch):
    """GLUE repeats some training sentences: one that is held back for validation does not train as well."""
    rows = [{"sentence": f"film {i // 2}", "label": 1} for i in range(4000)]
    hub = types.ModuleType("datasets")
    hub.load_dataset = lambda *_: {"train": rows, "validation": rows[:1] + [{"sentence": "another", "label": 0}]}
    monkeypatch.setitem(sys.modules, "datasets", hub)
    found, _ = load_examples(make_config({"preset": "minilm", "method": "full"}))
    train, validation = ({e.text for e in found[split]} for split in ("train", "validation"))
    assert validation and not train & validation and [e.text for e in found["test"]] == ["another"]
