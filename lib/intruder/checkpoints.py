"""Full checkpoints in safetensors, sharded or not, read tensor by tensor; nothing is unpickled."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import InputError
from .layout import View, counted_views, views

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors: which file holds each tensor, and its shape. Tensors are read on request."""

    folder: Path
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    model_type: str | None = None

    @cached_property
    def counted(self) -> dict[str, View]:
        """Counted matrix name -> where it is stored; InputError for two tensors of one name and quantised weights."""
        return counted_views(self.shapes, self.model_type, str(self.folder))

    def views(self, tensor: str) -> list[View]:
        """The matrices in one tensor."""
        return views(tensor, self.shapes, self.model_type)

    def matrix(self, view: View) -> torch.Tensor:
        """The matrix of a view as float32, contiguous, shape (out, in); of stacked experts only that one is read."""
        return view._replace(expert=None).of(self.read(view.tensor, view.expert))

    def read(self, tensor: str, index: int | None = None) -> torch.Tensor:
        """The tensor, or its part at `index` of the first dimension, as float32 on the CPU.

        Raises InputError if it is not floating point, holds NaN or infinity, or the file has become unreadable.
        """
        path = self.files[tensor]
        try:
            with open_tensors(path) as file:
                value = file.get_tensor(tensor) if index is None else file.get_slice(tensor)[index]
        except (SafetensorError, OSError) as error:
            raise InputError(f"{tensor} in {path} cannot be read ({error}); wanted a complete file") from error
        if not value.dtype.is_floating_point or value.element_size() < 2:
            raise InputError(
                f"{tensor} in {path} has dtype {value.dtype}; wanted float32, float16 or bfloat16, not a quantised "
                "weight: give the full-precision model that was quantised; an adapter trained on the other fits it"
            )
        value = value.float()
        # One pass without a copy; a norm that overflows says nothing yet.
        if not torch.isfinite(torch.linalg.vector_norm(value)) and not torch.isfinite(value).all():
            raise InputError(f"{tensor} in {path} holds NaN or infinity; wanted finite weights")
        return value


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """The full checkpoint in `folder`: model.safetensors, or the shards of model.safetensors.index.json."""
    folder = existing_folder(folder)
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} is a PEFT adapter; wanted a full checkpoint here, and the adapter after it: BASE {folder}"
        )
    model_type = read_json(folder / "config.json").get("model_type") if (folder / "config.json").is_file() else None
    model_type = model_type if isinstance(model_type, str) else None
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return open_files(folder, [single], model_type)
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index} has no weight_map; wanted the index that save_pretrained writes")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise InputError(f"{index} names the shard {name!r}, which is not in {folder}; wanted all shards there")
        checkpoint = open_files(folder, [folder / name for name in names], model_type)
        lost = sorted(set(weight_map) - set(checkpoint.files))
        if lost:
            raise InputError(
                f"{index} names the tensor {lost[0]!r}, which no shard holds; wanted a complete checkpoint"
            )
        return checkpoint
    refuse_pickle(folder)
    raise InputError(f"no model.safetensors in {folder}; wanted the folder that save_pretrained wrote")


def open_files(folder: Path, paths: list[Path], model_type: str | None = None) -> Checkpoint:
    """The tensors of these safetensors files; InputError for a truncated file or a tensor that stands in two."""
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with open_tensors(path) as file:
            for tensor in file.keys():
                if tensor in files:
                    raise InputError(f"{tensor!r} stands in {files[tensor].name} and in {path.name}; wanted it once")
                files[tensor], shapes[tensor] = path, tuple(file.get_slice(tensor).get_shape())
    return Checkpoint(folder, files, shapes, model_type)


def open_tensors(path: Path):
    """An open safetensors file; InputError for one that is truncated or something else."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error}); wanted a complete file") from error


def existing_folder(folder: str | Path) -> Path:
    """The folder as a path; InputError if it is not there, is a file, or is a pickle."""
    folder = Path(folder)
    if folder.is_file():
        if any(folder.match(pattern) for pattern in PICKLES):
            raise InputError(_pickle_message(folder))
        raise InputError(f"{folder} is a file; wanted the folder it lies in: {folder.parent}")
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; wanted a local checkpoint as save_pretrained writes it, or a hub id")
    return folder


def refuse_pickle(folder: Path) -> None:
    """InputError that names the first pickle in the folder, if there is one."""
    for pattern in PICKLES:
        if found := sorted(folder.glob(pattern)):
            raise InputError(_pickle_message(found[0]))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; InputError if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object; wanted the file that save_pretrained writes")
    return values


def _pickle_message(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run code when it is opened; wanted safetensors: load the model with "
        "from_pretrained where you trust it and save it with save_pretrained"
    )
