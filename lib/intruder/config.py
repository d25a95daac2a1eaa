"""What a run is: one frozen, validated set of values. Defaults stand here once; presets and files hold differences."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import InputError
from .schema import METHODS, STAGES
from .tasks import LABELS, TASKS

PRESETS = {
    "nano": {},
    "minilm": {"task": "sst2", "steps": 400, "train_size": None, "validation_size": None, "test_size": None,
               "dropout": None, "pseudo_loss_documents": 0},
}
PRESET_TASKS = {"nano": tuple(TASKS), "minilm": ("sst2",)}
PRECISIONS = ("auto", "no", "bf16", "fp16")
MAX_SEED = 2**32 - 1
SHORTEST = 8  # tokens: two texts and the special tokens around them


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, in full. Construct it with `make_config`, which applies a preset's differences and checks everything."""

    preset: str = "nano"
    task: str = "nli"
    method: str = "lora"                     # full, lora or head
    rank: int | None = None                  # r, for lora only
    alpha: float | None = None               # LoRA's update is scaled by alpha / rank; None means 2 * rank
    learning_rate: float = 1e-3              # peak rate of AdamW
    steps: int = 2000                        # optimiser steps
    batch_size: int = 16                     # examples a step, over all processes and accumulated micro-batches
    gradient_accumulation: int = 1           # micro-batches a step
    warmup_ratio: float = 0.06               # share of the steps with rising rate; then linear decay to 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0               # gradients are clipped to this norm
    dropout: float | None = 0.0              # None: the model's own
    norms_and_biases: bool = False           # train the encoder's LayerNorms and biases too (paper's v1 code)
    train_size: int | None = 20_000          # examples; None: all of a finite data set
    validation_size: int | None = 1000
    test_size: int | None = 4000
    evaluations: int = 5                     # validations over the run; the best one's weights are measured
    max_length: int = 96                     # tokens
    pseudo_loss_documents: int = 200         # fresh held-out documents; 0: not measured
    mixed_precision: str = "auto"            # auto: bf16 or fp16 where the device has it, no on a CPU
    model: str | None = None                 # directory or hub id instead of the preset's base
    data: str | None = None                  # folder of local files instead of the hub
    seed: int = 0                            # data sampling and order, initial head and A, dropout
    variant: str | None = None               # a word that tells runs of one method and rank apart, e.g. rate_3e-4
    stage: str = "report"                    # or tuning: a learning-rate trial, validated but not measured

    def __post_init__(self):
        for name, wanted in (("preset", PRESETS), ("method", METHODS), ("stage", STAGES),
                             ("mixed_precision", PRECISIONS)):
            _one_of(name, getattr(self, name), wanted)
        _one_of("task", self.task, PRESET_TASKS[self.preset], f"; preset {self.preset} has no other")
        if self.method == "lora" and self.rank is None:
            raise InputError("rank is missing; method lora needs one, e.g. --set rank=8")
        if self.method != "lora" and (self.rank, self.alpha) != (None, None):
            raise InputError(f"rank is {self.rank} and alpha {self.alpha} with method {self.method}; "
                             "only --set method=lora has them")
        for name in ("rank", "steps", "batch_size", "gradient_accumulation", "train_size", "validation_size",
                     "test_size", "evaluations", "max_length"):
            value, least = getattr(self, name), SHORTEST if name == "max_length" else 1
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; wanted {least} or more")
        for name in ("learning_rate", "alpha", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} is {value}; wanted a positive number")
        for name, high in (("warmup_ratio", 1), ("dropout", 1), ("weight_decay", float("inf"))):
            value = getattr(self, name)
            if value is not None and not 0 <= value < high:
                raise InputError(f"{name} is {value}; wanted 0 or more" + (f" and below {high}" if high == 1 else ""))
        if self.pseudo_loss_documents < 0:
            raise InputError(f"pseudo_loss_documents is {self.pseudo_loss_documents}; wanted 0 or more")
        if not 0 <= self.seed <= MAX_SEED:
            raise InputError(f"seed is {self.seed}; wanted 0 to {MAX_SEED}")
        if self.data is not None and self.task in TASKS:
            raise InputError(f"data is {self.data!r} with task {self.task}, which is sampled on the fly; wanted no "
                             "data, or --set preset=minilm task=sst2")
        if self.variant is not None and not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", self.variant):
            raise InputError(f"variant is {self.variant!r}; wanted small letters, digits, _ and -, e.g. rate_3e-4")
        if self.batch_size % self.gradient_accumulation:
            raise InputError(f"batch_size is {self.batch_size} with gradient_accumulation {self.gradient_accumulation};"
                             " wanted a batch that splits evenly, e.g. --set batch_size=16 gradient_accumulation=2")

    @property
    def label(self) -> str:
        """full, head, lora-r8, or with a variant full.rate_3e-4."""
        main = self.method if self.rank is None else f"{self.method}-r{self.rank}"
        return f"{main}.{self.variant}" if self.variant else main

    @property
    def run(self) -> str:
        """The run's name: method and seed, or for a tuning run method and learning rate."""
        return f"{self.label}-s{self.seed}" if self.stage == "report" else f"{self.label}-lr{self.learning_rate:g}"

    def values(self) -> dict:
        """All fields as a plain dictionary, as a record keeps them."""
        return dataclasses.asdict(self)

    def digest(self) -> str:
        """A short hash of all fields: two configurations with the same digest are the same run."""
        return hashlib.sha256(json.dumps(self.values(), sort_keys=True).encode()).hexdigest()[:16]


FIELDS = {field.name: field for field in dataclasses.fields(RunConfig)}


def _one_of(name: str, value: str, wanted: Iterable[str], more: str = "") -> None:
    if not isinstance(value, str) or value not in wanted:
        raise InputError(f"{name} is {value!r}; wanted one of {', '.join(wanted)}{more}")


def make_config(values: dict) -> RunConfig:
    """The configuration of `values`: defaults, then the preset's differences, then these.

    Raises InputError for an unknown key (with the nearest known one), a value of the wrong type or out of range.
    """
    for key in values:
        if key not in FIELDS:
            near = difflib.get_close_matches(key, FIELDS, n=1)
            raise InputError(f"key {key!r} is unknown; " + (f"did you mean {near[0]!r}? " if near else "") +
                             f"Known keys: {', '.join(FIELDS)}")
    _one_of("preset", values.get("preset", "nano"), PRESETS)
    merged = PRESETS[values.get("preset", "nano")] | values
    checked = {key: _typed(key, value) for key, value in merged.items()}
    config = RunConfig(**checked)
    if config.method == "lora" and config.alpha is None:
        config = dataclasses.replace(config, alpha=2.0 * config.rank)
    return config


def _typed(key: str, value):
    kind = FIELDS[key].type
    if value is None and "None" in kind:
        return None
    if "bool" in kind:
        if isinstance(value, bool):
            return value
    elif "int" in kind:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif "float" in kind:
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53
        if whole or isinstance(value, float):
            return float(value)
    elif isinstance(value, str):
        return value
    raise InputError(f"{key} is {value!r}; wanted {kind.replace(' | ', ' or ').replace('None', 'null')}, "
                     f"e.g. --set {key}={json.dumps(FIELDS[key].default)}")


def read_config(path: str | Path) -> dict:
    """The values of a JSON configuration file; InputError if it is missing, not one JSON object, or repeats a key."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no configuration file {str(path)!r}; wanted a JSON file such as "
                         "lib/experiments/nano-nli-lora-r8.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}; wanted one object such as {{\"method\": \"lora\", \"rank\": 8}}"
                         ) from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}; wanted one object of keys and values")
    return values


def once(pairs: Iterable[tuple[str, object]]) -> dict:
    """The pairs as a dictionary; InputError for a key that stands twice: which value was meant cannot be known."""
    values = {}
    for key, value in pairs:
        if key in values:
            raise InputError(f"key {key!r} is given twice, as {json.dumps(values[key])} and {json.dumps(value)}; "
                             "wanted it once")
        values[key] = value
    return values


def parse_setting(text: str) -> tuple[str, object]:
    """`key=value` from the command line; the value is JSON where it parses as JSON, otherwise a string."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"setting {text!r} is not key=value; wanted for example --set rank=8")
    try:
        return key, json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        return key, value


def check_out(folder: str | Path) -> None:
    """Raise InputError unless `folder` is a folder to write to, or one that can be made; creates nothing."""
    folder = Path(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"{str(there)!r} is a file; wanted a folder to write to, e.g. --out runs")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{str(there)!r} cannot be written to; wanted a folder that can, e.g. --out runs")


def labels_of(config: RunConfig) -> tuple[str, ...]:
    """The label names of the configured task."""
    return LABELS[config.task]
