"""The training loop: one step by hand, accumulation, processes, resumption, and the best weights kept on disk."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from intruder import InputError, train
from intruder.config import make_config
from intruder.models import adapt, load_classifier, load_tokenizer, nano_folder, trainable_counts
from intruder.tasks import examples

SMALL = {"task": "nli", "steps": 6, "batch_size": 8, "train_size": 64, "validation_size": 40, "test_size": 40,
         "evaluations": 3, "pseudo_loss_documents": 3, "learning_rate": 1e-3}


def _setup(base, values):
    config = make_config(SMALL | values)
    tokenizer = load_tokenizer(str(base))
    data = {split: train.encode(tokenizer, examples("nli", split, 64 if split == "train" else 40), 96)
            for split in ("train", "validation")}
    model = adapt(load_classifier(str(base), 3, 0.0, config.seed), config.method, config.rank, config.alpha)
    return config, data, model, tokenizer.pad_token_id


def _fit(base, values, folder, **more):
    config, data, model, pad_id = _setup(base, values)
    return train.fit(model, data["train"], data["validation"], config, train.make_accelerator(config), pad_id, folder,
                     progress=False, **more)


def _weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_one_step_equals_a_step_written_by_hand(tiny_nano, tmp_path):
    """Loss, clipping, AdamW and schedule: the loop's first step is torch's own, to float32 rounding."""
    values = {"method": "full", "steps": 1, "evaluations": 1, "warmup_ratio": 0.0}
    fitted, _ = _fit(tiny_nano, values, tmp_path)
    config, data, model, pad_id = _setup(tiny_nano, values)
    rows = train.batch_order(data["train"], config)[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    batch = train.collate(data["train"], rows, pad_id, "cpu")
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    for name, weight in _weights(fitted).items():
        torch.testing.assert_close(weight, dict(model.named_parameters())[name].detach(), atol=1e-6, rtol=1e-5)


def test_two_identical_runs_are_bitwise_equal(tiny_nano, tmp_path):
    """On a CPU the same configuration gives the same bits."""
    one, _ = _fit(tiny_nano, {"rank": 4}, tmp_path / "a")
    two, _ = _fit(tiny_nano, {"rank": 4}, tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(_weights(one).values(), _weights(two).values(), strict=True))


def test_accumulating_two_halves_equals_one_batch(tiny_nano, tmp_path):
    """2 x 4 examples a step move the weights as 1 x 8 do, within float tolerance."""
    one, _ = _fit(tiny_nano, {"method": "full"}, tmp_path / "a")
    two, _ = _fit(tiny_nano, {"method": "full", "gradient_accumulation": 2}, tmp_path / "b")
    for a, b in zip(_weights(one).values(), _weights(two).values(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


def test_the_loss_falls_on_a_small_set(tmp_path):
    """Sixty steps of the nano model on 64 examples: the last mean loss is well below the first."""
    _, fitted = _fit(nano_folder(), {"method": "full", "steps": 60}, tmp_path)
    assert fitted.curve[-1]["loss"] < 0.8 * fitted.curve[0]["loss"]


def test_the_best_weights_are_a_copy_on_disk(tiny_nano, tmp_path):
    """What comes back is best.safetensors, not whatever the live tensors became afterwards."""
    seen = {}

    def watch(step, loss, model):
        seen[step] = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model, fitted = _fit(tiny_nano, {"method": "full", "steps": 12, "learning_rate": 0.02}, tmp_path, on_step=watch)
    assert set(seen) == set(range(1, 13))
    best = max(fitted.curve, key=lambda point: point["validation_accuracy"])
    assert fitted.best_step == best["step"]
    saved = load_file(tmp_path / "best.safetensors")
    for name, weight in _weights(model).items():
        assert torch.equal(weight, seen[fitted.best_step][name]) and torch.equal(weight, saved[name])


def test_a_run_stopped_in_the_middle_ends_with_the_same_numbers(tiny_nano, tmp_path):
    """Interrupted after step 4 of 6 and started again, it goes on from step 4 and agrees bit for bit, with dropout."""
    values = {"rank": 4, "dropout": 0.1}
    whole, expected = _fit(tiny_nano, values, tmp_path / "a")

    def stop(step, loss, model):
        if step == 5:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        _fit(tiny_nano, values, tmp_path / "b", on_step=stop)
    steps = []
    again, fitted = _fit(tiny_nano, values, tmp_path / "b", on_step=lambda step, *_: steps.append(step))
    assert steps == [5, 6] and fitted == expected
    assert all(torch.equal(a, b) for a, b in zip(_weights(whole).values(), _weights(again).values(), strict=True))


def test_a_checkpoint_of_another_configuration_is_refused(tiny_nano, tmp_path):
    """Continuing it would mix two experiments."""
    _fit(tiny_nano, {"rank": 4}, tmp_path)
    with pytest.raises(InputError, match="another configuration.*--out"):
        _fit(tiny_nano, {"rank": 4, "learning_rate": 5e-4}, tmp_path)


def test_a_broken_checkpoint_is_refused(tiny_nano, tmp_path):
    """Half a file is named, with what to do; it is not continued."""
    (tmp_path / "checkpoint.safetensors").write_bytes(b"half a file")
    with pytest.raises(InputError, match="cannot be read as a checkpoint.*starts afresh"):
        _fit(tiny_nano, {"rank": 4}, tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run_at_once(tiny_nano, tmp_path):
    """It stops at the next validation and leaves no checkpoint, so another rate can be tried in the same place."""
    steps = []
    with pytest.raises(InputError, match="loss of full-s0 is not finite at learning rate 1e.30"):
        _fit(tiny_nano, {"method": "full", "learning_rate": 1e30}, tmp_path,
             on_step=lambda step, *_: steps.append(step))
    assert steps == [1, 2] and not (tmp_path / "checkpoint.safetensors").exists()
    _fit(tiny_nano, {"method": "full"}, tmp_path)


def test_half_precision_that_the_device_has_not_is_refused(monkeypatch):
    """fp16 needs a GPU; on a CPU, also where the launcher asks for one, `auto` is float32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(InputError, match="'fp16' on a CPU; wanted no or bf16"):
        train.make_accelerator(make_config({"rank": 4, "mixed_precision": "fp16"}))
    assert train.make_accelerator(make_config({"rank": 4})).mixed_precision == "no"


def test_evaluation_goes_past_the_wrapper_of_several_processes(tiny_nano):
    """The wrapper exchanges buffers in every forward; processes with different numbers of batches would wait."""
    _, data, model, pad_id = _setup(tiny_nano, {"method": "head"})

    class Process:
        """The second of three: 13 of 40 examples."""
        process_index, num_processes, device = 1, 3, "cpu"
        unwrap_model = staticmethod(lambda wrapped: wrapped.module)
        reduce = staticmethod(lambda value, how: value)
    wrapped = torch.nn.Module()  # has no forward of its own
    wrapped.module = model
    assert 0 <= train.accuracy(wrapped, data["validation"], pad_id, Process) <= 13 / 40


def test_every_epoch_sees_every_example_once(tiny_nano):
    """The order is a permutation an epoch, whatever the sorting by length does within it."""
    config, data, _, _ = _setup(tiny_nano, {"rank": 1, "steps": 8})
    order = train.batch_order(data["train"], config)
    assert order.shape == (8, 8) and sorted(order.ravel()) == list(range(64))
    other = make_config(SMALL | {"rank": 1, "steps": 8, "seed": 1})
    assert not np.array_equal(order, train.batch_order(data["train"], other))


def test_what_is_trained_by_each_method(tiny_nano):
    """full: the twelve weights of two layers; LoRA: r (in + out) each; head: nothing of the encoder."""
    d, f = 32, 64
    full = 2 * (4 * d * d + 2 * d * f)
    lora = 2 * 4 * (4 * 2 * d + 2 * (d + f))
    counts = {method: trainable_counts(_setup(tiny_nano, {"method": method, "rank": rank})[2])
              for method, rank in (("full", None), ("lora", 4), ("head", None))}
    assert {m: c["adapted"] for m, c in counts.items()} == {"full": full, "lora": lora, "head": 0}
    assert len({c["head"] for c in counts.values()}) == 1


def test_norms_and_biases_are_trained_on_request(tiny_nano):
    """The other parameter set of the paper's code: LayerNorms and biases join in for both methods."""
    for method, rank in (("full", None), ("lora", 4)):
        without = adapt(load_classifier(str(tiny_nano), 3, 0.0, 0), method, rank, 8.0)
        with_them = adapt(load_classifier(str(tiny_nano), 3, 0.0, 0), method, rank, 8.0, norms_and_biases=True)
        added = trainable_counts(with_them)["adapted"] - trainable_counts(without)["adapted"]
        assert added == 2 * (4 * 32 + 64 + 32 + 2 * 2 * 32)


def test_a_rank_above_the_smaller_side_is_refused(tiny_nano):
    """LoRA of rank 33 on 32 x 32 is no low-rank update."""
    with pytest.raises(InputError, match="rank is 33; wanted 1 to 32"):
        _setup(tiny_nano, {"rank": 33})


def _command(base, out, *more):
    values = SMALL | {"rank": 4, "model": str(base)}
    config = out.parent / "config.json"
    config.write_text(json.dumps(values))
    return ["-m", "intruder", "run", str(config), "--out", str(out), *more]


def _environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _process(*words):
    return subprocess.run([sys.executable, *words], env=_environment(), capture_output=True, text=True, timeout=300)


def test_two_processes_give_the_result_of_one(tiny_nano, tmp_path):
    """`accelerate launch` with two processes on the CPU (gloo), at the same global batch, agrees with one process.

    The launcher's name for several local processes is --multi_gpu; where there is no GPU they run on the CPU. Its
    --cpu starts a single process unless MPI is installed (`test_the_launcher_for_one_process_says_so`).
    """
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    for name, launch in (("one", []), ("two", launcher)):
        words = _command(tiny_nano, tmp_path / name, "--set", "evaluations=1")
        done = _process(*launch, *words)
        assert done.returncode == 0, done.stderr[-2000:]
        assert sorted(path.suffix for path in (tmp_path / name).iterdir()) == [".json", ".parquet"]
    records = {name: json.loads((tmp_path / name / "lora-r4-s0.json").read_text()) for name in ("one", "two")}
    assert records["two"]["provenance"]["processes"] == 2
    for metric, value in records["one"]["metrics"].items():
        assert records["two"]["metrics"][metric] == pytest.approx(value, abs=1e-4), metric
    losses = {name: record["training"]["curve"][0]["loss"] for name, record in records.items()}
    assert losses["two"] == pytest.approx(losses["one"], abs=1e-5)
    for one, two in zip(records["one"]["matrices"], records["two"]["matrices"], strict=True):
        assert two["update_norm"] == pytest.approx(one["update_norm"], rel=2e-3)


def test_a_killed_command_started_again_ends_with_the_same_record(tiny_nano, tmp_path):
    """SIGKILL after the first checkpoint; the same command then continues and writes the record of an unbroken run."""
    settings = ["--set", "steps=60", "evaluations=12"]
    whole = _command(tiny_nano, tmp_path / "whole", *settings)
    subprocess.run([sys.executable, *whole], env=_environment(), capture_output=True, check=True, timeout=300)
    words = [sys.executable, *_command(tiny_nano, tmp_path / "killed", *settings)]
    process = subprocess.Popen(words, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / ".lora-r4-s0" / "checkpoint.safetensors"
    deadline = time.monotonic() + 240
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists() and not (tmp_path / "killed" / "lora-r4-s0.json").exists()
    subprocess.run(words, env=_environment(), capture_output=True, check=True, timeout=300)
    one, two = (json.loads((tmp_path / name / "lora-r4-s0.json").read_text()) for name in ("whole", "killed"))
    assert all(one[key] == two[key] for key in ("training", "metrics", "matrices"))
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert left == ["lora-r4-s0.json", "lora-r4-s0.spectra.parquet"]


def test_the_launcher_for_one_process_says_so(tiny_nano, tmp_path):
    """`accelerate launch --cpu --num_processes 2` without MPI starts one process: the run succeeds and says it."""
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no"]
    words = _command(tiny_nano, tmp_path / "cpu", "--set", "evaluations=1")
    done = _process(*launcher, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    processes = json.loads((tmp_path / "cpu" / "lora-r4-s0.json").read_text())["provenance"]["processes"]
    assert processes == 2 or train.ONE_PROCESS in done.stderr
