"""What can be plugged into the conformance suite: a counter or a mitigator, ours or a rival's, as a few callables.

To test another implementation, write one `Counter` or `Mitigator` here and add it to the list; what it fails goes into
its `fails`, property by property with the reason, and becomes a strict xfail: the suite then says so when it is mended.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from adapter_kinds import KINDS, Case

from intruder import count_intruders, max_cosines


@dataclass(frozen=True)
class Failure:
    """Why a property is known to fail, and with which exception: an assertion if the answer is wrong."""

    reason: str
    raises: type[Exception] | tuple[type[Exception], ...] = AssertionError

    def mark(self) -> pytest.MarkDecorator:
        """A strict xfail: passing, or failing in another way, is an error."""
        return pytest.mark.xfail(strict=True, reason=self.reason, raises=self.raises)


@dataclass(frozen=True)
class Counter:
    """count(pretrained, tuned, k, epsilon) -> the number of intruder dimensions; the matrices are torch tensors.

    `fails` maps the name of a property to what is known.
    """

    name: str
    count: Callable[[torch.Tensor, torch.Tensor, int, float], int]
    fails: dict[str, Failure] = field(default_factory=dict)


@dataclass(frozen=True)
class Mitigator:
    """apply(case, out, scale, epsilon, k) -> the mitigated model in memory, with all intruders of the top k scaled.

    `case` names the folders of the base and of the adapter and loads the base; `out` is an empty place to write to.
    `fails` maps "property: kind" to what is known; `refuses` to the words of the InputError that says so instead.
    """

    name: str
    apply: Callable[[Case, Path, float, float, int], torch.nn.Module]
    fails: dict[str, Failure] = field(default_factory=dict)
    refuses: dict[str, str] = field(default_factory=dict)


# Counters ----------------------------------------------------------------------------------------------------------


def by_definition(pretrained: torch.Tensor, tuned: torch.Tensor, k: int, epsilon: float) -> int:
    """The definition's two functions of numpy on two full decompositions in float64."""
    X, Y = (np.linalg.svd(matrix.double().numpy(), full_matrices=False)[0] for matrix in (pretrained, tuned))
    return count_intruders(max_cosines(X, Y[:, :k]), epsilon, k)


def by_route(method: str, as_factors: bool = False) -> Callable:
    """`intruder.compare` on one route, with the tuned matrix or with the update as factors."""

    def count(pretrained: torch.Tensor, tuned: torch.Tensor, k: int, epsilon: float) -> int:
        from intruder.basis import Basis
        from intruder import compare
        from intruder.spectrum import LowRank

        change = tuned
        if as_factors:
            dtype = torch.promote_types(pretrained.dtype, torch.float32)
            update = tuned.to(dtype) - pretrained.to(dtype)
            change = LowRank(update, torch.eye(update.shape[1], dtype=dtype), 1.0)
            if update.shape[1] > update.shape[0]:
                change = LowRank(torch.eye(update.shape[0], dtype=dtype), update, 1.0)
        basis = Basis.of(pretrained) if method == "cached" else None
        return int(compare(pretrained, change, k=k, epsilon=epsilon, method=method, basis=basis).count)

    return count


def by_peft(pretrained: torch.Tensor, tuned: torch.Tensor, k: int, epsilon: float) -> int:
    """What PEFT's reduce_intruder_dimension prints for one linear layer with W0 = pretrained, W0 + B A = tuned."""
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    rows, columns = pretrained.shape
    model = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False, dtype=pretrained.dtype))
    n = min(rows, columns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=n, lora_alpha=n, target_modules=["0"]))
    layer = wrapped.base_model.model[0]
    update, eye = tuned - pretrained, torch.eye(n, dtype=pretrained.dtype)
    with torch.no_grad():
        layer.base_layer.weight.copy_(pretrained)
        layer.lora_B["default"].weight.data = eye if rows <= columns else update
        layer.lora_A["default"].weight.data = update if rows <= columns else eye
    said = []
    reduce_intruder_dimension(
        wrapped, top_k=k, threshold_epsilon=epsilon, mitigation_lambda=1.0, logging_sink=said.append
    )
    numbers = [int(match[1]) for line in said if (match := re.search(r"Intruders: (\d+)", line))]
    return sum(numbers)


# Published mistakes: each must fail the property that is there for it.


def _wrong(transform: Callable) -> Callable:
    def count(pretrained: torch.Tensor, tuned: torch.Tensor, k: int, epsilon: float) -> int:
        W0, W = pretrained.double().numpy(), tuned.double().numpy()
        (X, _, Xh), (Y, _, Yh) = (np.linalg.svd(matrix, full_matrices=False) for matrix in (W0, W))
        return int((transform(W0, W, X, Xh, Y, Yh, k) < epsilon).sum())

    return count


MISTAKES = {
    "signed cosines": (_wrong(lambda W0, W, X, Xh, Y, Yh, k: (X.T @ Y[:, :k]).max(0)), "a sign does not matter"),
    "right vectors": (
        _wrong(lambda W0, W, X, Xh, Y, Yh, k: np.abs(Xh @ Yh[:k].T).max(0)),
        "left vectors are compared",
    ),
    "only the leading pre-trained vectors": (
        _wrong(lambda W0, W, X, Xh, Y, Yh, k: np.abs(X[:, :k].T @ Y[:, :k]).max(0)),
        "a match anywhere in the spectrum counts",
    ),
    "the vectors of the update alone": (
        _wrong(
            lambda W0, W, X, Xh, Y, Yh, k: np.abs(X.T @ np.linalg.svd(W - W0, full_matrices=False)[0][:, :k]).max(0)
        ),
        "a weak update makes no intruder",
    ),
    "all vectors": (
        _wrong(lambda W0, W, X, Xh, Y, Yh, k: np.abs(X.T @ Y).max(0)),
        "only the top k are examined",
    ),
}

COUNTERS = [
    Counter("definition", by_definition),
    *(Counter(f"compare, {method}", by_route(method)) for method in ("dense", "cached", "certified", "auto")),
    *(Counter(f"compare, {method}, factors", by_route(method, True)) for method in ("cached", "certified", "auto")),
    Counter("PEFT", by_peft),
]


# Mitigators --------------------------------------------------------------------------------------------------------


def ours(case: Case, out: Path, scale: float, epsilon: float, k: int) -> torch.nn.Module:
    """`mitigate_adapter` into a folder, and that folder loaded by PEFT as any adapter is."""
    from intruder.mitigate import mitigate_adapter

    mitigate_adapter(case.base, case.adapter, scale, out, which="all", k=k, epsilon=epsilon)
    return load_adapter(case, out)


def ours_in_memory(case: Case, out: Path, scale: float, epsilon: float, k: int) -> torch.nn.Module:
    """`mitigate_model` on the model that PEFT loaded."""
    from intruder.mitigate import mitigate_model

    model = load_adapter(case, case.adapter)
    mitigate_model(model, scale, which="all", k=k, epsilon=epsilon)
    return model


def peft_mitigator(case: Case, out: Path, scale: float, epsilon: float, k: int) -> torch.nn.Module:
    """PEFT's reduce_intruder_dimension on the model that PEFT loaded; the new adapter is active afterwards."""
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    model = load_adapter(case, case.adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reduce_intruder_dimension(
            model, top_k=k, threshold_epsilon=epsilon, mitigation_lambda=scale, logging_sink=lambda line: None
        )
    return model


def load_adapter(case: Case, folder: Path) -> torch.nn.Module:
    """The base with the adapter of a folder, as PEFT loads it, in evaluation mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(case.load(), folder).eval()


ONE, NONE, EXACT, BASE = (
    "identity at lambda = 1",
    "identity without intruders",
    "the edit is exact",
    "the base is untouched",
)
TRUNCATED = Failure("the edited update is cut back to rank r, which discards a part of the edit")
HEAD = Failure("a fresh head is made, the trained one in modules_to_save is not carried over")
AGAIN = Failure("the initialisation is run again on the base, which changes the shared base weights")
MAGNITUDE = Failure("the trained magnitude is initialised anew, and the counted matrix ignores it")
BIAS = Failure("the trained bias of lora_B is not copied")
SWAPPED = Failure("the transposed factors of an embedding are not turned back", (IndexError, RuntimeError))
CONV1D = Failure("the factors of a transposed weight are not turned back", RuntimeError)
CONV2D = Failure("a convolution is decomposed as if it were a stack of matrices", RuntimeError)
EXPERTS = Failure("stacked experts have no base weight by the name that is asked for", AttributeError)
ROUNDED = Failure("the new adapter is stored in the base's bfloat16, although the old one is float32")

MITIGATORS = [
    Mitigator(
        "intruder mitigate",
        ours,
        refuses={f"{EXACT}: DoRA on an embedding": "DoRA on an embedding"},
    ),
    Mitigator(
        "intruder mitigate, in memory",
        ours_in_memory,
        refuses={
            f"{claim}: {kind}": words
            for claim in (NONE, EXACT)
            for kind in KINDS
            for part, words in {
                "PiSSA": "'pissa'",
                "OLoRA": "'olora'",
                "AdaLoRA": "ADALORA",
                "VeRA": "VERA",
                "expert": "stacked experts",
                "DoRA on an embedding": "DoRA on an embedding",
            }.items()
            if part in kind
        },
    ),
    Mitigator(
        "PEFT",
        peft_mitigator,
        fails={
            **{f"{claim}: PiSSA": AGAIN for claim in (ONE, NONE, EXACT, BASE)},
            **{f"{claim}: OLoRA": AGAIN for claim in (ONE, NONE, EXACT, BASE)},
            **{f"{claim}: classifier in modules_to_save": HEAD for claim in (ONE, NONE)},
            **{f"{claim}: DoRA": MAGNITUDE for claim in (ONE, NONE, EXACT)},
            **{f"{claim}: lora_bias": BIAS for claim in (ONE, NONE)},
            **{f"{claim}: embedding": SWAPPED for claim in (ONE, EXACT)},
            **{f"{claim}: Conv1D": CONV1D for claim in (ONE, EXACT)},
            **{f"{claim}: Conv2d": CONV2D for claim in (ONE, NONE, EXACT, BASE)},
            **{f"{claim}: stacked experts": EXPERTS for claim in (ONE, NONE, EXACT, BASE)},
            **{f"{EXACT}: {kind}": TRUNCATED for kind in ("linear", "classifier in modules_to_save", "lora_bias")},
            f"{EXACT}: bf16 base": TRUNCATED,
            f"{ONE}: bf16 base": ROUNDED,
            "precision is kept: bf16 base": ROUNDED,
        },
    ),
]
