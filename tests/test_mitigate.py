"""Mitigated adapters: exact for every kind, identities where nothing is to be done, and nothing half-written."""

import json
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_journal import full_disk

from intruder.cli import main
from intruder.count import count_checkpoints
from intruder.errors import InputError
from intruder.mitigate import mitigate_adapter, mitigate_model

# peft 0.21 takes the trained bias of lora_bias=True for a factor of a wrong shape whenever it saves or loads one.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor")

K = 6
LINEAR = ["query", "value", "intermediate.dense", "output.dense"]


class Convolutions(transformers.PreTrainedModel):
    """Two convolutions and a readout, with numbered layers: the smallest model of its kind that saves and loads."""

    config_class = transformers.PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = torch.nn.ModuleList([torch.nn.Conv2d(3, 24, 3, padding=1), torch.nn.Conv2d(24, 20, 1)])
        self.post_init()

    def forward(self, input_ids=None, **_):
        x = input_ids
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.mean((2, 3))


def _bert(tiny_bert):
    return tiny_bert(seed=1)


def _gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40,
        n_positions=16,
        n_embd=24,
        n_layer=2,
        n_head=2,
        pad_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".h." in name and parameter.ndim == 2:
                parameter.mul_(torch.linspace(8.0, 0.5, parameter.shape[1]))
    return model


def _lora(**settings):
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": LINEAR} | settings))


KINDS = {
    "lora": lambda: _lora(),
    "rslora": lambda: _lora(use_rslora=True),
    "head": lambda: _lora(modules_to_save=["classifier"], task_type="SEQ_CLS"),
    "patterns": lambda: _lora(rank_pattern={"query": 2, r"layer\.1\.output.dense": 5}, alpha_pattern={"value": 3}),
    "biases": lambda: _lora(bias="all"),
    "lora_bias": lambda: _lora(lora_bias=True),
    "dora": lambda: _lora(use_dora=True),
    "embedding": lambda: _lora(target_modules=["query", "word_embeddings"]),
    "conv1d": lambda: _lora(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
    "conv1d-dora": lambda: _lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True),
    "conv2d": lambda: _lora(target_modules=["layers.0", "layers.1"]),
    "pissa": lambda: _lora(init_lora_weights="pissa"),
    "olora": lambda: _lora(init_lora_weights="olora"),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=3, total_step=10, lora_alpha=6, target_modules=LINEAR),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=["query", "value"], save_projection=True),
}
IN_PLACE = [kind for kind in KINDS if kind not in ("pissa", "olora", "adalora", "vera")]


def _model_of(kind, tiny_bert):
    if kind.startswith("conv1d"):
        return _gpt2()
    if kind == "conv2d":
        torch.manual_seed(0)
        model = Convolutions(transformers.PretrainedConfig(model_type="convolutions")).eval()
        with torch.no_grad():
            for layer in model.layers:
                layer.weight.mul_(torch.linspace(3, 0.5, layer.weight.shape[1])[None, :, None, None])
        return model
    return _bert(tiny_bert)


def _inputs(kind):
    generator = torch.Generator().manual_seed(3)
    if kind == "conv2d":
        return {"input_ids": torch.randn(2, 3, 6, 6, generator=generator)}
    return {"input_ids": torch.randint(3, 40, (2, 9), generator=generator)}


def _randomise(model, kind):
    """Trained-looking values: strong factors, other magnitudes, other biases, another head."""
    generator = torch.Generator().manual_seed(7)
    moves = {"lora_magnitude_vector": 0.3, "modules_to_save": 0.5, "vera_lambda_b": 3.0, "lora_B.default.bias": 0.5}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            move = next((size for part, size in moves.items() if part in name), None)
            noise = torch.randn(parameter.shape, generator=generator)
            if move is not None:
                parameter.add_(move * noise * (parameter.abs() if "magnitude" in name else 1))
            elif "lora_" in name:
                parameter.copy_(0.7 * noise if kind not in ("pissa", "olora") else parameter + 0.6 * noise)
            elif kind == "biases" and name.endswith("bias"):
                parameter.add_(0.1 * noise)


@pytest.fixture(scope="module")
def saved(tiny_bert, tmp_path_factory):
    """saved(kind) -> (base folder, adapter folder, call that loads the base, inputs); made once a kind."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            base = _model_of(kind, tiny_bert)
            base.save_pretrained(folder / "base")
            model = peft.get_peft_model(_model_of(kind, tiny_bert), KINDS[kind]()).eval()
            _randomise(model, kind)
            model.save_pretrained(folder / "adapter")
            made[kind] = (folder / "base", folder / "adapter", lambda: _model_of(kind, tiny_bert), _inputs(kind))
        return made[kind]

    return make


def _load(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pissa and olora warn that the base is edited when they are loaded
        return peft.PeftModel.from_pretrained(base, folder).eval()


def _logits(model, inputs):
    with torch.no_grad():
        out = model(**inputs)
    return getattr(out, "logits", out)


def _dense_edit(model, base, scale, which, epsilon=0.5):
    """The independent reference: merge the adapter, then edit every changed counted weight with numpy, in float64.

    Returns the plain model and the number of intruders before.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    before, total = dict(base.named_parameters()), 0
    for name, parameter in merged.named_parameters():
        embedding = "word_embeddings" in name
        if name not in before or parameter.ndim < 2 or torch.equal(parameter, before[name]):
            continue
        if not (embedding or any(part.isdigit() for part in name.split("."))):
            continue
        turned = embedding or isinstance(merged, transformers.GPT2LMHeadModel)
        W0, W = (_matrix(t, turned) for t in (before[name], parameter))
        U0, (U, S, Vh) = np.linalg.svd(W0, full_matrices=False)[0], np.linalg.svd(W, full_matrices=False)
        cosines = np.abs(U0.T @ U).max(0)
        chosen = [j for j in range(min(K, len(S))) if cosines[j] < epsilon]
        total += len(chosen)
        for j in chosen[:1] if which == "top" else chosen:
            W = W + (scale - 1) * S[j] * np.outer(U[:, j], Vh[j])
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(W.T if turned else W).reshape(parameter.shape))
    return merged, total


def _matrix(tensor, turned):
    array = tensor.detach().double().numpy()
    return array.T if turned else array.reshape(len(array), -1)


@pytest.mark.parametrize("which", ["top", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_written_adapter_computes_what_the_dense_edit_computes(saved, tmp_path, kind, which):
    """Plain PeftModel.from_pretrained on the base gives the logits of the edited dense model; the counts are right."""
    base, adapter, fresh, inputs = saved(kind)
    result = mitigate_adapter(base, adapter, 0.2, tmp_path / "out", which=which, k=K)
    reference, total = _dense_edit(_load(fresh(), adapter), fresh(), 0.2, which)
    original = _logits(_load(fresh(), adapter), inputs)
    expected, got = _logits(reference, inputs), _logits(_load(fresh(), tmp_path / "out"), inputs)
    assert result["total_before"] == total > 0 and result["matrices_edited"] > 0
    assert float((expected - original).abs().max()) > 2e-2 * float(
        expected.abs().max()
    )  # the edit is not a small matter
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))
    assert result["total_after"] == count_checkpoints(base, tmp_path / "out", k=K)["total"]


@pytest.mark.parametrize(("scale", "epsilon"), [(1.0, 0.5), (0.0, 1e-6)])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_do_copies_every_kind_byte_for_byte(saved, tmp_path, kind, scale, epsilon):
    """lambda = 1, and an epsilon that nothing is below: weights and configuration are the files that came in."""
    base, adapter, _, _ = saved(kind)
    mitigate_adapter(base, adapter, scale, tmp_path / "out", k=K, epsilon=epsilon, which="all")
    for path in adapter.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", ["head", "biases", "lora_bias", "dora", "patterns"])
def test_what_is_not_edited_is_carried_over_unchanged(saved, tmp_path, kind):
    """Heads, biases, factors of matrices without intruders, and with DoRA their magnitudes: bit for bit."""
    base, adapter, _, _ = saved(kind)
    result = mitigate_adapter(base, adapter, 0.0, tmp_path / "out", k=K, epsilon=0.3)
    edited = {fact["name"] for fact in result["matrices"] if fact["edited"]}
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    assert before.keys() == after.keys() and 0 < len(edited)
    changed = {
        name for name in before if before[name].shape != after[name].shape or not torch.equal(before[name], after[name])
    }
    assert changed and all(".lora_A." in name or ".lora_B.weight" in name or "magnitude" in name for name in changed)
    stems = {name.split("model.bert.")[1].split(".lora_")[0] for name in changed}
    assert stems == edited


def test_only_the_ranks_of_edited_matrices_grow(saved, tmp_path):
    """rank_pattern and alpha_pattern gain one exact entry an edited matrix, before those that were there."""
    base, adapter, _, _ = saved("patterns")
    result = mitigate_adapter(base, adapter, 0.0, tmp_path / "out", k=K, which="all")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    for fact in result["matrices"]:
        assert fact["rank_after"] == fact["rank_before"] + sum(map(len, fact["edited"]))
    grown = [fact for fact in result["matrices"] if fact["edited"]]
    assert len(config["rank_pattern"]) == len(grown) + 2 and list(config["rank_pattern"])[0].startswith("^")
    assert json.loads((tmp_path / "out" / "mitigation.json").read_text()) == result


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_keeping_the_rank_keeps_shapes_and_reports_what_is_lost(saved, tmp_path, kind):
    """--rank keep: every tensor keeps its shape; the discarded share is that of the dense matrices."""
    base, adapter, fresh, _ = saved(kind)
    exact = mitigate_adapter(base, adapter, 0.5, tmp_path / "exact", k=K, which="all")
    kept = mitigate_adapter(base, adapter, 0.5, tmp_path / "kept", k=K, which="all", rank="keep")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "kept"))
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    weights = [_load(fresh(), tmp_path / name).merge_and_unload().state_dict() for name in ("exact", "kept")]
    for mine, other in zip(kept["matrices"], exact["matrices"], strict=True):
        gap = torch.linalg.matrix_norm(
            weights[0][f"bert.{mine['name']}.weight"] - weights[1][f"bert.{mine['name']}.weight"]
        )
        assert other["discarded"] == 0 and mine["discarded"] == pytest.approx(
            float(gap) / mine["edit_norm"][0], rel=2e-2, abs=1e-5
        )
    assert max(fact["discarded"] for fact in kept["matrices"]) > 1e-4


def test_rounds_go_on_until_nothing_is_left(saved, tmp_path):
    """Removing the top intruder again and again: fewer are left than after one round, and the counts are recounts."""
    base, adapter, _, _ = saved("lora")
    once = mitigate_adapter(base, adapter, 0.0, tmp_path / "once", k=K)
    often = mitigate_adapter(base, adapter, 0.0, tmp_path / "often", k=K, rounds=12)
    assert often["total_after"] < once["total_after"] < once["total_before"]
    assert often["total_after"] == count_checkpoints(base, tmp_path / "often", k=K)["total"]
    assert all(fact["rounds"] == 12 or fact["after"] == 0 for fact in often["matrices"])


@pytest.mark.parametrize("control", ["neighbour", "norm-matched", "random"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_controls_move_the_weights_as_far_as_the_edit_does(saved, tmp_path, kind, control):
    """The distance from the tuned weights is that of the edit (neighbour: of its own sigma), and the result loads."""
    base, adapter, fresh, _ = saved(kind)
    result = mitigate_adapter(base, adapter, 0.9, tmp_path / "out", k=4, control=control)
    assert result["matrices_edited"] > 0
    before, after = (_load(fresh(), folder).merge_and_unload().state_dict() for folder in (adapter, tmp_path / "out"))
    for fact in result["matrices"]:
        name = f"bert.{fact['name']}.weight"
        moved = float(torch.linalg.matrix_norm(before[name].double() - after[name].double()))
        if not fact["edited"]:
            assert moved == 0
        elif control == "neighbour":
            assert 0 < moved < 3 * fact["edit_norm"][0]
        else:
            assert moved == pytest.approx(fact["edit_norm"][0], rel=1e-3)


def test_half_precision_factors_become_float32_where_edited(saved, tmp_path):
    """A bfloat16 adapter: edited factors are float32 and exact, the others stay bfloat16."""
    from safetensors.torch import save_file

    base, adapter, _, _ = saved("lora")
    half = tmp_path / "half"
    half.mkdir()
    tensors = {name: t.bfloat16() for name, t in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(tensors, half / "adapter_model.safetensors", {"format": "pt"})
    (half / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    result = mitigate_adapter(base, half, 0.0, tmp_path / "out", k=K, epsilon=0.3)
    edited = {fact["name"] for fact in result["matrices"] if fact["edited"]}
    for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        changed = any(f".{matrix}." in name for matrix in edited)
        assert tensor.dtype == (torch.float32 if changed else torch.bfloat16)


# -- a loaded model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_loaded_model_is_edited_in_place_saved_and_put_back(saved, tmp_path, kind):
    """The same logits as the written folder; saving and loading keeps them; undo gives the old logits bit for bit."""
    base, adapter, fresh, inputs = saved(kind)
    mitigate_adapter(base, adapter, 0.2, tmp_path / "out", which="all", k=K)
    expected = _logits(_load(fresh(), tmp_path / "out"), inputs)
    model = _load(fresh(), adapter)
    original, state = _logits(model, inputs), {name: t.clone() for name, t in model.state_dict().items()}
    done = mitigate_model(model, 0.2, which="all", k=K)
    assert done.result["total_before"] > 0
    torch.testing.assert_close(_logits(model, inputs), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        _logits(_load(fresh(), tmp_path / "again"), inputs), expected, rtol=0, atol=1e-4 * float(expected.abs().max())
    )
    done.undo()
    assert torch.equal(_logits(model, inputs), original)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    mitigate_model(model, 1.0)
    mitigate_model(model, 0.0, k=K, epsilon=1e-6)
    assert torch.equal(_logits(model, inputs), original)


@pytest.mark.parametrize(
    ("kind", "message"), [("pissa", "'pissa'"), ("olora", "'olora'"), ("adalora", "ADALORA"), ("vera", "VERA")]
)
def test_loaded_kinds_without_an_exact_edit_are_refused_by_name(saved, kind, message):
    """The frozen weights are not W0, or the type is another: say so, change nothing; lambda = 1 still works."""
    _, adapter, fresh, inputs = saved(kind)
    model = _load(fresh(), adapter)
    original = _logits(model, inputs)
    with pytest.raises(InputError, match=message):
        mitigate_model(model, 0.0, k=K)
    mitigate_model(model, 1.0)
    assert torch.equal(_logits(model, inputs), original)


def test_a_model_without_that_adapter_is_refused(saved, tiny_bert):
    """A plain model, an unknown name, a merged adapter."""
    _, adapter, fresh, _ = saved("lora")
    with pytest.raises(InputError, match="no adapter"):
        mitigate_model(tiny_bert(), 0.0)
    model = _load(fresh(), adapter)
    with pytest.raises(InputError, match="adapter='other'"):
        mitigate_model(model, 0.0, adapter="other")
    model.merge_adapter()
    with pytest.raises(InputError, match="unmerge_adapter"):
        mitigate_model(model, 0.0, k=K)


# -- what cannot be used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scale", "-0.5"], "scale=-0.5"),
        (["--scale", "nan"], "scale=nan"),
        (["--scale", "0", "--epsilon", "1.5"], "epsilon=1.5"),
        (["--scale", "0", "--k", "0"], "k=0"),
        (["--scale", "0", "--k", "99"], "k=99"),
        (["--scale", "0", "--rounds", "0"], "rounds=0"),
    ],
)
def test_what_is_out_of_range_is_refused_and_nothing_is_written(saved, tmp_path, capsys, flags, message):
    """One line, exit status 2, no folder."""
    base, adapter, _, _ = saved("lora")
    assert main(["mitigate", str(base), str(adapter), "--out", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("intruder: error: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_a_full_checkpoint_and_a_full_disk_are_refused(saved, tmp_path, capsys):
    """What is there is not touched, and what does not fit leaves nothing behind."""
    base, adapter, _, _ = saved("lora")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    command = ["mitigate", str(base), str(adapter), "--scale", "0", "--k", "4", "--out"]
    assert main([*command, str(tmp_path / "out")]) == 2 and "exists" in capsys.readouterr().err
    assert main(["mitigate", str(base), str(base), "--scale", "0", "--out", str(tmp_path / "x")]) == 2
    assert "wanted a PEFT adapter" in capsys.readouterr().err
    for room in (0, 4000):
        with full_disk(room):
            assert main([*command, str(tmp_path / "full")]) == 2
        assert "cannot write" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "out"]
    assert main([*command, str(tmp_path / "full")]) == 0 and "loads with PeftModel" in capsys.readouterr().out


def test_dora_on_an_embedding_is_refused_by_name(tiny_bert, tmp_path):
    """Its magnitudes scale tokens, so there is no exact edit: the error says which matrix; nothing is written."""
    model = tiny_bert(seed=1)
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, _lora(target_modules=["query", "word_embeddings"], use_dora=True))
    _randomise(adapted, "dora")
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="word_embeddings"):
        mitigate_adapter(tmp_path / "base", tmp_path / "adapter", 0.0, tmp_path / "out", k=K)
    assert not (tmp_path / "out").exists()
