"""Pairs (pre-trained, tuned) of the weight matrices that are counted, from checkpoints and adapters, one at a time.

Which matrices are counted, under which names and in which orientation: see `layout`. What an adapter does to a weight:
see `changes`. A tuned side is a full checkpoint or a PEFT adapter: LoRA (alpha / r, rsLoRA, patterns of ranks and
alphas, transposed weights, embeddings, convolutions, stacked experts), DoRA, PiSSA and OLoRA against the true W0,
AdaLoRA, VeRA. `lora_bias` and biases do not change a matrix and are passed over. A counted matrix in `modules_to_save`
is read whole. What cannot be read is refused by name.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .adapters import Adapter, open_adapter
from .changes import (
    Change,
    MatrixPair,
    PairSource,
    dora_change,
    lora_scale,
    lora_update,
    olora_change,
    pissa_change,
)
from .checkpoints import Checkpoint, open_checkpoint
from .errors import InputError
from .experts import expert_updates, stacks
from .hub import local_folder
from .layout import View, is_counted, matrix_name, natural
from .loaded import model_pairs

__all__ = [
    "Change",
    "MatrixPair",
    "PairSource",
    "checkpoint_pairs",
    "is_counted",
    "lora_scale",
    "lora_update",
    "matrix_name",
    "model_pairs",
    "not_counted",
    "pair_sources",
]

# Where an embedding is stored when the model ties it to another name.
TIED = ("shared", "embed_tokens", "encoder.embed_tokens", "decoder.embed_tokens", "wte", "lm_head")


def checkpoint_pairs(base_dir: str | Path, tuned_dir: str | Path) -> Iterator[MatrixPair]:
    """Every counted matrix of a base and a tuned checkpoint, read one at a time, in the order of their names.

    Each side is a local folder, a hub id, or a hub id at a revision (`owner/name@revision`). The base holds
    model.safetensors or its sharded index; the tuned side the same, or a PEFT adapter (adapter_config.json and
    adapter_model.safetensors). Everything is float32, also when stored in half precision; an adapter is added in
    float32 from its factors. No model is built, and at most one matrix and its factors are in memory.

    Raises InputError, before the first pair where names and shapes decide: a missing folder or file, a truncated file,
    a pickle instead of safetensors, an adapter that is not read (named, with the way out), an adapter that does not fit
    the base, a quantised base, a counted matrix present on one side only, shapes that differ, nothing to count; and
    while reading: NaN or infinity, naming tensor and file.
    """
    return (source.load() for source in pair_sources(base_dir, tuned_dir))


def pair_sources(base_dir: str | Path | Checkpoint, tuned_dir: str | Path) -> list[PairSource]:
    """The pairs of `checkpoint_pairs` with names and shapes known and matched, but no matrix read yet.

    `source.load_change()` reads the pre-trained matrix and the factors of a low-rank update, or the tuned matrix;
    `source.load()` reads both matrices. A base that serves several times may be given open.
    """
    base = base_dir if isinstance(base_dir, Checkpoint) else open_checkpoint(local_folder(base_dir))
    tuned = local_folder(tuned_dir)
    if (tuned / "adapter_config.json").is_file():
        sources = _adapter_sources(base, open_adapter(tuned))
    else:
        sources = _full_sources(base, open_checkpoint(tuned))
    if not sources:
        raise InputError(
            f"no matrix to count in {tuned_dir} against {base.folder}; wanted attention and feed-forward weights with "
            "the same names on both sides: check that the base is the model that was fine-tuned"
        )
    return sorted(sources, key=lambda source: natural(source.name))


def not_counted(base_dir: str | Path, tuned_dir: str | Path) -> list[str]:
    """Names of what an adapter adapts or stores whole and the rule leaves out (heads, biases); checkpoints: none."""
    base, tuned = open_checkpoint(local_folder(base_dir)), local_folder(tuned_dir)
    if not (tuned / "adapter_config.json").is_file():
        return []
    adapter = open_adapter(tuned)
    counted = {source.name for source in _adapter_sources(base, adapter)}
    names = {matrix_name(module) for module in adapter.targets} - set(stacks(base, adapter))
    return sorted((names | {matrix_name(tensor) for tensor in adapter.whole_tensors}) - counted, key=natural)


def _full_sources(base: Checkpoint, tuned: Checkpoint) -> list[PairSource]:
    mine, theirs = base.counted, tuned.counted
    for own, other, folder in ((mine, theirs, tuned.folder), (theirs, mine, base.folder)):
        # A matrix under a root that the other side does not have at all (a head of an unknown kind) has no partner.
        roots = {name.partition(".")[0] for name in other}
        lost = sorted((n for n in own if n not in other and n.partition(".")[0] in roots), key=natural)
        if lost:
            raise InputError(
                f"{folder} has no tensor for the matrix {lost[0]} ({len(lost)} missing); wanted two checkpoints "
                "of the same architecture"
            )
    return [_full_source(base, mine[name], tuned, theirs[name], "full") for name in mine.keys() & theirs.keys()]


def _full_source(base: Checkpoint, view: View, tuned: Checkpoint, other: View, kind: str) -> PairSource:
    if view.shape != other.shape:
        raise InputError(
            f"{view.name} has shape {view.shape} in {base.folder} and {other.shape} in {tuned.folder}; wanted the same "
            "shape: check that the base is the model that was fine-tuned"
        )

    def change(pretrained: torch.Tensor) -> Change:
        return Change(view.name, pretrained, tuned=tuned.matrix(other))

    return _source(base, view, change, kind)


def _source(base: Checkpoint, view: View, change: Callable, kind: str, rank: int | None = None) -> PairSource:
    return PairSource(view.name, view.shape, lambda: base.matrix(view), change, (base.folder, view), kind, rank)


def _adapter_sources(base: Checkpoint, adapter: Adapter) -> list[PairSource]:
    base.counted  # noqa: B018 - refuses a quantised base and two tensors of one name before anything else
    everything = {matrix_name(tensor): tensor for tensor in base.shapes if tensor.endswith(".weight")}
    sources, places, stacked = [], {}, stacks(base, adapter)
    for module, target in adapter.targets.items():
        name = matrix_name(module)
        if name not in stacked and (target.kind == "embedding" or is_counted(name)):
            view = _view(base, adapter, module, everything)
            if view.tensor in places:
                raise InputError(
                    f"the adapter {adapter.folder} holds both {places[view.tensor]!r} and {module!r} for one tensor of "
                    f"the base, {view.tensor!r}; wanted one of them"
                )
            places[view.tensor] = module
            sources.append((module, view))
    widest = max((view.shape[1] for _, view in sources), default=0)
    found = [_adapter_source(base, adapter, module, view, widest) for module, view in sources]
    for modules in stacked.values():
        for update in expert_updates(base, adapter, modules):
            found.append(_expert_source(base, adapter, update))
    return found + _whole_sources(base, adapter, {source.name for source in found})


def _view(base: Checkpoint, adapter: Adapter, module: str, everything: dict[str, str]) -> View:
    """Where the base stores the weight of an adapted module; InputError if it does not, or the shapes do not fit."""
    target, name = adapter.targets[module], matrix_name(module)
    tensor = everything.get(name)
    if tensor is None and target.kind == "embedding":
        tied = [everything[other] for other in TIED if other in everything]
        tensor = next((t for t in tied if base.shapes[t] == target.shape[::-1]), None)
    if tensor is None:
        raise InputError(
            f"the base {base.folder} has no tensor for {name}, which the adapter {adapter.folder} adapts; "
            "wanted the base that the adapter was trained on"
        )
    stored = base.shapes[tensor]
    if target.kind == "embedding":
        view = View(name, tensor, stored[::-1], True)
    else:
        view = next(iter(base.views(tensor)), View(name, tensor, stored))._replace(name=name)
        if adapter.transposed and base.model_type is None and len(stored) == 2 and not view.transposed:
            view = view._replace(shape=stored[::-1], transposed=True)
    wanted = (target.rows, view.shape[1] if target.columns is None else target.columns)
    if view.shape != wanted:
        raise InputError(
            f"{name} has shape {view.shape} in {base.folder} and the adapter's update has {wanted}; wanted "
            "the base that the adapter was trained on" + (" (grouped convolutions are not read)" * (len(stored) > 2))
        )
    return view


def _adapter_source(base: Checkpoint, adapter: Adapter, module: str, view: View, widest: int) -> PairSource:
    kind, target = adapter.kind, adapter.targets[module]
    # PEFT moves parts of the base into linear layers only; embeddings beside them start as plain LoRA.
    if target.kind == "embedding" and kind in ("pissa", "olora"):
        kind = "lora"
    elif kind in ("pissa", "olora") and (target.kind == "conv" or (kind == "olora" and view.transposed)):
        raise InputError(
            f"{view.name} is adapted with {kind} and is {'a convolution' if target.kind == 'conv' else 'transposed'}; "
            "wanted a linear weight of shape (out, in): merge the adapter, save the model and count the full checkpoint"
        )
    stored = adapter.checkpoint.shapes[target.tensors["A"]][0] if "A" in target.tensors else target.rank
    rank = {"dora": None, "pissa": 2 * stored, "olora": 2 * stored}.get(kind, stored)

    def change(pretrained: torch.Tensor) -> Change:
        factors = adapter.read(module, view.shape[1], widest)
        if kind == "dora":
            return dora_change(view.name, pretrained, factors, adapter.magnitude(module))
        if kind in ("pissa", "olora"):
            return {"pissa": pissa_change, "olora": olora_change}[kind](view.name, pretrained, factors)
        return Change(view.name, pretrained, factors=factors)

    return _source(base, view, change, kind, rank)


def _expert_source(base: Checkpoint, adapter: Adapter, update) -> PairSource:
    if adapter.kind not in ("lora", "rslora"):
        raise InputError(
            f"{update.view.name} in {adapter.folder} combines target_parameters with {adapter.kind}; wanted plain LoRA"
        )

    def change(pretrained: torch.Tensor) -> Change:
        return Change(update.view.name, pretrained, factors=update.factors(adapter))

    return _source(base, update.view, change, adapter.kind, adapter.targets[update.module].rank)


def _whole_sources(base: Checkpoint, adapter: Adapter, adapted: set[str]) -> list[PairSource]:
    """The counted matrices that the adapter stores whole (modules_to_save): tuned like those of a full checkpoint."""
    whole = Checkpoint(
        adapter.folder,
        {tensor: adapter.checkpoint.files[tensor] for tensor in adapter.whole_tensors},
        {tensor: adapter.checkpoint.shapes[tensor] for tensor in adapter.whole_tensors},
        base.model_type,
    )
    sources = []
    for name, view in whole.counted.items():
        if name in adapted or ".base_layer." in view.tensor:
            continue  # a copy of the frozen base that PEFT saves beside its factors
        if name not in base.counted:
            raise InputError(
                f"the base {base.folder} has no tensor for {name}, of which the adapter {adapter.folder} holds a whole "
                "copy (modules_to_save); wanted the base that the adapter was trained on"
            )
        sources.append(_full_source(base, base.counted[name], whole, view, "whole"))
    return sources
