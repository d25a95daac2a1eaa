"""The audit of a checkpoint or an adapter: its numbers against `count`, resuming, several processes, bad input."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from encoder_sizes import ENCODER_SIZES
from safetensors.torch import load_file, save_file
from test_journal import full_disk

from intruder import audit as audit_module
from intruder import compare
from intruder.audit import audit, audit_each
from intruder.audit_files import labels_of
from intruder.audit_matrix import null_expectation
from intruder.basis import Basis
from intruder.checkpoints import Checkpoint
from intruder.cli import main
from intruder.config import make_config
from intruder.count import count_checkpoints
from intruder.errors import InputError
from intruder.mitigate import mitigate_adapter
from intruder.models import nano_folder
from intruder.run import run_config
from intruder.weights import pair_sources

KEYS = {
    "name",
    "shape",
    "count",
    "max_cosine",
    "singular_values",
    "route",
    "borderline",
    "energy_share",
    "rank",
    "effective_rank",
    "null_expectation",
    "lower",
    "upper",
    "intruder",
}


def test_the_audit_counts_what_count_counts(base_dir, adapter_dir, tmp_path):
    """Counts, cosines and total of audit.json are those of `count_checkpoints`; every documented field is there."""
    result = audit(base_dir, adapter_dir, k=6, out=tmp_path / "out")
    counted = count_checkpoints(base_dir, adapter_dir, k=6)
    assert result == json.loads((tmp_path / "out" / "audit.json").read_text())
    assert result["total"] == counted["total"] > 0 and result["k"] == 6 and result["epsilon"] == 0.5
    for mine, other in zip(result["matrices"], counted["matrices"], strict=True):
        assert KEYS <= mine.keys() and mine["name"] == other["name"] and mine["count"] == other["count"]
        for value, low, high, truth in zip(
            mine["max_cosine"], mine["lower"], mine["upper"], other["max_cosine"], strict=True
        ):
            assert low - 1e-4 <= truth <= high + 1e-4 and (value is None or abs(value - truth) < 1e-3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["audit.json", "audit.parquet", "report.html"]


def test_energies_ranks_and_singular_values_are_right(base_dir, adapter_dir, tmp_path, add_lora, tiny_bert):
    """Against dense algebra in float64: sigma_j of W, the intruders' share of their energy, rank and effective rank."""
    result = audit(base_dir, adapter_dir, k=5, out=tmp_path / "out")
    layer = add_lora(tiny_bert()).base_model.model.bert.encoder.layer[1].output.dense
    W0 = layer.base_layer.weight.detach().double().numpy()
    update = layer.get_delta_weight("default").detach().double().numpy()
    S = np.linalg.svd(W0 + update, compute_uv=False)[:5]
    entry = next(m for m in result["matrices"] if m["name"] == "encoder.layer.1.output.dense")
    np.testing.assert_allclose(entry["singular_values"], S, rtol=1e-5)
    hits = np.array(entry["intruder"])
    assert entry["energy_share"] == pytest.approx((S[hits] ** 2).sum() / (S**2).sum(), rel=1e-5)
    values = np.linalg.svd(update, compute_uv=False)[:4]
    p = values / values.sum()
    assert entry["rank"] == 4 and entry["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_a_full_fine_tune_has_the_rank_of_what_changed(base_dir, tuned_dir, tmp_path):
    """One matrix moved by a rank-one update: rank 1 there, 0 elsewhere, and the counts of `count`."""
    result = audit(base_dir, tuned_dir, k=4, out=tmp_path / "out")
    ranks = {matrix["name"]: (matrix["rank"], matrix["count"]) for matrix in result["matrices"]}
    assert ranks.pop("encoder.layer.1.attention.self.query") == (1, 1)
    assert set(ranks.values()) == {(0, 0)}


def test_the_parquet_table_has_a_row_per_vector(base_dir, adapter_dir, tmp_path):
    """k rows a matrix, the same numbers as the JSON, and the total as the sum of its intruders."""
    result = audit(base_dir, adapter_dir, k=3, out=tmp_path / "out")
    frame = pd.read_parquet(tmp_path / "out" / "audit.parquet")
    assert len(frame) == 3 * len(result["matrices"]) and frame["intruder"].sum() == result["total"]
    first = result["matrices"][0]
    np.testing.assert_array_equal(frame["singular_value"][:3], first["singular_values"])
    assert frame["matrix"][0] == first["name"] and list(frame["index"][:3]) == [1, 2, 3]


@pytest.mark.parametrize(("shape", "value"), [((768, 768), 0.1216), ((4096, 4096), 0.0596), ((3072, 768), 0.061)])
def test_the_null_expectation_is_the_known_one(shape, value):
    """Published measurements of the mean best match of a random unit vector, square and tall."""
    assert null_expectation(*shape) == pytest.approx(value, abs=6e-4)


def test_the_null_expectation_is_exact_at_small_sizes():
    """Against a simulation at 3 x 8 and 8 x 3, where the normal approximation would be off; 1 x n gives 1."""
    rng = np.random.default_rng(0)
    for rows, columns in ((3, 8), (8, 3)):
        g = rng.standard_normal((200_000, rows))
        u = np.abs(g / np.linalg.norm(g, axis=1, keepdims=True))[:, : min(rows, columns)]
        assert null_expectation(rows, columns) == pytest.approx(u.max(1).mean(), abs=2e-3)
    assert null_expectation(1, 5) == pytest.approx(1.0, abs=1e-6)


def test_a_stopped_audit_continues_where_it_was(base_dir, adapter_dir, tmp_path, monkeypatch):
    """Stopped at the fifth matrix, no result is there; --resume does only the rest and ends with the same numbers."""
    whole, real, seen = audit(base_dir, adapter_dir, k=4, out=tmp_path / "whole"), audit_module.audit_matrix, []

    def stopping(change, *rest):
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(change.name)
        return real(change, *rest)

    monkeypatch.setattr(audit_module, "audit_matrix", stopping)
    with pytest.raises(KeyboardInterrupt):
        audit(base_dir, adapter_dir, k=4, out=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".progress"]
    with pytest.raises(InputError, match="add --resume"):
        audit(base_dir, adapter_dir, k=4, out=tmp_path / "out")
    with pytest.raises(InputError, match="was begun with k=4"):
        audit(base_dir, adapter_dir, k=5, out=tmp_path / "out", resume=True)
    monkeypatch.setattr(
        audit_module, "audit_matrix", lambda change, *rest: seen.append(change.name) or real(change, *rest)
    )
    lines = []
    result = audit(base_dir, adapter_dir, k=4, out=tmp_path / "out", resume=True, say=lines.append)
    assert len(seen) == len(set(seen)) == len(whole["matrices"])
    assert lines[0] == "4 of 12 matrices are done already" and lines[-1].startswith("12/12")
    drop = {"seconds"}
    strip = lambda audited: [{key: value for key, value in m.items() if key not in drop} for m in audited["matrices"]]  # noqa: E731
    assert strip(result) == strip(whole)
    assert audit(base_dir, adapter_dir, k=4, out=tmp_path / "out", resume=True) == result
    with pytest.raises(InputError, match="audit of other models or settings"):
        audit(base_dir, adapter_dir, k=3, out=tmp_path / "out", resume=True)


SLOWED = """
import sys, time
from intruder import audit as module
real = module.audit_matrix
module.audit_matrix = lambda *values: (time.sleep(0.3), real(*values))[1]
module.audit(sys.argv[1], sys.argv[2], k=4, out=sys.argv[3])
"""


def test_a_killed_process_loses_one_matrix_at_most(base_dir, adapter_dir, tmp_path):
    """SIGKILL in the middle: only the journal is there; what it holds is not done again, and the result is whole."""
    command = [sys.executable, "-c", SLOWED, str(base_dir), str(adapter_dir), str(tmp_path / "out")]
    process = subprocess.Popen(command, env=os.environ)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and sum(1 for _ in _lines(tmp_path / "out")) < 3:
        time.sleep(0.02)
    process.kill()
    process.wait()
    kept = len(list(_lines(tmp_path / "out")))
    assert kept >= 3 and [path.name for path in (tmp_path / "out").iterdir()] == [".progress"]
    said = []
    result = audit(base_dir, adapter_dir, k=4, out=tmp_path / "out", resume=True, say=said.append)
    assert said[0].startswith(f"{kept} of 12") and len(result["matrices"]) == 12
    assert result["total"] == count_checkpoints(base_dir, adapter_dir, k=4)["total"]


def _lines(out):
    for path in (out / ".progress").glob("*.jsonl"):
        yield from (line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))


def test_the_generator_of_the_benchmark_makes_what_the_audit_reads(tmp_path):
    """Two tiny layers of Llama's shapes, sharded, and an adapter: 14 matrices, intruders found, mitigation possible."""
    sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
    try:
        from llama_shape import write
    finally:
        sys.path.pop(0)
    write(tmp_path / "model", layers=2, hidden=48, inner=96, rank=4)
    result = audit(tmp_path / "model" / "base", tmp_path / "model" / "adapter", k=5, out=tmp_path / "out")
    assert len(result["matrices"]) == 14 and result["total"] > 0
    assert {matrix["rank"] for matrix in result["matrices"]} == {4}
    done = mitigate_adapter(
        tmp_path / "model" / "base", tmp_path / "model" / "adapter", 0.0, tmp_path / "less", "all", k=5
    )
    assert done["total_before"] == result["total"] > done["total_after"]


def test_two_processes_share_the_matrices(base_dir, adapter_dir, tmp_path):
    """With RANK and WORLD_SIZE set, both do a part, the first writes, and the result is that of one process."""
    command = [
        sys.executable,
        "-m",
        "intruder",
        "audit",
        str(base_dir),
        str(adapter_dir),
        "--k",
        "4",
        "--out",
        str(tmp_path / "out"),
    ]
    started = [
        subprocess.Popen(
            command,
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in (1, 0)
    ]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "one of 2" in said[0][1] and said[0][0] == "" and "intruder dimensions among" in said[1][0]
    result, alone = (
        json.loads((tmp_path / "out" / "audit.json").read_text()),
        audit(base_dir, adapter_dir, 4, out=tmp_path / "one"),
    )
    assert result["total"] == alone["total"] and len(result["matrices"]) == len(alone["matrices"])
    assert not (tmp_path / "out" / ".progress").exists()


def test_include_chooses_matrices(base_dir, adapter_dir, tmp_path):
    """Only names that the pattern finds; k may then be larger than the smallest matrix left out."""
    result = audit(base_dir, adapter_dir, k=2, out=tmp_path / "out", include=r"layer\.1\..*query$")
    assert [matrix["name"] for matrix in result["matrices"]] == ["encoder.layer.1.attention.self.query"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epsilon", "0"], "epsilon=0.0"),
        (["--epsilon", "nan"], "epsilon=nan"),
        (["--k", "0"], "k=0"),
        (["--k", "33"], "k=33 was given and encoder.layer.0"),
        (["--include", "("], "no regular expression"),
        (["--include", "decoder"], "matches none of 12"),
        (["--device", "warp"], "device 'warp'"),
        (["--cache-gb", "0", "--cache", "x"], "cache-gb"),
    ],
)
def test_what_is_out_of_range_is_refused_before_anything_is_written(
    base_dir, adapter_dir, tmp_path, capsys, flags, message
):
    """One line, exit status 2, and the folder does not appear."""
    assert main(["audit", str(base_dir), str(adapter_dir), "--out", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("intruder: error: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_and_a_full_disk_are_refused(base_dir, adapter_dir, tmp_path, capsys):
    """A folder with files is not touched; a disk that fills up leaves no file that looks finished."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    assert main(["audit", str(base_dir), str(adapter_dir), "--out", str(tmp_path / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err and (tmp_path / "out" / "mine").read_text() == "keep"
    with full_disk(3000):
        assert main(["audit", str(base_dir), str(adapter_dir), "--out", str(tmp_path / "full"), "--k", "4"]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == [".progress"]
    assert (
        main(["audit", str(base_dir), str(adapter_dir), "--out", str(tmp_path / "full"), "--k", "4", "--resume"]) == 0
    )
    assert (tmp_path / "full" / "audit.json").is_file()


def test_a_bad_matrix_is_named_and_leaves_no_result(base_dir, tmp_path, save_adapter):
    """NaN in one factor: the error names tensor or matrix; no audit.json appears."""
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(32, 2, generator=generator), torch.randn(2, 32, generator=generator)
    broken = B.clone()
    broken[3, 1] = float("nan")
    module = "encoder.layer.{}.attention.self.query"
    folder = save_adapter(tmp_path / "adapter", {module.format(0): (B, A), module.format(1): (broken, A)})
    with pytest.raises(InputError, match="layer.1.attention.self.query"):
        audit(base_dir, folder, k=3, out=tmp_path / "out")
    assert not (tmp_path / "out" / "audit.json").exists()


def _broken(tmp_path, base_dir, adapter_dir, tiny_bert, kind):
    """(base, adapter) of which one cannot be used."""
    base, adapter = tmp_path / "in" / "base", tmp_path / "in" / "adapter"
    shutil.copytree(base_dir, base)
    shutil.copytree(adapter_dir, adapter)
    config, factors = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    settings = json.loads(config.read_text())
    if kind == "a truncated shard":
        shutil.rmtree(base)
        tiny_bert().bert.save_pretrained(base, max_shard_size="20KB")
        shard = sorted(base.glob("model-*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-40])
    elif kind == "a base of another shape":
        transformers.BertModel(transformers.BertConfig(**ENCODER_SIZES | {"hidden_size": 48})).save_pretrained(base)
    elif kind == "a base of other names":
        sizes = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        shutil.rmtree(base)
        transformers.GPT2Model(transformers.GPT2Config(**sizes)).save_pretrained(base)
    elif kind in ("NaN in the base", "infinity in the adapter"):
        path = base / "model.safetensors" if "base" in kind else factors
        tensors = load_file(path)
        name = next(n for n in tensors if "layer.0.attention.self.key" in n and n.endswith("weight"))
        tensors[name].view(-1)[3] = float("nan" if "NaN" in kind else "inf")
        save_file(tensors, path, {"format": "pt"})
    elif kind == "a path that climbs":
        config.write_text(json.dumps(settings | {"base_model_name_or_path": "../../elsewhere"}))
    elif kind == "an unknown type":
        config.write_text(json.dumps(settings | {"peft_type": "LOHA"}))
    elif kind == "a pickle":
        factors.rename(adapter / "adapter_model.bin")
    elif kind == "no adapter":
        shutil.rmtree(adapter)
    return base, adapter


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("a truncated shard", "wanted a complete file"),
        ("a base of another shape", "wanted the base that the adapter was trained on"),
        ("a base of other names", "wanted the base that the adapter was trained on"),
        ("NaN in the base", "holds NaN or infinity"),
        ("infinity in the adapter", "holds NaN or infinity"),
        ("a path that climbs", "climbs out of its folder"),
        ("an unknown type", "type 'LOHA'"),
        ("a pickle", "is a pickle"),
        ("no adapter", "no folder"),
    ],
)
@pytest.mark.parametrize("command", ["audit", "audit of several", "mitigate"])
def test_bad_input_is_one_error_and_leaves_nothing_that_looks_whole(
    tmp_path, base_dir, adapter_dir, tiny_bert, capsys, command, kind, message
):
    """One line that says what is wrong, exit status 2, and no file of a result."""
    base, adapter = _broken(tmp_path, base_dir, adapter_dir, tiny_bert, kind)
    words = ["mitigate", str(base), str(adapter), "--scale", "0"] if command == "mitigate" else []
    words = words or ["audit", str(base), *([str(base_dir)] if "several" in command else []), str(adapter)]
    if "several" in command and "base of" in kind:
        words.remove(str(base_dir))
        words.append(str(tmp_path / "in" / "more"))
        shutil.copytree(adapter_dir, tmp_path / "in" / "more")
    assert main([*words, "--k", "4", "--out", str(tmp_path / "out")]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("intruder: error: ")]
    assert len(error) == 1 and message in error[0]
    left = {path.name for path in tmp_path.iterdir()} | {path.name for path in (tmp_path / "out").glob("*")}
    assert left <= {"in", "out", ".progress"}


def test_every_route_agrees_on_a_trained_adapter(tmp_path):
    """LoRA of rank 8 trained for 40 steps and saved by PEFT: no verdict differs between routes, audit and count."""
    kept = {}
    settings = {"task": "nli", "method": "lora", "rank": 8, "steps": 40, "learning_rate": 1e-2, "evaluations": 1}
    small = {"train_size": 640, "validation_size": 20, "test_size": 20, "pseudo_loss_documents": 0, "stage": "tuning"}
    config = make_config(settings | small)
    run_config(config, progress=False, on_step=lambda step, loss, model: kept.update(model=model))
    kept["model"].save_pretrained(tmp_path / "adapter")
    base = nano_folder()
    for epsilon in (0.4, 0.7):
        found = audit(base, tmp_path / "adapter", 10, epsilon, tmp_path / f"out{epsilon}")
        counted = count_checkpoints(base, tmp_path / "adapter", 10, epsilon)
        assert [m["count"] for m in found["matrices"]] == [m["count"] for m in counted["matrices"]]
        assert found["borderline"] == 0
        for source, matrix in zip(pair_sources(base, tmp_path / "adapter"), found["matrices"], strict=True):
            change = source.load_change()
            for route in ("dense", "cached", "certified"):
                verdicts = compare(change.pretrained, change.factors, epsilon=epsilon, method=route).intruder
                assert verdicts.tolist() == matrix["intruder"], (source.name, route)
    assert found["total"] > 0


# -- several models of one base ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory, tiny_bert, add_lora, base_dir, tuned_dir, adapter_dir):
    """Models of one base: adapters of different ranks on different matrices, two of one name, and a full fine-tune."""
    folder = tmp_path_factory.mktemp("several")
    made = [adapter_dir, tuned_dir]
    for number, (rank, targets) in enumerate([(2, ["query"]), (8, ["query", "output.dense", "word_embeddings"])]):
        model = add_lora(tiny_bert(), seed=number + 1, r=rank, target_modules=targets)
        made.append(folder / f"run{number}" / "adapter")
        model.save_pretrained(made[-1])
    return made


def _same(mine, other):
    drop = ("seconds", "tuned", "contents")
    mine, other = ({k: v for k, v in result.items() if k not in drop} for result in (mine, other))
    for one, two in zip(mine.pop("matrices"), other.pop("matrices"), strict=True):
        for key in ("name", "shape", "count", "intruder", "route", "borderline", "rank"):
            assert one[key] == two[key]
        for key in ("max_cosine", "lower", "upper", "singular_values", "energy_share", "effective_rank"):
            np.testing.assert_allclose(one[key], two[key], rtol=1e-7)  # other threads round differently
    assert mine == other


@pytest.mark.parametrize("threads", [1, 3])
def test_several_models_get_what_each_gets_alone(base_dir, several, tmp_path, threads):
    """A folder each with the audit of that model, whatever the threads, and a summary with its totals."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        summary = audit_each(base_dir, several, k=4, out=tmp_path / "out", cache=tmp_path / "cache")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    labels = [model["label"] for model in summary["models"]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*labels, "summary.json"])
    for model, place in zip(summary["models"], several, strict=True):
        mine = json.loads((tmp_path / "out" / model["label"] / "audit.json").read_text())
        alone = audit(base_dir, place, k=4, out=tmp_path / f"{model['label']} alone")
        _same(mine, alone)
        assert mine["tuned"] == model["tuned"] == str(place) and model["total"] == mine["total"]
        assert model["rank"] == pytest.approx(np.mean([matrix["rank"] for matrix in mine["matrices"]]))
        assert (tmp_path / "out" / model["label"] / "report.html").is_file()


def test_the_base_is_read_and_decomposed_once(base_dir, several, tmp_path, monkeypatch):
    """However many models there are: one reading and one decomposition of each matrix."""
    read, made = [], []
    real_matrix, real_of = Checkpoint.matrix, Basis.of
    monkeypatch.setattr(Checkpoint, "matrix", lambda self, view: read.append(view.name) or real_matrix(self, view))
    monkeypatch.setattr(Basis, "of", classmethod(lambda cls, *given: made.append(1) or real_of(*given)))
    adapters = [several[0], *several[2:]]
    audit_each(base_dir, adapters, k=4, out=tmp_path / "out")
    assert len(read) == len(set(read)) == len(made) == 13


def test_an_audit_of_several_models_continues_where_it_was(base_dir, several, tmp_path, monkeypatch, capsys):
    """Stopped in the middle: only the journal is there, and --resume does the rest; then it is complete."""
    real, seen = audit_module.audit_matrix, []

    def stopping(change, *rest):
        seen.append(change.name)
        if len(seen) == 9:
            raise KeyboardInterrupt
        return real(change, *rest)

    command = ["audit", str(base_dir), *map(str, several), "--k", "4", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(audit_module, "audit_matrix", stopping)
        assert main(command) == 130
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".progress"]
    assert main([*command, "--resume"]) == 0
    out = capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert all(model["label"] in out for model in summary["models"]) and "summary.json" in out
    whole = audit_each(base_dir, several, k=4, out=tmp_path / "whole")
    assert [model["total"] for model in summary["models"]] == [model["total"] for model in whole["models"]]
    assert main([*command, "--resume"]) == 0
    with pytest.raises(InputError, match="other models or settings"):
        audit_each(base_dir, several[:3], k=4, out=tmp_path / "out", resume=True)


def test_labels_tell_models_apart(tmp_path):
    """The last part of a name, more where they are equal, nothing that leaves the folder or hides."""
    assert list(labels_of(["a/x", "b/y"])) == ["x", "y"]
    assert list(labels_of(["a/adapter", "b/adapter/"])) == ["a-adapter", "b-adapter"]
    assert list(labels_of(["owner/name@main", str(tmp_path)])) == ["name@main", tmp_path.name]
    for label in labels_of(["../x", "/etc/..", ".hidden", "a/b:c?"]):
        assert label and "/" not in label and not label.startswith(".")
    with pytest.raises(InputError, match="was given twice"):
        labels_of(["a/x", "c", "a/x"])
    with pytest.raises(InputError, match="no model"):
        labels_of([])
