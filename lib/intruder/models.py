"""Base models and the three ways to adapt them: full fine-tuning, LoRA (PEFT), and the classification head alone.

Every loader takes a local directory or a hub id, reads safetensors only, and never runs remote code.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from importlib.resources import files
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from transformers import (AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer,
                          PreTrainedModel, PreTrainedTokenizerBase)
from transformers.utils import logging

from .errors import InputError
from .weights import lora_scale, lora_update

NANO = "nano"
HUB_IDS = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}
# q, k, v, attention output, FFN in, FFN out of every encoder layer: what the paper calls "all linear layers"
ADAPTED = r"(?:.*\.)?encoder\.layer\.\d+\.(?:attention\.self\.(?:query|key|value)|attention\.output\.dense|" \
          r"intermediate\.dense|output\.dense)"
HEADS = ("classifier", "pooler")


def nano_folder() -> Path:
    """The folder of the nano base model that ships with this package."""
    return Path(str(files("intruder") / "assets" / NANO))


def model_source(preset: str, model: str | None) -> str:
    """Where the base of `preset` comes from: `model` if given (directory or hub id), else the preset's own."""
    if model:
        if (Path(model).is_dir() and not (Path(model) / "config.json").is_file()) or Path(model).is_file():
            raise InputError(f"model is {model!r}, which holds no config.json; wanted a model directory or a hub id, "
                             "e.g. --set model=sentence-transformers/all-MiniLM-L6-v2")
        return model
    return str(nano_folder()) if preset == NANO else HUB_IDS[preset]


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a directory or under a hub id; InputError if there is none."""
    tokenizer = _loading(AutoTokenizer.from_pretrained, source)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers makes an empty one where files are lost
        raise InputError(f"{source} holds no tokenizer; wanted tokenizer.json and tokenizer_config.json beside "
                         "config.json")
    return tokenizer


def load_classifier(source: str, labels: int, dropout: float | None, seed: int) -> PreTrainedModel:
    """The pre-trained encoder of `source` under a fresh classification head for `labels` classes, in float32.

    dropout: probability for every dropout layer, or None for the model's own. The head's initial weights depend on
    `seed` alone. Raises InputError if a weight of the encoder is missing or not finite: a fresh one is no base.
    """
    config = _loading(AutoConfig.from_pretrained, source)
    config.num_labels = labels
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
        config.classifier_dropout = dropout
    torch.manual_seed(seed)
    model, report = _loading(AutoModelForSequenceClassification.from_pretrained, source, config=config,
                             dtype=torch.float32, output_loading_info=True)
    fresh = sorted(key for key in report["missing_keys"] if {"encoder", "embeddings"} & set(key.split(".")))
    if fresh:
        raise InputError(f"{source} holds no weights for {fresh[0]} ({len(fresh)} missing); wanted the whole "
                         "pre-trained encoder: check that config.json and model.safetensors belong together")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"{name} in {source} holds NaN or infinity; wanted finite weights")
    return model


def load_masked_lm(source: str) -> PreTrainedModel:
    """The pre-trained encoder of `source` with its pre-trained LM head, in float32 and evaluation mode.

    Raises InputError if the checkpoint ships no LM head: a fresh one would measure nothing.
    """
    model, report = _loading(AutoModelForMaskedLM.from_pretrained, source, dtype=torch.float32,
                             output_loading_info=True)
    # a decoder tied to the embeddings is not stored twice
    missing = [key for key in report["missing_keys"] if "decoder" not in key]
    if missing:
        raise InputError(f"{source} ships no masked-LM head (missing {', '.join(sorted(missing)[:3])}); "
                         "pseudo-loss needs a base saved with one, e.g. preset nano or FacebookAI/roberta-base")
    return model.eval()


def _loading(load, source: str, **options):
    """Call a transformers loader on safetensors only; a missing source becomes one clear InputError."""
    if isinstance(load.__self__, type) and "Model" in load.__self__.__name__:
        options["use_safetensors"] = True
    verbosity = logging.get_verbosity()
    # the report of fresh head weights is expected, and no progress widget may reach a page
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return load(source, trust_remote_code=False, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "ignore_mismatched_sizes" in reason:
            reason = "config.json and model.safetensors disagree about the shape of a weight"
        raise InputError(f"cannot load {source!r}: {reason}; wanted a hub id (needs a network) or a local directory "
                         "with config.json, tokenizer files and model.safetensors") from error
    finally:
        logging.set_verbosity(verbosity)


def adapted_names(model: torch.nn.Module) -> list[str]:
    """Names of the linear modules that are adapted and counted, in model order; no head, no embeddings."""
    return [name for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and re.fullmatch(ADAPTED, name)]


def adapt(model: PreTrainedModel, method: str, rank: int | None = None, alpha: float | None = None,
          norms_and_biases: bool = False, seed: int = 0) -> torch.nn.Module:
    """Make `model` trainable by `method` and return it (wrapped by PEFT for LoRA).

    full: every adapted weight W is trained.  lora: W = W0 + (alpha/rank) B A, B = 0 and A Kaiming-uniform at the
    start (PEFT's default).  head: the classification head alone.  The head is trained by every method.  With
    norms_and_biases the encoder's LayerNorms and biases are trained too (the parameter set of the paper's v1 code);
    without, only `weight` of linear layers (v3).  Raises InputError for an unknown method, and for a rank below 1 or
    above the smaller side of any adapted matrix.
    """
    names = adapted_names(model)
    if not names:
        raise InputError(f"a {type(model).__name__} has no encoder.layer.N with linear layers named as in BERT; wanted "
                         "a BERT or RoBERTa, e.g. --set model=sentence-transformers/all-MiniLM-L6-v2")
    heads = [name for name in HEADS for full, _ in model.named_modules() if full == name or full.endswith(f".{name}")]
    if method == "lora":
        limit = min(min(model.get_submodule(name).weight.shape) for name in names)
        if rank is None or not 1 <= rank <= limit:
            raise InputError(f"rank is {rank}; wanted 1 to {limit}, the smaller side of the adapted matrices "
                             f"(e.g. --set rank={min(8, limit)})")
        torch.manual_seed(seed)
        with warnings.catch_warnings():  # peft asks transformers for a property under its old name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0,
                                                     modules_to_save=heads, bias="none"))
    elif method not in ("full", "head"):
        raise InputError(f"method is {method!r}; wanted full, lora or head")
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        in_head = any(head in parts for head in HEADS)
        if method == "lora":
            parameter.requires_grad = "lora_" in name or (in_head and "modules_to_save" in parts)
        else:
            owner = ".".join(parts[:-1])
            parameter.requires_grad = in_head or (method == "full" and parts[-1] == "weight" and owner in set(names))
        if norms_and_biases and method != "head" and "encoder" in parts and "lora_" not in name:
            if "LayerNorm" in parts or parts[-1] == "bias":
                parameter.requires_grad = True
    return model


def trainable_counts(model: torch.nn.Module) -> dict[str, int]:
    """How many numbers are trained: {'adapted': in the encoder, 'head': in the classification head}."""
    counts = {"adapted": 0, "head": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts["head" if any(head in name.split(".") for head in HEADS) else "adapted"] += parameter.numel()
    return counts


def encoder_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tuned encoder's weights under the base model's own names, LoRA merged in float32: W0 + (alpha/rank) B A."""
    peft_config = getattr(model, "peft_config", None)
    if peft_config is None:
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    else:
        lora = peft_config["default"]
        scale = lora_scale(lora.lora_alpha, lora.r, lora.use_rslora)
        tensors, state = model.base_model.model.state_dict(), {}
        for name, tensor in tensors.items():
            if "lora_" in name or "modules_to_save" in name or "original_module" in name:
                continue
            stem = name.removesuffix(".base_layer.weight")
            if f"{stem}.lora_A.default.weight" in tensors:
                B, A = tensors[f"{stem}.lora_B.default.weight"], tensors[f"{stem}.lora_A.default.weight"]
                tensor = tensor.float() + lora_update(B, A, scale)
            state[name.replace(".base_layer", "")] = tensor.detach()
    return {name: tensor for name, tensor in state.items() if not any(head in name.split(".") for head in HEADS)}


def reattach_lm_head(masked_lm: PreTrainedModel, model: torch.nn.Module) -> PreTrainedModel:
    """Put the tuned encoder of `model` under the pre-trained LM head of `masked_lm`, in place; returns `masked_lm`.

    Raises InputError if the two are not the same architecture.
    """
    state = encoder_state(model)
    report = masked_lm.load_state_dict(state, strict=False)
    prefix = masked_lm.base_model_prefix
    absent = [name for name in report.missing_keys if name.startswith(f"{prefix}.encoder")]
    if absent or report.unexpected_keys:
        raise InputError(f"the tuned encoder does not fit the masked LM: {(absent + report.unexpected_keys)[:3]}; "
                         "wanted the base that it was tuned from")
    return masked_lm.eval()


def folder_sha256(source: str) -> str | None:
    """SHA-256 of a local model's weights file, or None for a hub id (its revision is recorded instead)."""
    weights = Path(source) / "model.safetensors"
    if not weights.is_file():
        return None
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def model_revision(source: str) -> str | None:
    """The hub commit that `source` was loaded from, or None for a local directory."""
    if Path(source).is_dir():
        return None
    return getattr(_loading(AutoConfig.from_pretrained, source), "_commit_hash", None)
