"""PEFT adapters on disk: LoRA and its kinds, AdaLoRA and VeRA, their factors read one module at a time."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .adapter_config import check_config, settings_of
from .changes import lora_scale
from .checkpoints import Checkpoint, existing_folder, open_files, read_json, refuse_pickle
from .errors import InputError
from .spectrum import LowRank

FACTORS = {
    "LORA": r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<letter>[AB])(?P<weight>\.weight)?",
    "ADALORA": r"(?P<module>.+)\.lora_(?P<letter>[ABE])",
    "VERA": r"(?P<module>.+)\.vera_lambda_(?P<letter>[bd])",
}
PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")
MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class Target:
    """What one adapted module says before it is read: tensors in the file, rank r, alpha, and the factor s.

    `kind` is "linear", "embedding" or "conv"; the shape of the update is (rows, columns) = (out, in) in PEFT's terms,
    None for columns that only the base knows (VeRA). With stacked experts the rows of A are experts * r.
    """

    module: str
    kind: str
    tensors: dict[str, str]
    rows: int
    columns: int | None
    rank: int
    alpha: float
    scale: float

    @property
    def shape(self) -> tuple[int, int | None]:
        """The shape (out, in) of the update."""
        return self.rows, self.columns


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter: adapted module -> what is known of it, other tensors it stores whole, and its configuration."""

    folder: Path
    checkpoint: Checkpoint
    config: dict[str, Any]
    targets: dict[str, Target]
    whole_tensors: list[str]
    _projections: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)

    @property
    def kind(self) -> str:
        """The kind of adapter in one word: lora, rslora, dora, pissa, olora, adalora or vera."""
        if self.config["peft_type"] != "LORA":
            return self.config["peft_type"].lower()
        if self.config.get("use_dora"):
            return "dora"
        init = self.config.get("init_lora_weights")
        return init if init in ("pissa", "olora") else "rslora" if self.config.get("use_rslora") else "lora"

    @property
    def transposed(self) -> bool:
        """Whether the configuration says that the adapted weights are stored (in, out) (fan_in_fan_out)."""
        return bool(self.config.get("fan_in_fan_out"))

    def read(self, module: str, columns: int | None = None, widest: int | None = None) -> LowRank:
        """The factors of one module as matrices, float32: B (out, r), A (r, in), and the scale s.

        LoRA: as stored, convolutions flattened. AdaLoRA: B and diag(E) A. VeRA: diag(b) B and diag(d) A, cut from the
        shared projections to this module's `columns` inputs; `widest` is the widest input among the adapted modules,
        which sizes projections that were not saved.
        """
        target = self.targets[module]
        parts = {letter: self.checkpoint.read(tensor) for letter, tensor in target.tensors.items()}
        if "d" in parts:
            B, A = self._shared(target, columns, widest or columns)
            return LowRank(parts["b"][:, None] * B, parts["d"][:, None] * A, target.scale)
        B, A = parts["B"].reshape(target.rows, -1), parts["A"].reshape(-1, target.columns)
        if A.shape[0] == 0:  # AdaLoRA pruned every rank of this module: no update
            return LowRank(torch.zeros(target.rows, 1), torch.zeros(1, target.columns), target.scale)
        return LowRank(B, parts["E"].reshape(-1, 1) * A if "E" in parts else A, target.scale)

    def magnitude(self, module: str) -> torch.Tensor:
        """DoRA's magnitude of one module, shape (out,)."""
        return self.checkpoint.read(f"{module}.{MAGNITUDE}").reshape(-1)

    def _shared(self, target: Target, columns: int, widest: int) -> tuple[torch.Tensor, torch.Tensor]:
        if PROJECTIONS[0] in self.checkpoint.shapes:
            A, B = (self.checkpoint.read(tensor) for tensor in PROJECTIONS)
        else:
            A, B = self._drawn(target.rank, widest)
        if A.shape[1] < columns or B.shape[0] < target.rows:
            raise InputError(
                f"the projections of {self.folder} have shapes {tuple(B.shape)} and {tuple(A.shape)} and "
                f"{target.module} needs {(target.rows, columns)}; wanted the base that the adapter was trained on"
            )
        return B[: target.rows], A[:, :columns]

    def _drawn(self, rank: int, widest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The projections drawn anew from the key, as PEFT does where they are not saved."""
        rows = max(target.rows for target in self.targets.values())
        size = (rows, widest)
        if size not in self._projections:
            generator = torch.Generator(device="cpu").manual_seed(int(self.config.get("projection_prng_key", 0)))
            drawn = []
            for shape in ((rank, size[1]), (size[0], rank)):
                bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
                drawn.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
            self._projections[size] = (drawn[0], drawn[1])
        return self._projections[size]


def open_adapter(folder: str | Path) -> Adapter:
    """The PEFT adapter in `folder`: adapter_config.json and adapter_model.safetensors.

    Raises InputError for a type, a variant or an initialisation that is not read, naming it; for tensors that the
    configuration does not explain; for factors that do not fit each other or the configuration; and for what
    `checkpoints` refuses.
    """
    folder = existing_folder(folder)
    config = read_json(folder / "adapter_config.json")
    check_config(folder, config)
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        refuse_pickle(folder)
        raise InputError(f"no adapter_model.safetensors in {folder}; wanted the folder that save_pretrained wrote")
    checkpoint = open_files(folder, [path])
    modules: dict[str, dict[str, str]] = {}
    whole = []
    for tensor in checkpoint.shapes:
        match = re.fullmatch(FACTORS[config["peft_type"]], tensor)
        if match and _is_factor(config, match):
            modules.setdefault(match["module"], {})[match["letter"]] = tensor
        elif tensor.endswith(f".{MAGNITUDE}"):
            _expect(folder, tensor, config.get("use_dora"), "use_dora")
        elif tensor.endswith(".lora_B.bias"):
            _expect(folder, tensor, config.get("lora_bias"), "lora_bias")
        elif tensor in PROJECTIONS:
            continue
        elif re.search(r"\.(lora_|vera_)", tensor):
            raise InputError(
                f"{folder} holds {tensor!r}, which an adapter of type {config['peft_type']} does not have; wanted the "
                "files that save_pretrained wrote"
            )
        else:
            whole.append(tensor)
    targets = {module: _target(folder, checkpoint, config, module, modules[module]) for module in sorted(modules)}
    return Adapter(folder, checkpoint, config, targets, whole)


def _is_factor(config: dict[str, Any], match: re.Match) -> bool:
    """LoRA's A and B end in `.weight` except for embeddings; AdaLoRA's and VeRA's never do."""
    return config["peft_type"] != "LORA" or bool(match["weight"]) != bool(match["embedding"])


def _expect(folder: Path, tensor: str, setting: Any, name: str) -> None:
    if not setting:
        raise InputError(
            f"{folder} holds {tensor!r} and adapter_config.json does not set {name}; wanted two files that belong "
            "together"
        )


def _target(folder: Path, checkpoint: Checkpoint, config: dict[str, Any], module: str, tensors: dict) -> Target:
    for letter in {"LORA": "AB", "ADALORA": "ABE", "VERA": "bd"}[config["peft_type"]]:
        if letter not in tensors:
            stem = "vera_lambda" if config["peft_type"] == "VERA" else "lora"
            raise InputError(
                f"{folder} has no '{module}.{stem}_{letter}.weight' or the like; wanted all factors of {module}"
            )
    shapes = {letter: checkpoint.shapes[tensor] for letter, tensor in tensors.items()}
    rank, alpha = settings_of(folder, config, module)
    if config["peft_type"] == "VERA":
        if shapes["d"] != (rank,) or len(shapes["b"]) != 1:
            raise InputError(f"{module} in {folder} has d of shape {shapes['d']} and r = {rank}; wanted ({rank},)")
        return Target(module, "linear", tensors, shapes["b"][0], None, rank, 1.0, 1.0)
    B, A = shapes["B"], shapes["A"]
    kind = "embedding" if "lora_embedding_" in tensors["A"] else "conv" if len(A) > 2 else "linear"
    fits = len(A) >= 2 and len(A) == len(B) and B[1] == A[0] and all(side == 1 for side in B[2:])
    if config["peft_type"] == "ADALORA":
        # PEFT divides by the initial rank also after pruning, and adds 1e-5 to it.
        actual = A[0] if len(A) == 2 else 0
        scale = (alpha if alpha > 0 else actual) / (rank + 1e-5)
        fits = fits and shapes["E"] == (actual, 1)
    else:
        # Stacked experts store experts * r rows.
        experts = bool(config.get("target_parameters"))
        actual = A[0] if fits and (A[0] == rank or (experts and rank >= 1 and A[0] % rank == 0)) else -1
        fits = fits and actual >= 1
        scale = lora_scale(alpha, rank, bool(config.get("use_rslora"))) if rank >= 1 else 0.0
    if not fits:
        raise InputError(
            f"{module} in {folder} has B of shape {B}, A of shape {A} and rank {rank!r} in adapter_config.json; "
            "wanted (out, r), (r, in) and r >= 1: the two files do not belong together"
        )
    if config.get("use_dora") and f"{module}.{MAGNITUDE}" not in checkpoint.shapes:
        raise InputError(f"{folder} uses DoRA and has no '{module}.{MAGNITUDE}'; wanted the magnitude of {module}")
    columns = math.prod(A[1:])
    return Target(module, kind, tensors, B[0], columns, rank, alpha, scale)
