"""LoRA on the stacked experts of a mixture (PEFT's target_parameters): which factors belong to which expert.

PEFT wraps the module that holds the parameters once for each of them, the first defined innermost, so the factors of
two parameters of `mlp.experts` are named `mlp.experts.base_layer` and `mlp.experts`. With E experts A has shape
(E r, .) and B (., E r): expert e owns the rows e r .. (e + 1) r of A and the columns e, E + e, 2 E + e, ... of B.

The base holds the experts stacked (one tensor (E, ., .)), or apart (`experts.0.gate_proj.weight` ...), as transformers
saves most models; then the update of a fused `gate_up_proj` is cut into its two halves, so that the same matrices are
counted as in a full checkpoint.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import permutations
from typing import NamedTuple

import torch

from .adapters import Adapter
from .checkpoints import Checkpoint
from .errors import InputError
from .layout import PEFT_TRANSPOSED_EXPERTS, View, matrix_name
from .spectrum import LowRank

# Parameters in the order in which their modules define them, and the names of their parts where experts lie apart.
DEFINED = ("gate_up_proj", "down_proj")
APART = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
STEMS = (("", ""), (".mlp.experts", ".block_sparse_moe.experts"))


class Stored(NamedTuple):
    """A fused parameter of the model as the base stores it: shape (E, x, y) in the model, its views by expert."""

    parameter: str
    shape: tuple[int, int, int]
    parts: list[list[View]]


class ExpertUpdate(NamedTuple):
    """One matrix of one expert: its view in the base, the adapter's module, and the part of its factors."""

    view: View
    module: str
    expert: int
    experts: int
    rows: slice
    swapped: bool
    parameter: str

    def factors(self, adapter: Adapter) -> LowRank:
        """B (out, r) and A (r, in) of this matrix, cut from the stacked factors."""
        B, A, scale = adapter.read(self.module)
        rank = A.shape[0] // self.experts
        A = A[self.expert * rank : (self.expert + 1) * rank]
        B = B[:, self.expert :: self.experts]
        if self.swapped:
            B, A = A.T.contiguous(), B.T.contiguous()
        return LowRank(B[self.rows].contiguous(), torch.clone(A), scale)


def expert_updates(base: Checkpoint, adapter: Adapter, modules: list[str]) -> Iterator[ExpertUpdate]:
    """Every matrix that these modules (one stem, one or more wrappers) of an adapter on stacked experts update.

    Raises InputError if the base does not hold the parameters, or the factors fit none of them or fit in two ways that
    the order of definition does not decide.
    """
    stem = matrix_name(modules[0])
    stored = _stored(base, adapter, stem)
    ordered = sorted(modules, key=lambda module: -module.count(".base_layer"))  # innermost, the first defined, first
    fitting = [
        order
        for order in permutations(stored, len(ordered))
        if all(_orientations(adapter, module, entry) for module, entry in zip(ordered, order, strict=True))
    ]
    if len(fitting) > 1:
        fitting = [order for order in fitting if all(e.parameter in DEFINED for e in order)]
        fitting = sorted(fitting, key=lambda order: [DEFINED.index(entry.parameter) for entry in order])[:1]
    if not fitting:
        raise InputError(
            f"the factors of {stem} in {adapter.folder} do not fit the expert tensors of {base.folder} "
            f"({', '.join(f'{entry.parameter} {entry.shape}' for entry in stored) or 'none found'}); wanted the base "
            "that the adapter was trained on, with target_parameters that it holds"
        )
    for module, entry in zip(ordered, fitting[0], strict=True):
        orientations = _orientations(adapter, module, entry)
        # Square experts fit both ways; then the model decides, as in PEFT.
        peft_turned = orientations[0] if len(orientations) == 1 else base.model_type in PEFT_TRANSPOSED_EXPERTS
        start = 0
        for part in entry.parts:
            for view in part:
                height = view.shape[0]
                rows = slice(start, start + height)
                yield ExpertUpdate(
                    view, module, part.index(view), len(part), rows, peft_turned != view.transposed, entry.parameter
                )
            start += height


class Restacked(NamedTuple):
    """New stacked factors of one module: tensors as PEFT stores them, their rank, and the parameter's full name."""

    module: str
    parameter: str
    B: torch.Tensor
    A: torch.Tensor
    rank: int


def stacks(base: Checkpoint, adapter: Adapter) -> dict[str, list[str]]:
    """Name -> modules of the adapter that are sets of parameters (target_parameters), not one weight of the base."""
    if not adapter.config.get("target_parameters"):
        return {}
    single = {matrix_name(t) for t, shape in base.shapes.items() if t.endswith(".weight") and len(shape) == 2}
    found: dict[str, list[str]] = {}
    for module in adapter.targets:
        if (name := matrix_name(module)) not in single:
            found.setdefault(name, []).append(module)
    return found


def restack(base: Checkpoint, adapter: Adapter, edited: Mapping[str, LowRank]) -> Iterator[Restacked]:
    """The stacked factors of every module with an edited matrix: `edited` maps names of matrices to new updates.

    All experts of a parameter share one rank in PEFT: the largest that is needed; the factors of the others are filled
    with zeros, which is exact. The scale of the module stays. Where the halves of a fused parameter are edited apart,
    they keep the rows of A that they share.
    """
    for modules in stacks(base, adapter).values():
        updates = list(expert_updates(base, adapter, modules))
        for module in modules:
            mine = [update for update in updates if update.module == module]
            if any(update.view.name in edited for update in mine):
                yield _restacked(adapter, module, mine, edited)


def _restacked(adapter: Adapter, module: str, updates: list[ExpertUpdate], edited: Mapping[str, LowRank]) -> Restacked:
    fused = []
    for expert in range(updates[0].experts):
        parts = [update for update in updates if update.expert == expert]
        fused.append(_fused(adapter, parts, edited))
    rank = max(A.shape[0] for _, A in fused)
    Bs, As = [], []
    for B, A in fused:
        B = torch.nn.functional.pad(B, (0, rank - B.shape[1]))
        A = torch.nn.functional.pad(A, (0, 0, 0, rank - A.shape[0]))
        Bs.append(A.T if updates[0].swapped else B)
        As.append(B.T if updates[0].swapped else A)
    stem = re.sub(r"(\.base_layer)+$", "", module.removeprefix("base_model.model."))
    stacked = torch.stack(Bs, dim=2)
    return Restacked(
        module, f"{stem}.{updates[0].parameter}", stacked.reshape(stacked.shape[0], -1), torch.cat(As), rank
    )


def _fused(adapter: Adapter, parts: list[ExpertUpdate], edited: Mapping[str, LowRank]) -> tuple:
    """B and A of one expert over all its parts, for the scale of the module; the parts share the rows of the old A."""
    height = max(part.rows.stop for part in parts)
    scale = adapter.targets[parts[0].module].scale
    shared = parts[0].factors(adapter).A
    rank = shared.shape[0]
    B, A, extra = torch.zeros(height, rank), [shared], []
    for part in parts:
        new = edited.get(part.view.name) or part.factors(adapter)
        new_B, start = new.B.float() * (new.scale / scale), 0
        if new.A.shape[0] >= rank and torch.equal(new.A[:rank].float(), shared):
            B[part.rows] = new_B[:, :rank]
            start = rank
        if start < new.A.shape[0]:
            column = torch.zeros(height, new.A.shape[0] - start)
            column[part.rows] = new_B[:, start:]
            extra.append(column)
            A.append(new.A[start:].float())
    if not B.any() and extra:  # nothing uses the old rows any more
        return torch.cat(extra, 1), torch.cat(A[1:])
    return torch.cat([B, *extra], 1), torch.cat(A)


def _stored(base: Checkpoint, adapter: Adapter, stem: str) -> list[Stored]:
    by_name = {matrix_name(tensor): tensor for tensor, shape in base.shapes.items() if len(shape) == 3}
    found = []
    for target in adapter.config["target_parameters"]:
        parameter = target.rpartition(".")[2]
        full = f"{stem}.{parameter}"
        if not f".{full}".endswith(f".{target}") and not target.endswith(f".{full}") and target != parameter:
            continue
        if full in by_name:
            views = base.views(by_name[full])
            found.append(Stored(parameter, base.shapes[by_name[full]], [views]))
        elif parts := _apart(base, stem, parameter):
            rows = sum(part[0].shape[0] for part in parts)
            found.append(Stored(parameter, (len(parts[0]), rows, parts[0][0].shape[1]), parts))
    return found


def _apart(base: Checkpoint, stem: str, parameter: str) -> list[list[View]]:
    """The views of a fused parameter whose experts the base stores one by one: one list of experts for each part."""
    for old, new in STEMS:
        place = re.sub(rf"{re.escape(old)}$", new, f".{stem}").removeprefix(".") if old else stem
        for names in APART.get(parameter, ()):
            parts = []
            for name in names:
                part: list[View] = []
                while view := base.counted.get(f"{place}.{len(part)}.{name}"):
                    part.append(view)
                parts.append(part)
            if parts[0] and len({len(part) for part in parts}) == 1:
                return parts
    return []


def _orientations(adapter: Adapter, module: str, entry: Stored) -> list[bool]:
    """Whether PEFT's (out, in) is the stored (x, y) [False] or (y, x) [True]: the ways in which the factors fit."""
    target = adapter.targets[module]
    experts, x, y = entry.shape
    count = adapter.checkpoint.shapes[target.tensors["A"]][0]
    if count != experts * target.rank:
        return []
    return [turned for turned, shape in ((False, (x, y)), (True, (y, x))) if target.shape == shape]
