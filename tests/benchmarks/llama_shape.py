"""A synthetic checkpoint with the shapes of Llama-2-7B and a LoRA adapter for it, written layer by layer.

    python tests/benchmarks/llama_shape.py FOLDER [--layers 4] [--hidden 4096] [--inner 11008] [--rank 16]

writes FOLDER/base (one float16 shard a layer, an index, a config) and FOLDER/adapter. Every matrix has a bulk like
trained weights, Gaussian with standard deviation .02, and a head of directions whose singular values fall as a power
law; the update has `rank` random directions of geometrically falling strength, the first of which lead. Nothing larger
than one layer is in memory. 32 layers take 13 GB.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HEAD = 128


def shapes(hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    """The seven linear modules of one layer: (out, in)."""
    square = {f"self_attn.{letter}_proj": (hidden, hidden) for letter in "qkvo"}
    return square | {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}


def weight(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """A bulk of Gaussian entries and a power-law head that starts at ten times the edge of the bulk."""
    rows, columns = shape
    head = min(HEAD, rows // 4, columns // 4)
    W = 0.02 * torch.randn(shape, generator=generator)
    edge = 0.02 * (rows**0.5 + columns**0.5)
    S = 10 * edge * torch.arange(1, head + 1) ** -0.45
    left = torch.randn(rows, head, generator=generator) / rows**0.5
    right = torch.randn(head, columns, generator=generator) / columns**0.5
    return W.addmm_(left * S, right)


def factors(shape: tuple[int, int], rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, A) of an update whose singular values are about 8 times the edge of the bulk, falling by a quarter each."""
    rows, columns = shape
    S = 8 * 0.02 * (rows**0.5 + columns**0.5) * 0.75 ** torch.arange(rank)
    B = torch.randn(rows, rank, generator=generator) / rows**0.5
    A = torch.randn(rank, columns, generator=generator) / columns**0.5
    return B * S.sqrt(), S.sqrt()[:, None] * A


def write(folder: Path, layers: int = 4, hidden: int = 4096, inner: int = 11008, rank: int = 16, seed: int = 0) -> None:
    """Write `folder`/base and `folder`/adapter."""
    generator = torch.Generator().manual_seed(seed)
    base, adapter, weight_map, adapted = folder / "base", folder / "adapter", {}, {}
    for place in (base, adapter):
        place.mkdir(parents=True)
    for layer in range(layers):
        shard, tensors = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors", {}
        for module, shape in shapes(hidden, inner).items():
            name = f"model.layers.{layer}.{module}"
            tensors[f"{name}.weight"] = weight(shape, generator).half()
            B, A = factors(shape, rank, generator)
            # alpha / r = 2 on reading
            adapted[f"base_model.model.{name}.lora_B.weight"], adapted[f"base_model.model.{name}.lora_A.weight"] = (
                B / 2,
                A,
            )
        save_file(tensors, base / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
    }
    (base / "config.json").write_text(json.dumps(config))
    save_file(adapted, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [m.split(".")[1] for m in shapes(1, 1)],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for option, default in (("layers", 4), ("hidden", 4096), ("inner", 11008), ("rank", 16)):
        parser.add_argument(f"--{option}", type=int, default=default)
    write(**vars(parser.parse_args()))
