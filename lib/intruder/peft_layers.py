"""The LoRA layers of a loaded PEFT model: found by what they hold, without importing peft."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .errors import InputError
from .layout import is_counted, matrix_name, natural
from .spectrum import LowRank


class LoraLayer(NamedTuple):
    """One adapted layer: the matrix's name, the path of the module inside the wrapped model, the module itself."""

    name: str
    path: str
    module: torch.nn.Module


def lora_layers(model: torch.nn.Module, adapter: str) -> Iterator[LoraLayer]:
    """The counted layers (and embeddings) that `adapter` gives low-rank factors, in natural order of their names."""
    found = []
    for path, module in model.named_modules():
        embedding = adapter in getattr(module, "lora_embedding_A", ())
        if embedding or adapter in getattr(module, "lora_A", ()):
            name = matrix_name(path)
            if embedding or is_counted(name):
                found.append(LoraLayer(name, path.removeprefix("base_model.model."), module))
    return iter(sorted(found, key=lambda layer: natural(layer.name)))


def factors_of(module: torch.nn.Module, adapter: str) -> LowRank:
    """B (out, r), A (r, in) and the scale s of one layer, float32 (not copied if they are), convolutions flattened."""
    B, A = (tensor.detach().float() for tensor in stored_factors(module, adapter))
    return LowRank(B.reshape(B.shape[0], -1), A.reshape(A.shape[0], -1), float(module.scaling[adapter]))


def stored_factors(module: torch.nn.Module, adapter: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """The parameters B and A as PEFT keeps them."""
    if adapter in getattr(module, "lora_embedding_A", ()):
        return module.lora_embedding_B[adapter], module.lora_embedding_A[adapter]
    return module.lora_B[adapter].weight, module.lora_A[adapter].weight


def frozen_weight(layer: LoraLayer, adapter: str) -> torch.Tensor:
    """The frozen weight of the layer as a float32 matrix (out, in).

    Raises InputError for a quantised weight, stacked experts and a merged adapter, naming the matrix.
    """
    module = layer.module
    if hasattr(module, "parameter_name"):
        raise InputError(
            f"{layer.name} has LoRA on the parameter {module.parameter_name!r} (stacked experts); wanted "
            "linear layers, convolutions or embeddings"
        )
    if module.merged:
        raise InputError(f"the adapter is merged into {layer.name}; wanted it unmerged: call model.unmerge_adapter()")
    weight = module.get_base_layer().weight
    if not weight.dtype.is_floating_point or weight.element_size() < 2 or weight.ndim < 2:
        raise InputError(
            f"{layer.name} has a frozen weight of dtype {weight.dtype}, a quantised one; wanted float32, "
            "float16 or bfloat16: load the base without quantisation"
        )
    weight = weight.detach().float()
    turned = getattr(module, "fan_in_fan_out", False) or adapter in getattr(module, "lora_embedding_A", ())
    return weight.T.contiguous() if turned else weight.reshape(weight.shape[0], -1)
