"""The one training loop, through Accelerate: any device, any number of processes, any of the three methods.

It takes objects and returns what happened; it parses nothing and writes only its own checkpoints. What a step does is
a pure function of the configuration and the step's number: the batch, its order and the dropout masks. So a run that
was killed continues from its last checkpoint and ends with the numbers it would have had.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from .config import RunConfig
from .errors import InputError

CHUNK = 32  # batches whose examples are sorted by length together, so that little padding is computed
EVALUATION_BATCH = 128
# what `accelerate launch --cpu --num_processes 2` leads to where no MPI is installed
ONE_PROCESS = ("intruder: note: `accelerate launch --cpu` has started one process only (more need MPI); the numbers "
               "are the same. For several processes on a CPU: accelerate launch --multi_gpu --num_processes 2 "
               "-m intruder ...")


class Encoded(NamedTuple):
    """A tokenised data set: token ids and token types of each example, and the (N,) labels."""

    ids: list[list[int]]
    types: list[list[int]] | None
    labels: np.ndarray


class Fit(NamedTuple):
    """What training did: the step whose weights are best by validation, and the curve of (step, loss, accuracy)."""

    best_step: int
    curve: list[dict]


def make_accelerator(config: RunConfig) -> Accelerator:
    """An Accelerator for the configured precision: `auto` is bf16 or fp16 on a GPU that has it and float32 on a CPU.

    Raises InputError for fp16 on a CPU.
    """
    cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("true", "1")
    if not cuda and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        print(ONE_PROCESS, file=sys.stderr)
    precision = config.mixed_precision
    if precision == "auto":
        precision = "no" if not cuda else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if precision == "fp16" and not cuda:
        raise InputError("mixed_precision is 'fp16' on a CPU; wanted no or bf16 here, e.g. --set mixed_precision=auto")
    return Accelerator(cpu=not cuda, mixed_precision=precision,
                       gradient_accumulation_steps=config.gradient_accumulation)


def encode(tokenizer, examples: Sequence, max_length: int) -> Encoded:
    """Tokenise examples with a `text`, a `text_pair` (or None) and a `label`, cut to `max_length` tokens."""
    pairs = [e.text_pair for e in examples] if examples[0].text_pair is not None else None
    tokens = tokenizer([e.text for e in examples], pairs, truncation=True, max_length=max_length,
                       return_token_type_ids=True)
    types = tokens["token_type_ids"] if any(map(any, tokens["token_type_ids"])) else None
    return Encoded(tokens["input_ids"], types, np.array([e.label for e in examples]))


def collate(data: Encoded, rows: Sequence[int], pad_id: int, device) -> dict[str, torch.Tensor]:
    """The examples `rows` as padded (batch, length) tensors on `device`."""
    length = max(len(data.ids[i]) for i in rows)
    filled = [data.ids[i] + [pad_id] * (length - len(data.ids[i])) for i in rows]
    attention = [[1] * len(data.ids[i]) + [0] * (length - len(data.ids[i])) for i in rows]
    batch = {"input_ids": filled, "attention_mask": attention, "labels": [int(data.labels[i]) for i in rows]}
    if data.types:
        batch["token_type_ids"] = [data.types[i] + [0] * (length - len(data.types[i])) for i in rows]
    return {name: torch.tensor(value, device=device) for name, value in batch.items()}


def batch_order(data: Encoded, config: RunConfig) -> np.ndarray:
    """(steps, batch_size) indices of examples: every epoch a new permutation, sorted by length in `CHUNK` batches."""
    rng = np.random.default_rng([config.seed, 7])
    lengths = np.array([len(ids) for ids in data.ids])
    needed, parts = config.steps * config.batch_size, []
    while sum(map(len, parts)) < needed:
        parts.append(rng.permutation(len(lengths)))
    order = np.concatenate(parts)[:needed]
    for start in range(0, config.steps, CHUNK):
        rows = order[start * config.batch_size:(start + CHUNK) * config.batch_size]
        batches = rows[np.argsort(lengths[rows], kind="stable")].reshape(-1, config.batch_size)
        rows[:] = batches[rng.permutation(len(batches))].ravel()
    return order.reshape(config.steps, config.batch_size)


def accuracy(model, data: Encoded, pad_id: int, accelerator: Accelerator) -> float:
    """Share of examples whose highest logit is their label, over all processes; the model's mode is restored."""
    model = accelerator.unwrap_model(model)  # processes may have different numbers of batches: no exchange in a forward
    was_training = model.training
    model.eval()
    by_length = sorted(range(len(data.labels)), key=lambda i: len(data.ids[i]))
    mine = by_length[accelerator.process_index::accelerator.num_processes]
    correct = torch.zeros(1, device=accelerator.device)
    with torch.inference_mode():
        for start in range(0, len(mine), EVALUATION_BATCH):
            batch = collate(data, mine[start:start + EVALUATION_BATCH], pad_id, accelerator.device)
            labels = batch.pop("labels")
            correct += (model(**batch).logits.argmax(-1) == labels).sum()
    model.train(was_training)
    return float(accelerator.reduce(correct, "sum")) / len(by_length)


def fit(model: torch.nn.Module, train: Encoded, validation: Encoded, config: RunConfig, accelerator: Accelerator,
        pad_id: int, folder: str | Path, progress: bool = True,
        on_step: Callable[[int, float, torch.nn.Module], None] | None = None) -> tuple[torch.nn.Module, Fit]:
    """Train `model`'s trainable parameters; return (the model with its best weights by validation, what happened).

    AdamW (betas .9, .999), linear decay after warm-up, `config.batch_size` examples a step over all processes and
    micro-batches. At each of `config.evaluations` validations the state goes to `folder`/checkpoint.safetensors and,
    if it is the best so far, the weights to `folder`/best.safetensors; a checkpoint found there is continued.
    on_step(step, loss, model) is called after every step.  Raises InputError if the batch does not split evenly over
    processes and micro-batches, if `folder` holds a broken checkpoint or that of another
    configuration, or if the loss is no longer finite.
    """
    shards = accelerator.num_processes * config.gradient_accumulation
    if config.batch_size % shards:
        raise InputError(f"batch_size is {config.batch_size} over {accelerator.num_processes} processes and "
                         f"{config.gradient_accumulation} micro-batches; wanted a multiple of {shards}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    inner = optimizer
    order = batch_order(train, config)
    model, optimizer = accelerator.prepare(model, optimizer)
    plain = accelerator.unwrap_model(model)
    state = _resume(plain, inner, config, folder)
    for group in inner.param_groups:
        group["initial_lr"] = config.learning_rate
    warmup = int(config.warmup_ratio * config.steps)
    schedule = get_linear_schedule_with_warmup(inner, warmup, config.steps, last_epoch=state["step"] - 1)
    marks = {round(config.steps * (i + 1) / config.evaluations) for i in range(config.evaluations)}
    losses = []
    bar = tqdm(range(state["step"], config.steps), initial=state["step"], total=config.steps, unit="step",
               desc=config.run, disable=not progress or not accelerator.is_main_process, leave=False)
    model.train()
    for step in bar:
        mine = order[step].reshape(config.gradient_accumulation, accelerator.num_processes, -1)
        torch.manual_seed((config.seed * 1_000_003 + step) * 64 + accelerator.process_index)
        loss_sum = torch.zeros(1, device=accelerator.device)
        for rows in mine[:, accelerator.process_index]:
            with accelerator.accumulate(model):
                loss = model(**collate(train, rows, pad_id, accelerator.device)).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            loss_sum += loss.detach() / config.gradient_accumulation
        schedule.step()
        losses.append(float(accelerator.reduce(loss_sum, "mean")))
        if on_step:
            on_step(step + 1, losses[-1], plain)
        if step + 1 in marks:
            if not np.isfinite(losses).all():
                _diverged(config, folder, accelerator)
            score = accuracy(model, validation, pad_id, accelerator)
            state["curve"].append({"step": step + 1, "loss": round(float(np.mean(losses)), 6),
                                   "validation_accuracy": round(score, 6)})
            losses, state["step"] = [], step + 1
            better = score > state["best_accuracy"]
            if better:
                state |= {"best_accuracy": score, "best_step": step + 1}
            if accelerator.is_main_process:
                if better:
                    _save(folder / "best.safetensors", _trainable(plain))
                _checkpoint(plain, inner, config, folder, state)
            accelerator.wait_for_everyone()
            bar.set_postfix(validation=f"{score:.3f}")
    _load(plain, load_file(folder / "best.safetensors"))
    accelerator.wait_for_everyone()  # the caller may remove the folder
    return plain, Fit(state["best_step"], state["curve"])


def _diverged(config: RunConfig, folder: Path, accelerator: Accelerator) -> None:
    """Raise InputError; the checkpoint goes, so that the same command with another rate starts afresh."""
    if accelerator.is_main_process:
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    raise InputError(f"the loss of {config.run} is not finite at learning rate {config.learning_rate:g}; "
                     "wanted a rate at which it trains, e.g. --set learning_rate=1e-4")


# -- state on disk: safetensors only, whole or not at all -------------------------------------------------------------

def _trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def _load(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[name])


def _save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, metadata)
    os.replace(partial, path)


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _checkpoint(model, optimizer, config: RunConfig, folder: Path, state: dict) -> None:
    tensors = {f"weight.{name}": tensor for name, tensor in _trainable(model).items()}
    for i, parameter in enumerate(_parameters(optimizer)):
        for key in ("exp_avg", "exp_avg_sq", "step"):
            tensors[f"{key}.{i}"] = optimizer.state[parameter][key].detach().cpu().contiguous()
    _save(folder / "checkpoint.safetensors", tensors, {"state": json.dumps(state), "digest": config.digest()})


def _resume(model, optimizer, config: RunConfig, folder: Path) -> dict:
    """Continue from `folder`/checkpoint.safetensors if it is there; else start afresh."""
    path = folder / "checkpoint.safetensors"
    if not path.is_file():
        return {"step": 0, "best_step": 0, "best_accuracy": -1.0, "curve": []}
    try:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as a checkpoint ({error}); wanted a whole one: remove {folder}, and "
                         "the run starts afresh") from error
    if metadata.get("digest") != config.digest():
        raise InputError(f"{folder} holds the checkpoint of another configuration of {config.run}; wanted an empty "
                         "folder: remove it or choose another with --out")
    state = json.loads(metadata["state"])
    _load(model, {name.removeprefix("weight."): tensor for name, tensor in tensors.items()
                  if name.startswith("weight.")})
    for i, parameter in enumerate(_parameters(optimizer)):
        optimizer.state[parameter] = {key: tensors[f"{key}.{i}"].to(parameter.device if key != "step" else "cpu")
                                  for key in ("exp_avg", "exp_avg_sq", "step")}
    return state
