"""Properties that any mitigator must have, on an adapter of every kind; tried on every mitigator of `plugs`.

Kinds: the eleven of which PEFT's own mitigation gets most wrong (`adapter_kinds.ELEVEN`), and the further ones that
this package reads. What a mitigator does not do must be refused with one clear error, never done wrongly in silence.
"""

import copy
import warnings

import numpy as np
import pytest
import torch
from adapter_kinds import ELEVEN, KINDS, build, matrix, merged
from plugs import MITIGATORS, Mitigator, load_adapter

from intruder import InputError
from intruder.weights import checkpoint_pairs

K, EPSILON, SCALE = 6, 0.7, 0.3


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """make(kind) -> the case of one kind, built once; nothing may change its folders."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = build(kind, tmp_path_factory.mktemp("kind"))
        return made[kind]

    return make


@torch.no_grad()
def outputs(model: torch.nn.Module, kind: str) -> torch.Tensor:
    """The logits of a model for a fixed input."""
    if KINDS[kind].model == "conv":
        return model(torch.linspace(-1, 1, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6))
    return model(input_ids=torch.arange(3, 19).reshape(2, 8)).logits.float()


def edited(made, kind: str) -> dict[str, torch.Tensor]:
    """W + (lambda - 1) sum_I u sigma v^T of every matrix, from numpy's decompositions in float64."""
    state, result, intruders = merged(made), {}, 0
    for pair in checkpoint_pairs(made.base, made.adapter):
        W = matrix(pair.name, state, KINDS[kind].model).double().numpy()
        X = np.linalg.svd(pair.pretrained.double().numpy(), full_matrices=False)[0]
        U, S, Vh = np.linalg.svd(W, full_matrices=False)
        chosen = [j for j in range(K) if np.abs(X.T @ U[:, j]).max() < EPSILON]
        intruders += len(chosen)
        result[pair.name] = torch.from_numpy(W + (SCALE - 1) * (U[:, chosen] * S[chosen]) @ Vh[chosen])
    assert intruders, "the case has no intruder, so nothing would be tested"
    return result


def identity_at_one(mitigator: Mitigator, made, kind: str, out):
    """lambda = 1 gives the logits of the adapter as it was."""
    before = outputs(load_adapter(made, made.adapter), kind)
    after = outputs(mitigator.apply(made, out, 1.0, EPSILON, K), kind)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def identity_without_intruders(mitigator: Mitigator, made, kind: str, out):
    """Where no vector is an intruder (epsilon so small that none can be) the logits stay as they were."""
    before = outputs(load_adapter(made, made.adapter), kind)
    after = outputs(mitigator.apply(made, out, 0.0, 1e-9, K), kind)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def exact_edit(mitigator: Mitigator, made, kind: str, out):
    """Every matrix becomes W + (lambda - 1) sum_I u sigma v^T, the sum over the intruders of the top k."""
    expected = edited(made, kind)
    model = mitigator.apply(made, out, SCALE, EPSILON, K)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = copy.deepcopy(model).float().merge_and_unload().state_dict()
    for name, W in expected.items():
        found = matrix(name, state, KINDS[kind].model).double()
        scale = W.abs().max()
        torch.testing.assert_close(found / scale, W / scale, rtol=0, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def precision(mitigator: Mitigator, made, kind: str, out):
    """The mitigated adapter is stored no coarser than the one it was made from."""
    before = {p.dtype for n, p in load_adapter(made, made.adapter).named_parameters() if "lora_" in n}
    model = mitigator.apply(made, out, SCALE, EPSILON, K)
    active = [n for n in model.active_adapters]
    after = {p.dtype for n, p in model.named_parameters() if "lora_" in n and any(f".{a}" in n for a in active)}
    assert before == {torch.float32}
    assert after == {torch.float32}


def base_untouched(mitigator: Mitigator, made, kind: str, out):
    """The model without the adapter gives the logits it gave before (for PiSSA and OLoRA those of the residual)."""
    model = mitigator.apply(made, out, 1.0, EPSILON, K)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        original = load_adapter(made, made.adapter)
        with original.disable_adapter():
            before = outputs(original, kind)
        with model.disable_adapter():
            after = outputs(model, kind)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


PROPERTIES = {
    "identity at lambda = 1": identity_at_one,
    "identity without intruders": identity_without_intruders,
    "the edit is exact": exact_edit,
    "the base is untouched": base_untouched,
    "precision is kept": precision,
}


def cases():
    for mitigator in MITIGATORS:
        kinds = ELEVEN if mitigator.name == "PEFT" else KINDS
        for claim in PROPERTIES:
            for kind in ["bf16 base"] if claim == "precision is kept" else kinds:
                known = mitigator.fails.get(f"{claim}: {kind}")
                marks = [known.mark()] if known else []
                yield pytest.param(mitigator, claim, kind, marks=marks, id=f"{mitigator.name}: {claim}: {kind}")


@pytest.mark.parametrize("mitigator, claim, kind", list(cases()))
def test_mitigator(mitigator, claim, kind, case, tmp_path):
    """Every mitigator has every property on every kind, refuses it by name, or is known to fail, with a reason."""
    refusal = mitigator.refuses.get(f"{claim}: {kind}")
    if refusal:
        with pytest.raises(InputError, match=refusal):
            PROPERTIES[claim](mitigator, case(kind), kind, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    else:
        PROPERTIES[claim](mitigator, case(kind), kind, tmp_path / "out")
