"""One run, from configuration to record: load, train, measure, write. The only module that writes records of runs."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from . import language
from .config import RunConfig, check_out, labels_of, make_config
from .data import load_examples, majority_accuracy
from .errors import InputError
from .measure import measure_pairs, pseudo_loss
from .models import (adapt, folder_sha256, load_classifier, load_masked_lm, load_tokenizer, model_revision,
                     model_source, reattach_lm_head, trainable_counts)
from .provenance import provenance
from .records import RunRecord, write_record, write_spectra
from .train import accuracy, encode, fit, make_accelerator
from .weights import model_pairs

PSEUDO_LOSS_SEED = 4242  # the fresh documents on which forgetting is measured: the same for every run
NULL_SEED = 0
MATRIX_NUMBERS = ("effective_rank", "update_norm", "pretrained_norm")


class Run(NamedTuple):
    """A finished run: its record, and its spectra (None for the head alone and for tuning runs)."""

    record: RunRecord
    spectra: pd.DataFrame | None


def run_config(config: RunConfig, out: str | Path | None = None, command: str = "", progress: bool = True,
               on_step: Callable | None = None) -> Run | None:
    """Train and measure `config`; with `out`, write `out`/<run>.json and `out`/<run>.spectra.parquet.

    Checkpoints lie in `out`/.<run> while the run is under way, so that a killed run continues; a finished run leaves
    none. Without `out` nothing is kept. Of several processes the first one measures and writes; the others return None.
    Raises InputError if `out` cannot be written to or already holds a record of that name.
    """
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            return _run(config, Path(folder), command, progress, on_step)
    out = Path(out)
    check_out(out)
    if (out / f"{config.run}.json").exists():
        raise InputError(f"{out / config.run}.json already exists; wanted a new run: remove it, or choose another "
                         "--out")
    done = _run(config, out / f".{config.run}", command, progress, on_step)
    if done is None:
        return None
    if done.spectra is not None:
        write_spectra(done.spectra, out / f"{config.run}.spectra.parquet")
    write_record(done.record, out)
    shutil.rmtree(out / f".{config.run}", ignore_errors=True)
    return done


def _run(config: RunConfig, folder: Path, command: str, progress: bool, on_step: Callable | None) -> Run | None:
    origin, clock = provenance(command), time.perf_counter()
    source = model_source(config.preset, config.model)
    examples, data = load_examples(config)
    accelerator = make_accelerator(config)
    tokenizer = load_tokenizer(source)
    if config.max_length > tokenizer.model_max_length:
        raise InputError(f"max_length is {config.max_length}; wanted at most {tokenizer.model_max_length}, the longest "
                         "text of this model")
    base = load_classifier(source, len(labels_of(config)), config.dropout, config.seed)
    base_state = {name: tensor.detach().clone() for name, tensor in base.state_dict().items()}
    model = adapt(base, config.method, config.rank, config.alpha, config.norms_and_biases, config.seed)
    trainable = trainable_counts(model)
    splits = {name: encode(tokenizer, rows, config.max_length) for name, rows in examples.items()}
    pad_id = tokenizer.pad_token_id
    model, fitted = fit(model, splits["train"], splits["validation"], config, accelerator, pad_id, folder, progress,
                        on_step)
    test_accuracy = None
    if config.stage == "report":
        test_accuracy = round(accuracy(model, splits["test"], pad_id, accelerator), 6)
    if not accelerator.is_main_process:
        return None
    metrics = {"validation_accuracy": max(point["validation_accuracy"] for point in fitted.curve),
               "test_accuracy": test_accuracy,
               "majority_accuracy": round(majority_accuracy(examples["train"], examples["test"]), 6),
               "pseudo_loss": None, "base_pseudo_loss": None}
    missing, spectra, matrices = {}, None, []
    if config.stage == "tuning":
        missing = dict.fromkeys(("test_accuracy", "pseudo_loss", "base_pseudo_loss"),
                                "a learning-rate trial is judged by validation accuracy alone")
    else:
        if config.method != "head":
            model = model.cpu()
            spectra, matrices = measure_pairs(model_pairs(base_state, model), NULL_SEED)
            spectra.insert(0, "run", config.run)
        metrics |= _forgetting(config, source, model, accelerator.device, missing)
    origin |= {"wall_seconds": round(time.perf_counter() - clock, 1), "processes": accelerator.num_processes,
               "mixed_precision": accelerator.mixed_precision, "data": data,
               "model": {"id": _public_id(source, config), "sha256": folder_sha256(source),
                         "revision": model_revision(source)}}
    record = RunRecord(
        run=config.run, config=_portable(config), provenance=origin, metrics=metrics, missing=missing,
        training={"steps": config.steps, "best_step": fitted.best_step, "trainable": trainable, "curve": fitted.curve},
        matrices=[matrix | {name: round(matrix[name], 6) for name in MATRIX_NUMBERS} for matrix in matrices])
    return Run(record, spectra)


def _public_id(source: str, config: RunConfig) -> str:
    """What a record calls the model: the preset's name for a local copy, never a path of somebody's machine."""
    return f"{config.preset} (local files)" if Path(source).exists() and config.model else \
        f"intruder/assets/{config.preset}" if Path(source).exists() else source


def _portable(config: RunConfig) -> dict:
    """The configuration as a record keeps it: local folders by their last name only."""
    values = config.values()
    for key in ("model", "data"):
        if values[key] and Path(values[key]).exists():
            values[key] = Path(values[key]).name
    return values


def _forgetting(config: RunConfig, source: str, model: torch.nn.Module, device, missing: dict) -> dict:
    """Pseudo-loss of the tuned encoder and of the base on fresh documents, or the reason why there is none."""
    names = ("pseudo_loss", "base_pseudo_loss")
    if config.preset != "nano":
        missing |= dict.fromkeys(names, "this base ships no masked-LM head")
    elif not config.pseudo_loss_documents:
        missing |= dict.fromkeys(names, "pseudo_loss_documents is 0")
    if missing:
        return dict.fromkeys(names)
    base = base_pseudo_loss(source, config.pseudo_loss_documents, str(device))
    if config.method == "head":
        return {"pseudo_loss": base, "base_pseudo_loss": base}
    tuned = reattach_lm_head(load_masked_lm(source), model)
    return {"pseudo_loss": _loss(tuned, source, config.pseudo_loss_documents, device), "base_pseudo_loss": base}


@lru_cache(maxsize=8)
def base_pseudo_loss(source: str, documents: int, device: str = "cpu") -> float:
    """Pseudo-loss of the untouched base on the first `documents` fresh documents, in nats per token."""
    return _loss(load_masked_lm(source), source, documents, device)


def _loss(masked_lm, source: str, documents: int, device) -> float:
    tokenizer = load_tokenizer(source)
    texts = [language.document("test", PSEUDO_LOSS_SEED, index) for index in range(documents)]
    sequences = tokenizer(texts, truncation=True)["input_ids"]
    return round(pseudo_loss(masked_lm.to(device), sequences, tokenizer.mask_token_id, tokenizer.all_special_ids), 6)


def quick_run(task: str = "nli", method: str = "lora", rank: int | None = None, learning_rate: float = 1e-3,
              steps: int = 300, seed: int = 0, progress: bool = True, **settings) -> Run:
    """A short nano run for a notebook: nothing is written; returns its record and its spectra (for `widgets.explore`).

    Further settings are keys of `RunConfig`, e.g. alpha=16. The defaults are small: 500 validation and 1,000 test
    examples, no pseudo-loss; a run of 300 steps takes some ten seconds on one core.
    """
    small = {"train_size": steps * 16, "validation_size": 500, "test_size": 1000, "pseudo_loss_documents": 0,
             "evaluations": 3}
    config = make_config(small | {"task": task, "method": method, "rank": rank, "learning_rate": learning_rate,
                                  "steps": steps, "seed": seed} | settings)
    return run_config(config, command="quick_run", progress=progress)
