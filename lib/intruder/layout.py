"""Which tensors of a checkpoint are counted, under which names, and how a stored tensor becomes matrices (out, in).

The rule. Counted are the weights of linear and convolutional layers and the experts of a mixture inside the numbered
layers of the model. Not counted: embeddings, biases, norms, poolers, language-model and classification heads, and
anything outside a numbered layer. With an adapter only the matrices it changes are counted; the others are as they
were. One addition: an embedding that an adapter gives a low-rank update of its own is counted.

Orientation. Every matrix is (out, in), so that left singular vectors live in the space of the layer's outputs.
- Linear weights are stored so. GPT-2 and its kin store (in, out) (`Conv1D`): transposed.
- Convolutions, (out, in, kernel ...), are flattened to (out, in * kernel).
- An embedding (tokens, width) is transposed to (width, tokens): it maps a one-hot token to a vector.
- Three-dimensional expert tensors are counted expert by expert: (experts, out, in), or (experts, in, out) in models
  that multiply from the right (gpt_oss, llama4, aria); the shapes of the two expert tensors decide where they can.

Names. Wrappers of the libraries (`base_model.model.`, `module.`) and the prefix of the architecture (`bert.`, `model.`)
are taken off, so a bare BertModel pairs with a BertForMaskedLM.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

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
    "gpt_neox",
)
NOT_COUNTED = frozenset(
    "embeddings embedding word_embeddings position_embeddings token_type_embeddings embed_tokens embed_positions wte "
    "wpe embed_in "
    "shared pooler cls classifier classification_head pre_classifier score lm_head predictions vocab_transform "
    "vocab_projector vocab_layer_norm qa_outputs generator_predictions generator_lm_head discriminator_predictions "
    "LayerNorm layer_norm rel_embeddings relative_attention_bias".split()
)
# Model types whose numbered layers store their linear weights transposed, shape (in, out).
TRANSPOSED_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
# Model types whose three-dimensional expert tensors are (experts, in, out).
TRANSPOSED_EXPERTS = frozenset(
    {"gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter"}
)
# Of these, the ones that PEFT knows to be transposed (the module says `is_transposed`); elsewhere its A and B swap.
PEFT_TRANSPOSED_EXPERTS = TRANSPOSED_EXPERTS - {"llama4", "llama4_text"}
EXPERT_PARTS = frozenset({"experts", "input_linear", "output_linear"})
# Beside these tensors lies a quantised weight: bitsandbytes, GPTQ, AWQ, compressed tensors, float8, mxfp4.
QUANTISED = (
    ".absmax",
    ".quant_map",
    ".SCB",
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale_inv",
    "_blocks",
)


class View(NamedTuple):
    """One matrix of shape (out, in) in a stored tensor: the whole, transposed or flattened, or one expert of it."""

    name: str
    tensor: str
    shape: tuple[int, int]
    transposed: bool = False
    expert: int | None = None

    def of(self, tensor):
        """The matrix in a torch tensor that is stored so: the expert taken, flattened, transposed."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.transposed:
            return tensor.T.contiguous()
        return tensor.reshape(self.shape)


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
    tensor = tensor.removesuffix(".weight")
    while tensor.endswith(".base_layer"):
        tensor = tensor.removesuffix(".base_layer")
    return tensor


def is_counted(name: str) -> bool:
    """Whether the rule counts a matrix of this name: in a numbered layer, and no part of the name excluded."""
    parts = name.split(".")
    return any(part.isdigit() for part in parts) and NOT_COUNTED.isdisjoint(parts)


def natural(name: str) -> list[tuple[int, str]]:
    """Sorting key that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def is_transposed(tensor: str, shapes: Mapping[str, tuple[int, ...]], model_type: str | None) -> bool:
    """Whether a two-dimensional weight is stored (in, out): a numbered layer `h.N` of a GPT-2 kind of model.

    Without a model type (no config.json) the shape of `attn.c_attn` decides, which is (n, 3n) where it is transposed.
    """
    if not re.search(r"(^|\.)h\.\d+\.", tensor):
        return False
    if model_type is not None:
        return model_type in TRANSPOSED_MODELS
    return any(
        name.endswith(".attn.c_attn.weight") and len(shape) == 2 and shape[1] == 3 * shape[0]
        for name, shape in shapes.items()
    )


def experts_transposed(tensor: str, shapes: Mapping[str, tuple[int, ...]], model_type: str | None) -> bool:
    """Whether a three-dimensional expert tensor is stored (experts, in, out)."""
    stem = tensor.removesuffix(".weight").rpartition(".")[0]
    up, down = shapes.get(f"{stem}.gate_up_proj", ()), shapes.get(f"{stem}.down_proj", ())
    if len(up) == len(down) == 3:
        straight = up[2] == down[1] and up[1] == 2 * down[2]
        turned = up[1] == down[2] and up[2] == 2 * down[1]
        if straight != turned:
            return turned
    return model_type in TRANSPOSED_EXPERTS


def views(tensor: str, shapes: Mapping[str, tuple[int, ...]], model_type: str | None) -> list[View]:
    """The matrices in one stored tensor: none for a vector, one for a weight, one an expert for stacked experts."""
    shape, name = shapes[tensor], matrix_name(tensor)
    is_weight, experts = tensor.endswith(".weight"), not EXPERT_PARTS.isdisjoint(name.split("."))
    if len(shape) == 3 and experts:
        turned = experts_transposed(tensor, shapes, model_type)
        sides = (shape[2], shape[1]) if turned else (shape[1], shape[2])
        return [View(f"{name}.{expert}", tensor, sides, turned, expert) for expert in range(shape[0])]
    if not is_weight or not 2 <= len(shape) <= 5:
        return []
    if len(shape) == 2:
        turned = is_transposed(tensor, shapes, model_type)
        return [View(name, tensor, shape[::-1] if turned else shape, turned)]
    columns = 1
    for side in shape[1:]:
        columns *= side
    return [View(name, tensor, (shape[0], columns))]


def counted_views(shapes: Mapping[str, tuple[int, ...]], model_type: str | None, where: str) -> dict[str, View]:
    """Counted matrix name -> its view, from the shapes of all tensors of a checkpoint.

    Raises InputError if two tensors have the same name, or a counted matrix is stored quantised.
    """
    found: dict[str, View] = {}
    for tensor in shapes:
        if tensor.endswith(QUANTISED) and is_counted(matrix_name(tensor)):
            raise InputError(
                f"{where} holds the quantised weight {tensor!r} (bitsandbytes, GPTQ, AWQ, float8 or mxfp4); wanted "
                "float32, float16 or bfloat16: give the full-precision model that was quantised as BASE; an adapter "
                "trained on the quantised model fits it"
            )
        for view in views(tensor, shapes, model_type):
            if not is_counted(view.name):
                continue
            if view.name in found:
                raise InputError(
                    f"{where} holds both {found[view.name].tensor!r} and {tensor!r}; wanted one tensor for the matrix "
                    f"{view.name}"
                )
            found[view.name] = view
    return found
