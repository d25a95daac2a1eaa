"""Mitigate an adapter: its folder on disk into a new one that PEFT loads, or (`mitigate_model`) a loaded PeftModel."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .adapters import MAGNITUDE, Adapter, Target, open_adapter
from .checkpoints import Checkpoint, existing_folder, open_checkpoint, read_json
from .errors import InputError
from .experts import restack, stacks
from .hub import local_folder
from .mitigate_layer import Layer, Outcome, Settings, mitigate_layer, pattern_key, tidy, total_facts
from .mitigate_loaded import mitigate_model
from .weights import matrix_name, pair_sources
from .whole import new_folder, refuse_existing

__all__ = ["mitigate_adapter", "mitigate_model"]
WEIGHTS, CONFIG, REPORT = "adapter_model.safetensors", "adapter_config.json", "mitigation.json"
# Kinds whose factors are edited where they are, and kinds that plain LoRA on the true base represents exactly.
IN_PLACE, CONVERTED = ("lora", "rslora", "dora"), ("pissa", "olora", "adalora", "vera")
# Fields of adapter_config.json that mean the same in every kind, for a configuration made anew.
SHARED_FIELDS = (
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "target_modules",
    "exclude_modules",
    "fan_in_fan_out",
    "bias",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
)
# Files beside an adapter that belong to its training and would not fit the result, or could run code.
NOT_COPIED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def mitigate_adapter(
    base: str | Path,
    adapter: str | Path,
    scale: float,
    out: str | Path,
    which: str = "top",
    control: str | None = None,
    rank: str = "grow",
    k: int = 10,
    epsilon: float = 0.5,
    rounds: int = 1,
    seed: int = 0,
    cache: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> dict:
    """Write to `out` the PEFT adapter whose tuned matrices are W + (lambda - 1) sum_{i in I} u_i sigma_i v_i^T.

    `base` and `adapter` as in `audit`; lambda = `scale` >= 0: 0 removes the chosen intruders, 1 is the identity.
    `which` "top" takes the first intruder of each matrix (the paper), "all" every one among the leading k; `control`
    edits something else of the same size instead (`edit.plan`). `rank` "grow" (rank r + |I|, exact) or "keep" (best of
    rank r; the discarded share is reported). `rounds` repeats on the result while intruders are left.

    The folder loads with PeftModel.from_pretrained on the same base. LoRA, rsLoRA and DoRA (linear, Conv1D,
    convolution, embedding) stay what they are: only edited factors, their entries in rank_pattern and alpha_pattern
    and, with DoRA, their magnitudes are new; heads, biases and all other files are carried over byte for byte. PiSSA,
    OLoRA, AdaLoRA and VeRA become plain LoRA on the true base if anything is edited. With lambda = 1, or if there is no
    intruder, the adapter is copied unchanged, whatever its kind. Returns what `out`/mitigation.json holds.

    Stacked experts (target_parameters) share one rank in PEFT, so those of a parameter grow to the largest one needed.

    Raises InputError for settings out of range, an `out` that exists, an adapter without an exact LoRA representation
    (DoRA on embeddings), named, everything `pair_sources` refuses, and a full disk; nothing is left.
    """
    say = say or (lambda line: None)
    settings = Settings(scale, which, control, rank, k, epsilon, rounds, seed)
    refuse_existing(out)
    folder = existing_folder(local_folder(adapter))
    if not (folder / CONFIG).is_file():
        raise InputError(f"no {CONFIG} in {folder}; wanted a PEFT adapter: a full fine-tune cannot be written as one")
    if settings.scale == 1:
        with new_folder(out) as place:
            _copy(folder, place)
            return _report(place, total_facts(settings, [], []))
    store = None
    if cache is not None:
        from .basis import BasisStore

        store = BasisStore(cache)
    opened = open_adapter(folder)
    checkpoint = open_checkpoint(local_folder(base))
    stacked = stacks(checkpoint, opened)
    targets = {
        name: target for module, target in opened.targets.items() if (name := matrix_name(module)) not in stacked
    }
    outcomes, left = {}, []
    sources = pair_sources(base, folder)
    for number, source in enumerate(sources):
        target = targets.get(source.name)
        if source.kind == "whole":
            left.append(source.name)
            continue
        layer = _layer(opened, target, source)
        outcome = mitigate_layer(layer, settings, store)
        del layer
        outcomes[source.name] = outcome
        if outcome.edited and target is not None and opened.kind == "dora" and target.kind == "embedding":
            raise InputError(
                f"{source.name} has an intruder and is DoRA on an embedding, which has no exact edit of this "
                "kind; merge the adapter and fine-tune or edit the full model"
            )
        say(
            f"{number + 1}/{len(sources)} matrices, {outcome.facts['before']} intruders before and "
            f"{outcome.facts['after']} after: {source.name}"
        )
    left += sorted(set(targets) - outcomes.keys())
    result = total_facts(settings, [outcome.facts for outcome in outcomes.values()], left)
    with new_folder(out) as place:
        _copy(folder, place)
        edited = {name: outcome for name, outcome in outcomes.items() if outcome.edited}
        if edited and opened.kind in IN_PLACE:
            _rewrite(opened, targets, edited, place, checkpoint, settings.rank)
        elif edited:
            _convert(opened, targets, outcomes, place)
        return _report(place, result)


def _layer(opened: Adapter, target: Target | None, source) -> Layer:
    change = source.load_change()
    if opened.kind == "dora" and target is not None:
        return Layer(source.name, change.pretrained, opened.read(target.module), opened.magnitude(target.module))
    if change.factors is None:
        raise InputError(
            f"{source.name} is changed by an adapter of kind {source.kind}, whose update is not of low rank; "
            "wanted LoRA, rsLoRA, DoRA, PiSSA, OLoRA, AdaLoRA or VeRA"
        )
    return Layer(source.name, change.pretrained, change.factors)


def _rewrite(
    opened: Adapter, targets: dict[str, Target], edited: dict[str, Outcome], place: Path, base: Checkpoint, rank: str
) -> None:
    """Put the edited factors and magnitudes in the place of the old ones; every other tensor stays."""
    tensors, metadata = _tensors(place)
    config = read_json(place / CONFIG)
    ranks, alphas = {}, {}
    stacked = {name: outcome.update for name, outcome in edited.items() if name not in targets}
    for new in restack(base, opened, stacked) if stacked else ():
        target = opened.targets[new.module]
        if rank == "keep" and new.rank > target.rank:
            raise InputError(
                f"the halves of {new.parameter} need rank {new.rank} together; wanted {target.rank}: use --rank grow"
            )
        for letter, value in (("B", new.B), ("A", new.A)):
            dtype = torch.promote_types(tensors[target.tensors[letter]].dtype, torch.float32)
            tensors[target.tensors[letter]] = value.to(dtype).contiguous()
        key = pattern_key(new.parameter)
        ranks[key] = new.rank
        alphas[key] = tidy(target.scale * (new.rank**0.5 if config.get("use_rslora") else new.rank))
    for name, outcome in edited.items():
        if name not in targets:
            continue
        target = targets[name]
        old_B, old_A = tensors[target.tensors["B"]], tensors[target.tensors["A"]]
        B, A, scale = outcome.update
        # What was stored in half precision is stored in float32 once edited: rounding would undo a part of the edit.
        dtype = torch.promote_types(old_B.dtype, torch.float32)
        r = B.shape[1]
        tensors[target.tensors["B"]] = B.to(dtype).reshape(old_B.shape[0], r, *old_B.shape[2:]).contiguous()
        tensors[target.tensors["A"]] = A.to(dtype).reshape(r, *old_A.shape[1:]).contiguous()
        if outcome.magnitude is not None:
            old = tensors[f"{target.module}.{MAGNITUDE}"]
            tensors[f"{target.module}.{MAGNITUDE}"] = outcome.magnitude.to(dtype).reshape(old.shape).contiguous()
        if r != target.rank:
            key = pattern_key(target.module.removeprefix("base_model.model."))
            ranks[key] = r
            alphas[key] = tidy(scale * (r**0.5 if config.get("use_rslora") else r))
    # The first pattern that matches a name wins, so the new entries stand before the old ones.
    config["rank_pattern"] = ranks | (config.get("rank_pattern") or {})
    config["alpha_pattern"] = alphas | (config.get("alpha_pattern") or {})
    _save(place, tensors, metadata, config)


def _convert(opened: Adapter, targets: dict[str, Target], outcomes: dict[str, Outcome], place: Path) -> None:
    """Write every module as plain LoRA on the true base, scale 1; heads and biases stay."""
    lost = sorted(set(targets) - outcomes.keys())
    if lost:
        raise InputError(
            f"{lost[0]} is adapted by {opened.kind} and is not counted, so it cannot be turned into plain "
            "LoRA with the others; wanted an adapter on counted matrices only"
        )
    stored, metadata = _tensors(place)
    tensors = {name: stored[name] for name in opened.whole_tensors}
    old = read_json(place / CONFIG)
    config = {key: old[key] for key in SHARED_FIELDS if key in old} | {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    for name, outcome in outcomes.items():
        target, (B, A, scale) = targets[name], outcome.update
        if target.kind != "linear":
            raise InputError(f"{name} is a {target.kind} adapted by {opened.kind}; wanted linear layers only")
        tensors[f"{target.module}.lora_B.weight"] = (scale * B).contiguous()
        tensors[f"{target.module}.lora_A.weight"] = A.clone().contiguous()
        key = pattern_key(target.module.removeprefix("base_model.model."))
        config["rank_pattern"][key] = config["alpha_pattern"][key] = B.shape[1]
    _save(place, tensors, metadata, config)


def _tensors(place: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(place / WEIGHTS, "pt") as file:
        metadata = file.metadata() or {}
    return load_file(place / WEIGHTS), metadata


def _save(place: Path, tensors: dict, metadata: dict, config: dict) -> None:
    save_file(tensors, place / f"{WEIGHTS}.partial", {"format": "pt"} | metadata)
    (place / f"{WEIGHTS}.partial").replace(place / WEIGHTS)
    (place / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=False) + "\n", encoding="utf-8")


def _copy(folder: Path, place: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix not in NOT_COPIED and path.name != REPORT:
            shutil.copyfile(path, place / path.name)


def _report(place: Path, result: dict) -> dict:
    (place / REPORT).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return result
