"""Tiny random models with an adapter of every kind, saved as PEFT saves them; shared by several test files.

`build(name, folder)` makes one case: a base checkpoint, an adapter, and a function that loads the base. `merged(case)`
is what PEFT itself makes of the two in float32: the reference, independent of this package.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import safetensors.torch
import torch
import transformers
from encoder_sizes import ENCODER_SIZES

DECODER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "head_dim": 16,
}
LINEAR = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
SMALL_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 24}
NO_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


class ConvNet(torch.nn.Module):
    """Two numbered convolutions, 3 x 3 and 1 x 1, and a linear head."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Conv2d(3, 24, 3, padding=1), torch.nn.Conv2d(24, 16, 1)])
        self.classifier = torch.nn.Linear(16, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            image = torch.relu(block(image))
        return self.classifier(image.mean((2, 3)))


@dataclass(frozen=True)
class Kind:
    """How to make one kind: the base model, the adapter's configuration, and what to know of it."""

    model: str
    config: dict
    peft: str = "LoraConfig"
    task: str | None = None
    half: bool = False
    note: str = ""


@dataclass(frozen=True)
class Case:
    """A kind on disk: folders of the base and the adapter, and the model in memory as it was trained."""

    name: str
    base: Path
    adapter: Path
    load: Callable[[], torch.nn.Module]
    trained: torch.nn.Module


EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
# The eleven kinds of which PEFT's own mitigation gets nine wrong, by the names of that table.
ELEVEN = {
    "linear": Kind("bert", {}),
    "classifier in modules_to_save": Kind("roberta", {"modules_to_save": ["classifier"]}, task="SEQ_CLS"),
    "PiSSA": Kind("bert", {"init_lora_weights": "pissa"}),
    "OLoRA": Kind("bert", {"init_lora_weights": "olora"}),
    "DoRA": Kind("bert", {"use_dora": True}),
    "lora_bias": Kind("bert", {"lora_bias": True}),
    "embedding": Kind("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "Conv1D": Kind("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "Conv2d": Kind("conv", {"target_modules": ["blocks.0", "blocks.1"]}),
    "bf16 base": Kind("llama", {"target_modules": ["q_proj", "down_proj"]}, half=True),
    "stacked experts": Kind("gpt_oss", EXPERTS),
}
MORE = {
    "rsLoRA": Kind("bert", {"use_rslora": True}),
    "patterns": Kind(
        "bert", {"rank_pattern": {"query": 2, r"layer\.1\.output\.dense": 6}, "alpha_pattern": {"key": 5.0}}
    ),
    "gaussian": Kind("bert", {"init_lora_weights": "gaussian", "bias": "lora_only"}),
    "MiCA": Kind("bert", {"init_lora_weights": "mica"}),
    "PiSSA, rsLoRA": Kind("bert", {"init_lora_weights": "pissa", "use_rslora": True}),
    "PiSSA on Conv1D": Kind(
        "gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "init_lora_weights": "pissa"}
    ),
    "DoRA on Conv1D": Kind("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "DoRA on Conv2d": Kind("conv", {"target_modules": ["blocks.0", "blocks.1"], "use_dora": True}),
    "DoRA on an embedding": Kind("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "experts stored apart": Kind("mixtral", EXPERTS),
    "experts stored apart, gate and up": Kind("qwen3_moe", EXPERTS),
    "one expert parameter": Kind(
        "gpt_oss", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    ),
    "experts of llama4": Kind(
        "llama4",
        {"target_modules": [], "target_parameters": ["feed_forward.experts.gate_up_proj"]},
    ),
    "AdaLoRA": Kind("bert", {"init_r": 6, "target_r": 3, "total_step": 10}, peft="AdaLoraConfig"),
    "AdaLoRA, pruned": Kind("bert", {"init_r": 6, "target_r": 3, "total_step": 10}, peft="AdaLoraConfig"),
    "AdaLoRA on Conv1D": Kind(
        "gpt2",
        {"init_r": 6, "total_step": 10, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        peft="AdaLoraConfig",
    ),
    "VeRA": Kind("bert", {"r": 8}, peft="VeraConfig"),
    "VeRA, projections drawn": Kind("bert", {"r": 8, "save_projection": False}, peft="VeraConfig"),
    "LoRA+": Kind("bert", {}),
}
KINDS = ELEVEN | MORE


def base_model(kind: str, seed: int = 0) -> torch.nn.Module:
    """A random base model of one architecture, in evaluation mode; its spectra have a head, as trained ones do."""
    torch.manual_seed(seed)
    quiet = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        if kind == "conv":
            model = ConvNet()
        elif kind == "bert":
            model = transformers.BertForSequenceClassification(transformers.BertConfig(**ENCODER_SIZES, num_labels=3))
        elif kind == "roberta":
            config = transformers.RobertaConfig(**ENCODER_SIZES, num_labels=3, **NO_TOKENS)
            model = transformers.RobertaForSequenceClassification(config)
        elif kind == "gpt2":
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL_GPT, **NO_TOKENS))
        elif kind == "llama":
            config = transformers.LlamaConfig(**DECODER, tie_word_embeddings=True, **NO_TOKENS)
            model = transformers.LlamaForCausalLM(config)
        elif kind == "llama4":
            sizes = DECODER | {"num_local_experts": 3, "intermediate_size_mlp": 48, "num_experts_per_tok": 1}
            config = transformers.Llama4TextConfig(**sizes, interleave_moe_layer_step=1, **NO_TOKENS)
            model = transformers.Llama4ForCausalLM(config)
        else:
            names = {
                "gpt_oss": ("GptOss", {"num_local_experts": 3, "intermediate_size": 24}),
                "mixtral": ("Mixtral", {"num_local_experts": 3}),
                "qwen3_moe": ("Qwen3Moe", {"num_experts": 3, "moe_intermediate_size": 24, "decoder_sparse_step": 1}),
            }
            name, sizes = names[kind]
            config = getattr(transformers, f"{name}Config")(**(DECODER | sizes), num_experts_per_tok=1, **NO_TOKENS)
            model = getattr(transformers, f"{name}ForCausalLM")(config)
    finally:
        transformers.logging.set_verbosity(quiet)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
                parameter.mul_(torch.linspace(3.0, 0.3, parameter.shape[-1]))
    return model.eval()


def build(name: str, folder: Path, kind: Kind | None = None, strength: float = 1.0) -> Case:
    """Save the base and an adapter with random (or, where it starts from the base, moved) weights of one kind."""
    kind = kind or KINDS[name]
    base, adapter = folder / "base", folder / "adapter"
    model = base_model(kind.model)
    if kind.half:
        model = model.bfloat16()
    save_base(model, base)

    def load() -> torch.nn.Module:
        fresh = base_model(kind.model)
        if not hasattr(fresh, "config"):
            fresh.load_state_dict(safetensors.torch.load_file(base / "model.safetensors"))
            return fresh
        return type(fresh).from_pretrained(base, dtype=torch.bfloat16 if kind.half else torch.float32).eval()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = {"target_modules": LINEAR} | kind.config
        if kind.peft == "LoraConfig":
            config = {"r": 4, "lora_alpha": 12} | config
        if kind.task:
            config["task_type"] = kind.task
        wrapped = peft.get_peft_model(model, getattr(peft, kind.peft)(**config)).eval()
        move(wrapped, strength)
        if name == "LoRA+":
            step_with_loraplus(wrapped)
        if name.endswith("pruned"):
            prune(wrapped)
        wrapped.save_pretrained(adapter)
    return Case(name, base, adapter, load, wrapped)


def save_base(model: torch.nn.Module, folder: Path) -> None:
    """A transformers model as save_pretrained writes it, any other as one safetensors file."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        return
    folder.mkdir(parents=True)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")


def move(model: torch.nn.Module, strength: float, seed: int = 7) -> None:
    """Random factors, magnitudes, biases and heads, as training would leave them; factors taken from the base move."""
    generator = torch.Generator().manual_seed(seed)
    init = getattr(next(iter(model.peft_config.values())), "init_lora_weights", True)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if "magnitude" in path:
                parameter.mul_(1 + 0.3 * noise.tanh())
            elif "lora_" in path or "vera_lambda" in path:
                parameter.copy_(parameter + 0.05 * noise if init in ("pissa", "olora") else 0.3 * strength * noise)
            elif "modules_to_save" in path:
                parameter.add_(noise)


def step_with_loraplus(model: torch.nn.Module) -> None:
    """One training step with LoRA+, which is an optimiser: other learning rates for B than for A."""
    from peft.optimizers import create_loraplus_optimizer

    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=16)
    ids = torch.arange(3, 11)[None]
    model(input_ids=ids, labels=torch.tensor([1])).loss.backward()
    optimizer.step()


def prune(model: torch.nn.Module) -> None:
    """Give an AdaLoRA adapter the rank pattern that its allocator leaves: half of the ranks off in each layer."""
    pattern = {}
    for path, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_E"):
            keep = [i % 2 == 0 for i in range(layer.lora_E["default"].shape[0])]
            with torch.no_grad():
                layer.lora_E["default"].mul_(torch.tensor(keep)[:, None])
            pattern[f"{path}.lora_E"] = keep
    model.peft_config["default"].rank_pattern = pattern


def merged(case: Case) -> dict[str, torch.Tensor]:
    """The state of the model that PEFT loads from the two folders and merges in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(case.load().float(), case.adapter)
        return {name: tensor.detach() for name, tensor in model.merge_and_unload().state_dict().items()}


def base_state(case: Case) -> dict[str, torch.Tensor]:
    """The state of the base as it was before any adapter, float32."""
    return {name: tensor.detach().float() for name, tensor in case.load().state_dict().items()}


def matrix(name: str, state: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """The matrix (out, in) of a counted name in a model's state, found and turned without the package's own code."""
    by_end = {key: tensor for key, tensor in state.items()}
    for key, tensor in by_end.items():
        bare = key.removesuffix(".weight")
        for prefix in ("model.", "transformer.", "bert.", "roberta."):
            bare = bare.removeprefix(prefix)
        if bare == name:
            if kind == "gpt2" or name.endswith("embed_tokens"):
                return tensor.T
            return tensor.flatten(1)
    stem, _, last = name.rpartition(".")
    for key, tensor in by_end.items():
        bare = key.removeprefix("model.")
        if last.isdigit() and bare == stem:  # stacked experts, multiplied from the right
            return tensor[int(last)].T
        if ".experts." in name:  # stored apart: gate_up_proj is the gate above the projection up
            place, number, part = name.replace("block_sparse_moe", "mlp").rsplit(".", 2)
            if bare == f"{place}.gate_up_proj" and part in ("gate_proj", "w1", "up_proj", "w3"):
                half = tensor.shape[1] // 2
                return tensor[int(number)][:half] if part in ("gate_proj", "w1") else tensor[int(number)][half:]
            if bare == f"{place}.down_proj" and part in ("down_proj", "w2"):
                return tensor[int(number)]
    raise KeyError(name)


def config_of(case: Case) -> dict:
    """The adapter's configuration as saved."""
    return json.loads((case.adapter / "adapter_config.json").read_text())
