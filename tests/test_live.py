"""The live callback: what it sees is what a full decomposition sees, for every kind of training."""

import numpy as np
import peft
import pytest
import torch

from intruder.errors import InputError
from intruder.intruders import max_cosines
from intruder.live import IntruderCallback, leading_from
from intruder.spectrum import svd


def _train(model, callback, steps=30, rate=3e-2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(3, 40, (8, 10), generator=generator), torch.randint(0, 3, (8,), generator=generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(1, steps + 1):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        callback(step, loss.item(), model)


def _truth(W0, W, k):
    before, after = svd(W0.detach().double()), svd(W.detach().double())
    return after.S[:k].numpy(), max_cosines(before.U.numpy(), after.U[:, :k].numpy())


def _agrees(frame, name, W0, W, k):
    rows = frame[(frame["matrix"] == name) & (frame["step"] == frame["step"].max())]
    S, cosines = _truth(W0, W, k)
    np.testing.assert_allclose(rows["singular_value"], S, rtol=2e-3)
    clear = np.abs(cosines - 0.5) > 0.05
    np.testing.assert_array_equal(rows["intruder"].to_numpy()[clear], (cosines < 0.5)[clear])


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_it_sees_intruders_being_born_in_lora(tiny_bert, settings):
    """At the last step values and verdicts are those of the merged weights; the count starts low and grows."""
    model = peft.get_peft_model(
        tiny_bert(), peft.LoraConfig(r=4, lora_alpha=16, target_modules=["query", "value"], **settings)
    )
    callback = IntruderCallback(every=10, k=5)
    _train(model, callback)
    frame, counts = callback.frame(), callback.counts()
    assert list(counts["step"]) == [1, 10, 20, 30] and len(frame) == 4 * 4 * 5
    assert counts["count"].iloc[-1] > counts["count"].iloc[0]
    layer = model.base_model.model.bert.encoder.layer[1].attention.self.value
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    if "use_dora" in settings:
        norms = merged.norm(dim=1, keepdim=True)
        merged = layer.lora_magnitude_vector["default"].weight[:, None] / norms * merged
    _agrees(frame, "encoder.layer.1.attention.self.value", layer.base_layer.weight, merged, 5)


def test_full_fine_tuning_is_compared_with_the_weights_before(tiny_bert):
    """base_state gives W0; without it the callback says what to pass."""
    model = tiny_bert().train()
    base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    callback = IntruderCallback(every=5, k=4, base_state=base, include=r"layer\.0\..*query")
    _train(model, callback, 10, 1e-2)
    frame = callback.frame()
    assert set(frame["matrix"]) == {"encoder.layer.0.attention.self.query"}
    name = "bert.encoder.layer.0.attention.self.query.weight"
    _agrees(frame, "encoder.layer.0.attention.self.query", base[name], model.state_dict()[name], 4)
    with pytest.raises(InputError, match="base_state=base.state_dict"):
        IntruderCallback()(1, 0.0, model)


def test_pissa_is_compared_with_the_true_base(tiny_bert):
    """The frozen weight is a residual: refused without base_state, and with it W is residual + s B A."""
    base = {name: tensor.detach().clone() for name, tensor in tiny_bert().state_dict().items()}
    model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights="pissa"))
    with pytest.raises(InputError, match="base_state"):
        IntruderCallback(k=4)(1, 0.0, model)
    callback = IntruderCallback(every=10, k=4, base_state=base)
    _train(model, callback, 10)
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    W0 = base["bert.encoder.layer.0.attention.self.query.weight"]
    _agrees(
        callback.frame(),
        "encoder.layer.0.attention.self.query",
        W0,
        layer.base_layer.weight + layer.get_delta_weight("default"),
        4,
    )


def test_it_changes_neither_the_model_nor_the_random_numbers(tiny_bert):
    """Training with the callback gives the weights of training without it, bit for bit."""
    weights = []
    for callback in (IntruderCallback(every=2, k=3), lambda *_: None):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            tiny_bert(), peft.LoraConfig(r=2, target_modules=["query"], lora_dropout=0.2)
        ).train()
        _train(model, callback, 6)
        weights.append(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(*weights)


def test_its_own_cost_is_recorded(tiny_bert):
    """Seconds in checks over seconds since the first call; before it the share is 0."""
    callback = IntruderCallback(every=10, k=3)
    assert callback.share == 0.0
    model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(r=2, target_modules=["query"]))
    _train(model, callback, 20)
    assert 0 < callback.share < 1 and callback.seconds > 0 and callback.setup_seconds > 0


def test_the_iteration_finds_a_direction_that_its_start_does_not_hold():
    """A strong new direction orthogonal to every start vector is found; else a decomposition answers."""
    generator = torch.Generator().manual_seed(0)
    W = torch.diag(torch.linspace(3, 1, 60))
    start = torch.eye(60)[:, :9]
    W[50, 51] += 20.0
    U, S, error = leading_from(W, start, 3)
    assert abs(float(U[50, 0])) > 0.99 and float(S[0]) == pytest.approx(float(svd(W).S[0]), rel=1e-4)
    truth = svd(W.double()).U[:, :3]
    turned = (U[:, :3].double() * (U[:, :3].double() * truth).sum(0).sign() - truth).norm(dim=0)
    assert bool((turned <= error + 1e-6).all())
    flat = torch.linalg.qr(torch.randn(60, 60, generator=generator)).Q  # every singular value is 1: nothing converges
    _, S, error = leading_from(flat, start, 3)
    torch.testing.assert_close(S[:3], torch.ones(3), rtol=1e-4, atol=0)
    assert bool((error > 0.5).all())  # one of many bases of the same space: any verdict is borderline


def test_a_live_verdict_next_to_epsilon_is_borderline():
    """A cosine within the doubt about its vector is marked, one at a distance is not."""
    callback = IntruderCallback(k=3)
    W0 = torch.diag(torch.linspace(5, 1, 40))
    cosine = max_cosines(svd(W0).U.numpy(), leading_from(W0, torch.eye(40)[:, :9], 3)[0][:, :3].numpy())
    callback._bases, callback._last = {"m": svd(W0).U}, {"m": torch.eye(40)[:, :9]}
    callback.epsilon = float(cosine[0])
    callback._check(1, 0.0, "m", W0)
    assert bool(callback.frame()["borderline"][0])
    callback.epsilon = 0.5
    callback._check(2, 0.0, "m", W0)
    assert not callback.frame()["borderline"][3:].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"k": 0}, "k=0"),
        ({"epsilon": 2}, "epsilon=2"),
        ({"include": "("}, "no regular expression"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    """When the callback is made, not in the middle of a run."""
    with pytest.raises(InputError, match=message):
        IntruderCallback(**settings)


def test_a_k_that_is_too_large_and_an_empty_choice_are_refused(tiny_bert):
    """At the first call, naming the matrix or the pattern."""
    model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(InputError, match="k=33 and encoder.layer.0"):
        IntruderCallback(k=33)(1, 0.0, model)
    with pytest.raises(InputError, match="no matrix to watch"):
        IntruderCallback(include="decoder")(1, 0.0, model)
