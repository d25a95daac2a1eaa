"""Mitigate a PEFT model in memory: its factors are replaced by larger or edited ones, and can be put back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .errors import InputError
from .layout import is_counted, matrix_name
from .mitigate_layer import Layer, Outcome, Settings, mitigate_layer, pattern_key, tidy, total_facts
from .peft_layers import LoraLayer, factors_of, frozen_weight, lora_layers, stored_factors

# Initialisations that leave the frozen weights of the model as they were.
PLAIN = ("True", "False", "None", "gaussian", "eva", "orthogonal", "mica")


@dataclass
class Mitigated:
    """What `mitigate_model` did: `result` as in mitigation.json; `undo()` puts the adapter back as it was, exactly."""

    result: dict
    _undo: list = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put every edited factor, magnitude and setting back; a second call does nothing."""
        while self._undo:
            self._undo.pop()()


def mitigate_model(
    model: torch.nn.Module,
    scale: float,
    adapter: str | None = None,
    which: str = "top",
    control: str | None = None,
    rank: str = "grow",
    k: int = 10,
    epsilon: float = 0.5,
    rounds: int = 1,
    seed: int = 0,
) -> Mitigated:
    """Edit one LoRA adapter of a loaded PeftModel in place, with the meaning and the checks of `mitigate_adapter`.

    `adapter` is its name; None takes the only active one. The model then computes with W + (lambda - 1) sum u sigma v^T
    and `save_pretrained` writes an adapter that loads again, because the ranks of grown layers are entered in the
    configuration (rank_pattern, alpha_pattern). Heads, biases and other adapters are not touched. Edited factors are
    float32 also where they were stored in half precision; the frozen weights are read, never changed.

    Returns `Mitigated`, whose `undo()` restores the adapter. lambda = 1 and a model without intruders change nothing.
    Raises InputError, with the model unchanged, for settings out of range, an unknown adapter, kinds whose frozen
    weight is not W0 (PiSSA, OLoRA, CorDA ...: mitigate the saved adapter instead), other types than LoRA, stacked
    experts, quantised weights, and DoRA on embeddings.
    """
    settings = Settings(scale, which, control, rank, k, epsilon, rounds, seed)
    adapter = _adapter_name(model, adapter)
    if settings.scale == 1:
        return Mitigated(total_facts(settings, [], []))
    config = model.peft_config[adapter]
    _check_config(config, adapter)
    layers = list(lora_layers(model, adapter))
    if not layers:
        raise InputError(f"the adapter {adapter!r} adapts no counted matrix; wanted LoRA on linear layers")
    outcomes = []
    for layer in layers:
        outcomes.append(mitigate_layer(read_layer(layer, adapter), settings))
    result = total_facts(settings, [outcome.facts for outcome in outcomes], sorted(_whole(model, adapter)))
    undo = []
    for layer, outcome in zip(layers, outcomes):
        if outcome.edited:
            undo.append(_install(layer, adapter, outcome, config))
    return Mitigated(result, undo)


def _adapter_name(model: torch.nn.Module, adapter: str | None) -> str:
    names = list(getattr(model, "peft_config", {}))
    if not names:
        raise InputError(
            f"this {type(model).__name__} has no adapter; wanted a PeftModel: call PeftModel.from_pretrained"
        )
    if adapter is None:
        active = list(model.active_adapters)
        if len(active) != 1:
            raise InputError(f"{len(active)} adapters are active; wanted one: name it with adapter=..., one of {names}")
        return active[0]
    if adapter not in names:
        raise InputError(f"adapter={adapter!r} was given; wanted one of {names}")
    return adapter


def _check_config(config, adapter: str) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise InputError(f"the adapter {adapter!r} is of type {kind}; wanted LORA: save it and call mitigate_adapter")
    initialisation = str(getattr(config, "init_lora_weights", True))
    if initialisation not in PLAIN:
        raise InputError(
            f"the adapter {adapter!r} was initialised with {initialisation!r}, so the frozen weights are not "
            "the pre-trained ones; wanted plain LoRA: save the adapter and call mitigate_adapter with the base"
        )


def read_layer(layer: LoraLayer, adapter: str) -> Layer:
    """W0, the factors and DoRA's magnitude of one loaded layer; InputError for a kind that is none of these, named."""
    module = layer.module
    variant = type(getattr(module, "lora_variant", {}).get(adapter)).__name__
    if not variant.startswith(("NoneType", "Dora", "MiCA")):
        raise InputError(f"{layer.name} uses {variant}; wanted LoRA, rsLoRA or DoRA")
    magnitude = None
    if variant.startswith("Dora"):
        magnitude = module.lora_magnitude_vector[adapter].weight.detach().float().reshape(-1)
    if magnitude is not None and adapter in module.lora_embedding_A:
        # DoRA scales an embedding token by token, which is not a scaling of the rows of (width, tokens).
        raise InputError(
            f"{layer.name} is DoRA on an embedding, which has no exact edit of this kind; wanted DoRA on linear layers"
        )
    return Layer(layer.name, frozen_weight(layer, adapter), factors_of(module, adapter), magnitude)


def _install(layer: LoraLayer, adapter: str, outcome: Outcome, config):
    """Put the edited factors into the module and the configuration; returns the call that takes them out again."""
    module, (B, A, scale) = layer.module, outcome.update
    old_B, old_A = stored_factors(module, adapter)
    r, old_r = B.shape[1], module.r[adapter]
    dtype = torch.promote_types(old_B.dtype, torch.float32)
    magnitude = None
    if outcome.magnitude is not None:
        magnitude = module.lora_magnitude_vector[adapter]
        old_magnitude = magnitude.weight
    kept = {name: (getattr(config, name) or {}).copy() for name in ("rank_pattern", "alpha_pattern")}
    old_alpha = module.lora_alpha[adapter]

    def put(B_new, A_new, rank, alpha, magnitude_new):
        if adapter in getattr(module, "lora_embedding_A", ()):
            module.lora_embedding_B[adapter], module.lora_embedding_A[adapter] = B_new, A_new
        else:
            low, high = module.lora_A[adapter], module.lora_B[adapter]
            low.weight, high.weight = A_new, B_new
            for part, field_name in (
                (low, "out_features"),
                (low, "out_channels"),
                (high, "in_features"),
                (high, "in_channels"),
            ):
                if hasattr(part, field_name):
                    setattr(part, field_name, rank)
        module.r[adapter], module.lora_alpha[adapter] = rank, alpha
        if magnitude is not None:
            magnitude.weight = magnitude_new

    def parameter(values, like, shape):
        values = values.to(dtype).reshape(shape).contiguous()
        return torch.nn.Parameter(values, requires_grad=like.requires_grad)

    new_B = parameter(B, old_B, (old_B.shape[0], r, *old_B.shape[2:]))
    new_A = parameter(A, old_A, (r, *old_A.shape[1:]))
    new_magnitude = None if magnitude is None else parameter(outcome.magnitude, old_magnitude, old_magnitude.shape)
    alpha = old_alpha
    if r != old_r:
        alpha = tidy(scale * (r**0.5 if config.use_rslora else r))
        key = pattern_key(layer.path)
        config.rank_pattern = {key: r} | kept["rank_pattern"]
        config.alpha_pattern = {key: alpha} | kept["alpha_pattern"]
    put(new_B, new_A, r, alpha, new_magnitude)

    def back() -> None:
        put(old_B, old_A, old_r, old_alpha, None if magnitude is None else old_magnitude)
        for name, values in kept.items():
            setattr(config, name, values)

    return back


def _whole(model: torch.nn.Module, adapter: str):
    """Names of counted matrices that the adapter keeps as whole copies (modules_to_save), which are not edited."""
    for path, module in model.named_modules():
        if adapter in (getattr(module, "modules_to_save", None) or ()) and is_counted(matrix_name(path)):
            yield matrix_name(path)
