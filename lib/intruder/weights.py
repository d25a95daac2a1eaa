"""Pairs (pre-trained, tuned) of the weight matrices that are counted, from checkpoints on disk or a model in memory.

The rule. Counted: the two-dimensional weights of linear layers inside the numbered layers of the encoder (attention and
feed-forward). Not counted: embeddings, biases, LayerNorms, poolers, language-model and classification heads, anything
outside a numbered layer, and tensors that are not two-dimensional. With a LoRA adapter only the matrices it adapts are
counted; the others have not changed.

Names. Tensors are matched after the wrappers of the libraries (`base_model.model.`, `module.`) and the prefix of the
architecture (`bert.`, `roberta.`, `model.` ...) are taken off, so a bare BertModel pairs with a BertForMaskedLM.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from .checkpoints import TRANSPOSED_MODELS, Adapter, Checkpoint, open_adapter, open_checkpoint
from .errors import InputError

WRAPPERS = ("base_model.model.", "module.", "_orig_mod.")
ARCHITECTURES = (
    "bert",
    "roberta",
    "distilbert",
    "electra",
    "deberta",
    "mpnet",
    "camembert",
    "longformer",
    "model",
    "transformer",
)
NOT_COUNTED = frozenset(
    "embeddings embedding word_embeddings position_embeddings token_type_embeddings embed_tokens embed_positions wte "
    "wpe "
    "shared pooler cls classifier classification_head pre_classifier score lm_head predictions vocab_transform "
    "vocab_projector vocab_layer_norm qa_outputs generator_predictions generator_lm_head discriminator_predictions "
    "LayerNorm layer_norm rel_embeddings relative_attention_bias".split()
)


class MatrixPair(NamedTuple):
    """One weight before and after: float32, shape (out, in). `update` is tuned - pretrained where the factors give it.

    For LoRA, `update` = scale * B A in float32 and `tuned` = `pretrained` + `update`; otherwise `update` is None and
    the difference of the two matrices carries the rounding of float32.
    """

    name: str
    pretrained: torch.Tensor
    tuned: torch.Tensor
    update: torch.Tensor | None = None


class PairSource(NamedTuple):
    """A pair that has not been read yet: its name, its shape (out, in), and the call that reads it."""

    name: str
    shape: tuple[int, int]
    load: Callable[[], MatrixPair]


def matrix_name(tensor: str) -> str:
    """The name of a matrix: the tensor's name without library wrappers, architecture prefix and `.weight`.

    'base_model.model.bert.encoder.layer.0.output.dense.base_layer.weight' -> 'encoder.layer.0.output.dense'
    """
    stripped = True
    while stripped:
        stripped = False
        for prefix in WRAPPERS:
            if tensor.startswith(prefix):
                tensor, stripped = tensor.removeprefix(prefix), True
    first, dot, rest = tensor.partition(".")
    if dot and first in ARCHITECTURES:
        tensor = rest
    return tensor.removesuffix(".weight").removesuffix(".base_layer")


def is_counted(name: str) -> bool:
    """Whether the rule counts a matrix of this name: in a numbered layer, and no part of the name excluded."""
    parts = name.split(".")
    return any(part.isdigit() for part in parts) and NOT_COUNTED.isdisjoint(parts)


def lora_scale(alpha: float, rank: int, rslora: bool = False) -> float:
    """The factor s of the update s * B A: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def lora_update(B: torch.Tensor, A: torch.Tensor, scale: float) -> torch.Tensor:
    """The dense update scale * B A in float32: B of shape (out, r), A of shape (r, in), any floating-point dtype."""
    return scale * (B.detach().float() @ A.detach().float())


def checkpoint_pairs(base_dir: str | Path, tuned_dir: str | Path) -> Iterator[MatrixPair]:
    """Every counted matrix of two local checkpoints, read one at a time, in the order of their names.

    `base_dir` holds model.safetensors or its sharded index; `tuned_dir` holds the same, or a PEFT adapter
    (adapter_config.json and adapter_model.safetensors) with plain LoRA: W = W0 + s B A, s = alpha / r or alpha /
    sqrt(r) (rsLoRA), ranks and alphas by pattern, transposed weights (fan_in_fan_out). Everything is float32, also when
    stored in half precision. Nothing is downloaded and no model is built.

    Raises InputError, before the first pair where names and shapes decide: a missing folder or file, a pickle instead
    of safetensors, another kind of adapter (named), an adapter that does not fit the base, a counted matrix present on
    one side only, shapes that differ, nothing to count; and while reading: NaN or infinity, naming tensor and file.
    """
    return (source.load() for source in pair_sources(base_dir, tuned_dir))


def pair_sources(base_dir: str | Path, tuned_dir: str | Path) -> list[PairSource]:
    """The pairs of `checkpoint_pairs` with names and shapes known and matched, but no matrix read yet."""
    base = open_checkpoint(base_dir)
    names = counted_tensors(base.shapes, f"the base {base_dir}")
    tuned_dir = Path(tuned_dir)
    if (tuned_dir / "adapter_config.json").is_file():
        sources = _adapter_sources(base, names, open_adapter(tuned_dir))
    else:
        sources = _full_sources(base, names, open_checkpoint(tuned_dir))
    if not sources:
        raise InputError(
            f"no matrix to count in {tuned_dir} against {base_dir}; wanted attention and feed-forward weights with the "
            "same names on both sides: check that the base is the model that was fine-tuned"
        )
    return sorted(sources, key=lambda source: _natural(source.name))


def counted_tensors(shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, str]:
    """Counted matrix name -> tensor name, from all tensors of a checkpoint; InputError if two have the same name."""
    found: dict[str, str] = {}
    for tensor, shape in shapes.items():
        name = matrix_name(tensor)
        if len(shape) != 2 or not tensor.endswith(".weight") or not is_counted(name):
            continue
        if name in found:
            raise InputError(
                f"{where} holds both {found[name]!r} and {tensor!r}; wanted one tensor for the matrix {name}"
            )
        found[name] = tensor
    return found


def _full_sources(base: Checkpoint, names: dict[str, str], tuned: Checkpoint) -> list[PairSource]:
    for checkpoint in (base, tuned):
        if checkpoint.model_type in TRANSPOSED_MODELS:
            raise InputError(
                f"{checkpoint.folder} is a {checkpoint.model_type} model, which stores its weights transposed; wanted "
                "a model with weights of shape (out, in), or a LoRA adapter on this one"
            )
    tuned_names = counted_tensors(tuned.shapes, f"the tuned checkpoint {tuned.folder}")
    for mine, other, folder in ((names, tuned_names, tuned.folder), (tuned_names, names, base.folder)):
        # A matrix under a root that the other side does not have at all (a head of an unknown kind) has no partner.
        roots = {name.partition(".")[0] for name in other}
        lost = sorted((n for n in mine if n not in other and n.partition(".")[0] in roots), key=_natural)
        if lost:
            raise InputError(
                f"{folder} has no tensor for the matrix {lost[0]} ({len(lost)} missing); wanted two checkpoints "
                "of the same architecture"
            )
    sources = []
    for name in names.keys() & tuned_names.keys():
        shape, tuned_shape = base.shapes[names[name]], tuned.shapes[tuned_names[name]]
        if shape != tuned_shape:
            raise InputError(
                f"{name} has shape {shape} in {base.folder} and {tuned_shape} in {tuned.folder}; wanted the same "
                "shape: check that the base is the model that was fine-tuned"
            )
        sources.append(PairSource(name, shape, _full_loader(name, base, names[name], tuned, tuned_names[name])))
    return sources


def _full_loader(name: str, base: Checkpoint, b: str, tuned: Checkpoint, t: str) -> Callable[[], MatrixPair]:
    return lambda: MatrixPair(name, base.read(b), tuned.read(t))


def _adapter_sources(base: Checkpoint, names: dict[str, str], adapter: Adapter) -> list[PairSource]:
    for tensor in adapter.whole_tensors:
        if tensor.endswith(".weight") and matrix_name(tensor) in names:
            raise InputError(
                f"the adapter {adapter.folder} holds a whole copy of the counted matrix {matrix_name(tensor)} "
                "(modules_to_save); wanted only low-rank updates of it: merge the adapter, save the model with "
                "save_pretrained and count the full checkpoint"
            )
    sources, seen = [], {}
    for module, factors in adapter.factors.items():
        name = matrix_name(module)
        if not is_counted(name):
            continue
        if name in seen:
            raise InputError(
                f"the adapter {adapter.folder} holds both {seen[name]!r} and {module!r}; wanted one of them"
            )
        seen[name] = module
        if name not in names:
            raise InputError(
                f"the base {base.folder} has no tensor for {name}, which the adapter {adapter.folder} adapts; "
                "wanted the base that the adapter was trained on"
            )
        shape = base.shapes[names[name]]
        shape = shape[::-1] if adapter.transposed else shape
        if shape != factors.shape:
            raise InputError(
                f"{name} has shape {shape} in {base.folder} and the adapter's update has {factors.shape}; wanted "
                "the base that the adapter was trained on"
            )
        scale = lora_scale(factors.alpha, factors.rank, adapter.rslora)
        sources.append(PairSource(name, shape, _adapter_loader(name, base, names[name], adapter, module, scale)))
    return sources


def _adapter_loader(name: str, base: Checkpoint, tensor: str, adapter: Adapter, module: str, scale: float):
    def load() -> MatrixPair:
        pretrained = base.read(tensor)
        pretrained = pretrained.T.contiguous() if adapter.transposed else pretrained
        B, A = adapter.read(module)
        update = lora_update(B, A, scale)
        return MatrixPair(name, pretrained, pretrained + update, update)

    return load


def model_pairs(base_state: Mapping[str, torch.Tensor], model: torch.nn.Module) -> Iterator[MatrixPair]:
    """Every counted matrix of a model in memory beside its pre-trained value from `base_state` (a state dict).

    A PEFT model with LoRA gives the matrices of its active adapters, merged in float32 from A and B; any other model
    gives all counted matrices. Tensors stay on the device of the model.

    Raises InputError for a LoRA variant such as DoRA, a base weight that the adapter's set-up changed (PiSSA, OLoRA), a
    matrix that `base_state` does not have or has in another shape, and if nothing is counted.
    """
    names = counted_tensors({key: tuple(value.shape) for key, value in base_state.items()}, "base_state")
    layers = {
        matrix_name(path): module
        for path, module in model.named_modules()
        if isinstance(getattr(module, "lora_A", None), torch.nn.ModuleDict) and is_counted(matrix_name(path))
    }
    state = model.state_dict()
    found = (
        counted_tensors({key: tuple(value.shape) for key, value in state.items()}, "the model") if not layers else {}
    )
    wanted = sorted(layers or found, key=_natural)
    if not wanted:
        raise InputError(f"no matrix to count in this {type(model).__name__}; wanted an encoder with linear layers")
    for name in wanted:
        if name not in names:
            raise InputError(f"base_state has no tensor for {name}; wanted the state dict of the pre-trained model")
    return (
        _lora_pair(name, base_state[names[name]], layers[name])
        if layers
        else _plain_pair(name, base_state[names[name]], state[found[name]])
        for name in wanted
    )


def _plain_pair(name: str, pretrained: torch.Tensor, tuned: torch.Tensor) -> MatrixPair:
    _same_shape(name, pretrained, tuned)
    return MatrixPair(name, pretrained.detach().to(tuned.device).float(), tuned.detach().float())


def _lora_pair(name: str, pretrained: torch.Tensor, layer: torch.nn.Module) -> MatrixPair:
    """The pair of one PEFT LoRA layer: its active adapters, merged in float32 from A and B."""
    if layer.merged:
        raise InputError(f"the adapter is merged into {name}; wanted it unmerged: call model.unmerge_adapter()")
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if not active:
        raise InputError(f"no active adapter on {name}; wanted one: call model.set_adapter('default')")
    if any(adapter in layer.lora_variant for adapter in active):
        raise InputError(f"{name} uses a variant of LoRA such as DoRA; wanted plain LoRA, whose update is s * B A")
    stored = layer.get_base_layer().weight.detach()
    _same_shape(name, pretrained, stored)
    if not torch.equal(pretrained.detach().to(stored), stored):
        raise InputError(
            f"the frozen weight {name} of the model differs from base_state; wanted LoRA that leaves the base "
            "untouched (init_lora_weights=True), and the state dict of the same base"
        )
    pretrained = pretrained.detach().to(stored.device).float()
    pretrained = pretrained.T if layer.fan_in_fan_out else pretrained
    update = sum(
        lora_update(layer.lora_B[adapter].weight, layer.lora_A[adapter].weight, layer.scaling[adapter])
        for adapter in active
    )
    return MatrixPair(name, pretrained, pretrained + update, update)


def _same_shape(name: str, pretrained: torch.Tensor, tuned: torch.Tensor) -> None:
    if pretrained.shape != tuned.shape:
        raise InputError(
            f"{name} has shape {tuple(pretrained.shape)} in base_state and {tuple(tuned.shape)} in the model; "
            "wanted the state dict of the pre-trained model"
        )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorting key that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
