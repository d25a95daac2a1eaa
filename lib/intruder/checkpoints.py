"""Safetensors checkpoints and PEFT LoRA adapters on disk, read tensor by tensor; nothing is unpickled or downloaded."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from .errors import InputError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Initialisations that leave the base weights as they were. Others (pissa, olora, corda, loftq ...) edit the base.
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
# Fields of adapter_config.json that plain LoRA has; any other field with a value asks for something that is not read.
PLAIN_FIELDS = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules "
    "exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights "
    "layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core loftq_config eva_config corda_config "
    "lora_ga_config qalora_group_size runtime_config ensure_weight_tying trainable_token_indices".split()
)
# Model types whose linear layers are stored transposed, shape (in, out).
TRANSPOSED_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
PLAIN_LORA = (
    "wanted plain LoRA with the base untouched: merge the adapter, save the model and count the full checkpoint"
)


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors: which file holds each tensor, and its shape. Tensors are read on request."""

    folder: Path
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    model_type: str | None = None

    def read(self, tensor: str) -> torch.Tensor:
        """The tensor as float32 on the CPU; InputError if it is not floating point or holds NaN or infinity."""
        with _open(self.files[tensor]) as file:
            value = file.get_tensor(tensor)
        if not value.dtype.is_floating_point or value.element_size() < 2:
            raise InputError(
                f"{tensor} in {self.files[tensor]} has dtype {value.dtype}; wanted float32, float16 or bfloat16, "
                "not a quantised weight"
            )
        value = value.float()
        if not torch.isfinite(value).all():
            raise InputError(f"{tensor} in {self.files[tensor]} holds NaN or infinity; wanted finite weights")
        return value


class Factors(NamedTuple):
    """What one pair of LoRA factors says before it is read: update shape (out, in), rank r, alpha."""

    shape: tuple[int, int]
    rank: int
    alpha: float


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA adapter: adapted module -> factors, other tensors it stores whole, and how its scale is made."""

    folder: Path
    checkpoint: Checkpoint
    factors: dict[str, Factors]
    whole_tensors: list[str]
    rslora: bool
    transposed: bool

    def read(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, A) of one adapted module: shapes (out, r) and (r, in), float32."""
        return self.checkpoint.read(f"{module}.lora_B.weight"), self.checkpoint.read(f"{module}.lora_A.weight")


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """The full checkpoint in `folder`: model.safetensors, or the shards of model.safetensors.index.json."""
    folder = _folder(folder)
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} is a PEFT adapter; wanted a full checkpoint here: call `intruder count BASE {folder}`"
        )
    model_type = _json(folder / "config.json").get("model_type") if (folder / "config.json").is_file() else None
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _checkpoint(folder, [single], model_type)
    if index.is_file():
        weight_map = _json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index} has no weight_map; wanted the index that save_pretrained writes")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise InputError(f"{index} names the shard {name!r}, which is not in {folder}; wanted all shards there")
        checkpoint = _checkpoint(folder, [folder / name for name in names], model_type)
        lost = sorted(set(weight_map) - set(checkpoint.files))
        if lost:
            raise InputError(
                f"{index} names the tensor {lost[0]!r}, which no shard holds; wanted a complete checkpoint"
            )
        return checkpoint
    _refuse_pickle(folder)
    raise InputError(f"no model.safetensors in {folder}; wanted the folder that save_pretrained wrote")


def open_adapter(folder: str | Path) -> Adapter:
    """The PEFT adapter in `folder`: adapter_config.json and adapter_model.safetensors, plain LoRA only."""
    folder = _folder(folder)
    config = _json(folder / "adapter_config.json")
    _refuse_variants(folder, config)
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        _refuse_pickle(folder)
        raise InputError(f"no adapter_model.safetensors in {folder}; wanted the folder that save_pretrained wrote")
    checkpoint = _checkpoint(folder, [path])
    modules, whole = set(), []
    for tensor in checkpoint.files:
        if match := re.fullmatch(r"(.+)\.lora_[AB]\.weight", tensor):
            modules.add(match[1])
        elif "lora_magnitude_vector" in tensor:
            raise InputError(f"{folder} holds {tensor!r}, a DoRA magnitude; {PLAIN_LORA}")
        elif "lora_" in tensor and "lora_embedding_" not in tensor:
            raise InputError(f"{folder} holds {tensor!r}, which plain LoRA does not have; {PLAIN_LORA}")
        else:
            whole.append(tensor)
    factors = {module: _factors(folder, checkpoint, config, module) for module in sorted(modules)}
    return Adapter(
        folder, checkpoint, factors, whole, bool(config.get("use_rslora")), bool(config.get("fan_in_fan_out"))
    )


def _factors(folder: Path, checkpoint: Checkpoint, config: dict[str, Any], module: str) -> Factors:
    shapes = []
    for letter in "BA":
        tensor = f"{module}.lora_{letter}.weight"
        if tensor not in checkpoint.shapes:
            raise InputError(f"{folder} has no {tensor!r}; wanted both factors A and B of {module}")
        shapes.append(checkpoint.shapes[tensor])
    B, A = shapes
    if len(B) != 2 or len(A) != 2:
        raise InputError(
            f"the factors of {module} in {folder} have shapes {B} and {A}; wanted matrices: linear layers only"
        )
    # PEFT matches the patterns on the module's name inside the wrapped model.
    name = module.removeprefix("base_model.model.")
    rank = _by_pattern(config.get("rank_pattern"), name, config.get("r", 8))
    alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e30:
        raise InputError(
            f"adapter_config.json in {folder} gives lora_alpha {alpha!r} for {module}; wanted a finite number"
        )
    if B[1] != A[0] or A[0] != rank or rank < 1:
        raise InputError(
            f"{module} in {folder} has B of shape {B}, A of shape {A} and rank {rank!r} in adapter_config.json; "
            "wanted (out, r), (r, in) and r >= 1: the two files do not belong together"
        )
    return Factors((B[0], A[1]), A[0], float(alpha))


def _by_pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    if not isinstance(patterns or {}, dict):
        raise InputError(f"adapter_config.json gives the pattern {patterns!r}; wanted an object of names and numbers")
    for pattern, value in (patterns or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as error:
            raise InputError(f"adapter_config.json gives the pattern {pattern!r}, which is no regular expression "
                             f"({error}); wanted the file that save_pretrained writes") from error
        if matches:
            return value
    return default


def _refuse_variants(folder: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise InputError(f"{folder} is an adapter of type {config.get('peft_type')!r}; {PLAIN_LORA}")
    if config.get("use_dora"):
        raise InputError(f"{folder} uses DoRA (use_dora); {PLAIN_LORA}")
    initialisation = config.get("init_lora_weights", True)
    if initialisation not in PLAIN_INITIALISATIONS:
        raise InputError(
            f"{folder} was initialised with {initialisation!r} (init_lora_weights), which may edit the base; "
            f"{PLAIN_LORA}"
        )
    unknown = sorted(name for name, value in config.items() if value and name not in PLAIN_FIELDS)
    if unknown:
        raise InputError(f"{folder} sets {unknown[0]}={config[unknown[0]]!r} in adapter_config.json; {PLAIN_LORA}")


def _checkpoint(folder: Path, paths: list[Path], model_type: str | None = None) -> Checkpoint:
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with _open(path) as file:
            for tensor in file.keys():
                if tensor in files:
                    raise InputError(f"{tensor!r} stands in {files[tensor].name} and in {path.name}; wanted it once")
                files[tensor], shapes[tensor] = path, tuple(file.get_slice(tensor).get_shape())
    return Checkpoint(folder, files, shapes, model_type)


def _open(path: Path):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error}); wanted a complete file") from error


def _folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.is_file():
        if any(folder.match(pattern) for pattern in PICKLES):
            raise InputError(_pickle_message(folder))
        raise InputError(f"{folder} is a file; wanted the folder it lies in: {folder.parent}")
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; wanted a local checkpoint as save_pretrained writes it")
    return folder


def _refuse_pickle(folder: Path) -> None:
    for pattern in PICKLES:
        if found := sorted(folder.glob(pattern)):
            raise InputError(_pickle_message(found[0]))


def _pickle_message(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run code when it is opened; wanted safetensors: load the model with "
        "from_pretrained where you trust it and save it with save_pretrained"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as JSON ({error}); wanted the file that save_pretrained writes"
        ) from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object; wanted the file that save_pretrained writes")
    return values
