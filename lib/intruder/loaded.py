"""Pairs of weights of a model in memory, plain or wrapped by PEFT, beside the state dict of its base."""

from collections.abc import Iterator, Mapping

import torch

from .changes import Change, MatrixPair, dora_change, lora_update
from .errors import InputError
from .layout import View, counted_views, is_counted, matrix_name, natural
from .spectrum import LowRank

# Initialisations that moved a part of the base into the adapter: the frozen weight is W0 - s B0 A0.
MOVED = ("pissa", "olora", "corda", "lora_ga")
SAVE = "save the adapter with save_pretrained and give its folder"


def model_pairs(base_state: Mapping[str, torch.Tensor], model: torch.nn.Module) -> Iterator[MatrixPair]:
    """Every counted matrix of a model in memory beside its pre-trained value from `base_state` (a state dict).

    A PEFT model gives the matrices of its active adapters, merged in float32: LoRA and rsLoRA from A and B, also of
    embeddings and convolutions, DoRA with its magnitude, AdaLoRA, VeRA, and PiSSA, OLoRA, CorDA and LoRA-GA on the
    frozen residual of the model against the true W0 of `base_state`. Any other model gives all counted matrices; tied
    weights once. Tensors stay on the device of the model.

    Raises InputError for stacked experts and other variants of LoRA (named), a merged adapter, a frozen weight that
    differs from `base_state` for no such reason, a matrix that `base_state` does not have or has in another shape, and
    if nothing is counted.
    """
    configs = getattr(model, "peft_config", {})
    layers = {}
    for path, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "get_base_layer"):
            name = matrix_name(path)
            if getattr(module, "lora_embedding_A", None) or is_counted(name):
                layers[name] = module
    if layers:
        stored = {matrix_name(key): key for key in base_state}
        wanted = {name: stored.get(name) for name in layers}
    else:
        state, kind = _untied(model.state_dict()), getattr(getattr(model, "config", None), "model_type", None)
        found = counted_views({key: tuple(value.shape) for key, value in state.items()}, kind, "the model")
        names = counted_views({key: tuple(value.shape) for key, value in base_state.items()}, kind, "base_state")
        wanted = {name: names[name].tensor if name in names else None for name in found}
    if not wanted:
        raise InputError(f"no matrix to count in this {type(model).__name__}; wanted an encoder with linear layers")
    for name, tensor in wanted.items():
        if tensor is None:
            raise InputError(f"base_state has no tensor for {name}; wanted the state dict of the pre-trained model")
    return (
        _adapted(name, base_state[wanted[name]], layers[name], configs)
        if layers
        else _plain(found[name], base_state[wanted[name]], state[found[name].tensor])
        for name in sorted(wanted, key=natural)
    )


def _untied(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict without second names of one tensor."""
    seen: set[tuple] = set()
    kept = {}
    for name, value in state.items():
        place = (value.device, value.data_ptr(), tuple(value.shape), value.stride())
        if value.numel() and place in seen:
            continue
        seen.add(place)
        kept[name] = value
    return kept


def _plain(view: View, pretrained: torch.Tensor, tuned: torch.Tensor) -> MatrixPair:
    _same_shape(view.name, pretrained, tuned)
    pretrained, tuned = (view.of(tensor.detach().to(tuned.device)).float() for tensor in (pretrained, tuned))
    return MatrixPair(view.name, pretrained, tuned)


def _adapted(name: str, pretrained: torch.Tensor, layer: torch.nn.Module, configs: Mapping) -> MatrixPair:
    """The pair of one PEFT layer: its active adapters, merged in float32."""
    if layer.merged:
        raise InputError(f"the adapter is merged into {name}; wanted it unmerged: call model.unmerge_adapter()")
    if hasattr(layer, "parameter_name"):
        raise InputError(f"{name} has LoRA on the parameter {layer.parameter_name!r}; wanted linear layers: {SAVE}")
    active = [adapter for adapter in layer.active_adapters if _has(layer, adapter)]
    if not active:
        raise InputError(f"no active adapter on {name}; wanted one: call model.set_adapter('default')")
    variants = {type(v).__name__ for a, v in getattr(layer, "lora_variant", {}).items() if a in active}
    dora = any(variant.startswith("Dora") for variant in variants)
    odd = sorted(v for v in variants if not v.startswith(("Dora", "MiCA")))
    if odd or (dora and len(active) > 1):
        raise InputError(f"{name} uses {(odd or ['DoRA beside another adapter'])[0]}; wanted LoRA or one DoRA adapter")
    frozen = layer.get_base_layer().weight.detach()
    _same_shape(name, pretrained, frozen)
    moved = not torch.equal(pretrained.detach().to(frozen), frozen)
    initialisations = [str(getattr(configs.get(adapter), "init_lora_weights", "")) for adapter in active]
    if moved and not any(initialisation.startswith(MOVED) for initialisation in initialisations):
        raise InputError(
            f"the frozen weight {name} of the model differs from base_state; wanted the state dict of the same base, "
            "or an adapter whose initialisation moves a part of the base (PiSSA, OLoRA, CorDA, LoRA-GA)"
        )
    turned = getattr(layer, "fan_in_fan_out", False) or bool(getattr(layer, "lora_embedding_A", None))
    pretrained, frozen = (_matrix(tensor.detach().to(frozen.device).float(), turned) for tensor in (pretrained, frozen))
    if dora:
        magnitude = layer.lora_magnitude_vector[active[0]].weight.detach()
        return dora_change(name, pretrained, _factors(layer, active[0]), magnitude).pair()
    update = sum(_update(layer, adapter, turned) for adapter in active)
    if moved:
        return Change(name, pretrained, tuned=frozen + update).pair()
    return MatrixPair(name, pretrained, pretrained + update, update)


def _has(layer: torch.nn.Module, adapter: str) -> bool:
    return any(adapter in getattr(layer, part, ()) for part in ("lora_A", "lora_embedding_A", "vera_lambda_d"))


def _factors(layer: torch.nn.Module, adapter: str) -> LowRank:
    if adapter in layer.lora_embedding_A:
        B, A = layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
    else:
        B, A = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
    B, A = B.detach().float(), A.detach().float()
    return LowRank(B.reshape(B.shape[0], -1), A.reshape(A.shape[0], -1), layer.scaling[adapter])


def _update(layer: torch.nn.Module, adapter: str, turned: bool) -> torch.Tensor:
    if hasattr(layer, "lora_E") or hasattr(layer, "vera_lambda_d"):
        return _matrix(layer.get_delta_weight(adapter).detach().float(), turned)
    return lora_update(*_factors(layer, adapter))


def _matrix(tensor: torch.Tensor, turned: bool) -> torch.Tensor:
    """The stored weight as (out, in): transposed if `turned`, convolutions flattened."""
    return tensor.T.contiguous() if turned else tensor.reshape(tensor.shape[0], -1)


def _same_shape(name: str, pretrained: torch.Tensor, tuned: torch.Tensor) -> None:
    if pretrained.shape != tuned.shape:
        raise InputError(
            f"{name} has shape {tuple(pretrained.shape)} in base_state and {tuple(tuned.shape)} in the model; "
            "wanted the state dict of the pre-trained model"
        )
