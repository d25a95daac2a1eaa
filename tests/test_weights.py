"""Pairs of weights: adapters merged as PEFT merges them, names matched, everything else refused by name."""

import json
import math

import numpy as np
import pytest
import torch

from intruder import InputError
from intruder.weights import checkpoint_pairs, is_counted, lora_scale, matrix_name, model_pairs, not_counted

MODULE = "bert.encoder.layer.0.output.dense"
NAME = "encoder.layer.0.output.dense"


def factors(seed: int = 0, out: int = 6, rank: int = 2, into: int = 4):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((out, rank)).astype("f4"), rng.standard_normal((rank, into)).astype("f4")


def matrix(seed: int = 9, shape=(6, 4)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def plain(tmp_path, save_tensors, save_adapter, extra=None, **config):
    """A one-matrix base and an adapter on it, without transformers or peft."""
    base = save_tensors(tmp_path / "base", {f"{NAME}.weight": matrix()})
    return base, save_adapter(tmp_path / "adapter", {MODULE: factors()}, extra, **config)


def product(seed: int = 0) -> np.ndarray:
    """B A, entry by entry in float64."""
    B, A = (f.astype("f8") for f in factors(seed))
    return np.array([[sum(B[i, r] * A[r, j] for r in range(A.shape[0])) for j in range(4)] for i in range(6)])


def merged_by_peft(wrapped) -> dict[str, torch.Tensor]:
    """The weights after PEFT's own merge, in float64."""
    return {matrix_name(k): v for k, v in wrapped.double().merge_and_unload().state_dict().items() if v.ndim == 2}


# How an adapter is merged ----------------------------------------------------------------------------------------


def test_the_update_of_an_adapter_is_alpha_over_r_times_B_A(tmp_path, save_tensors, save_adapter):
    """W = W0 + (alpha / r) B A; with r = 2 and alpha = 8 the factor is 4."""
    pair = next(checkpoint_pairs(*plain(tmp_path, save_tensors, save_adapter)))
    np.testing.assert_allclose(pair.update, 4 * product(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pair.tuned, matrix() + 4 * product(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(pair.pretrained, matrix())
    assert pair.name == NAME
    assert {pair.pretrained.dtype, pair.tuned.dtype, pair.update.dtype} == {torch.float32}


def test_rank_stabilised_lora_scales_by_the_root_of_the_rank(tmp_path, save_tensors, save_adapter):
    """With use_rslora the factor is alpha / sqrt(r)."""
    assert lora_scale(8, 4) == 2
    assert lora_scale(8, 4, rslora=True) == 4
    pair = next(checkpoint_pairs(*plain(tmp_path, save_tensors, save_adapter, use_rslora=True)))
    np.testing.assert_allclose(pair.update, 8 / math.sqrt(2) * product(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"query": 2, r"layer\.1\.output\.dense": 6}, "alpha_pattern": {"key": 5.0}},
        {"init_lora_weights": "gaussian", "bias": "lora_only"},
        {"target_modules": ["query", "value"], "modules_to_save": ["classifier", "pooler"]},
        {"init_lora_weights": False, "layers_to_transform": [1]},
    ],
)
def test_an_adapter_on_disk_merges_as_peft_merges_it(tmp_path, base_dir, tiny_bert, add_lora, config):
    """For every plain LoRA configuration the tuned matrices equal PEFT's own merge in float64."""
    wrapped = add_lora(tiny_bert(), **config)
    wrapped.save_pretrained(tmp_path)
    adapted = {matrix_name(n) for n, m in wrapped.named_modules() if getattr(m, "lora_A", None)}
    pairs = list(checkpoint_pairs(base_dir, tmp_path))
    in_memory = list(model_pairs(tiny_bert().state_dict(), wrapped))
    expected = merged_by_peft(wrapped)
    assert {pair.name for pair in pairs} == adapted
    assert [pair.name for pair in pairs] == [pair.name for pair in in_memory]
    for pair, other in zip(pairs, in_memory, strict=True):
        torch.testing.assert_close(pair.tuned.double(), expected[pair.name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.tuned, pair.tuned)
        torch.testing.assert_close(other.update, pair.update)


def test_weights_stored_transposed_are_turned(tmp_path, add_lora):
    """GPT-2 stores (in, out); with fan_in_fan_out the pair is (out, in) and its update is B A, as PEFT merges it."""
    import transformers

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 8}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    model.save_pretrained(tmp_path / "base")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = add_lora(model, target_modules=["c_attn", "attn.c_proj"], modules_to_save=None, fan_in_fan_out=True)
    wrapped.save_pretrained(tmp_path / "adapter")
    pairs = list(checkpoint_pairs(tmp_path / "base", tmp_path / "adapter"))
    in_memory = list(model_pairs(state, wrapped))
    expected = merged_by_peft(wrapped)
    assert [(pair.name, tuple(pair.tuned.shape)) for pair in pairs] == [
        ("h.0.attn.c_attn", (48, 16)),
        ("h.0.attn.c_proj", (16, 16)),
    ]
    for pair, other in zip(pairs, in_memory, strict=True):
        torch.testing.assert_close(pair.tuned.double(), expected[pair.name].T, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.tuned, pair.tuned)
    whole = {pair.name: pair for pair in checkpoint_pairs(tmp_path / "base", tmp_path / "base")}
    assert set(whole) == {f"h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    torch.testing.assert_close(whole["h.0.attn.c_attn"].tuned, pairs[0].pretrained)
    assert tuple(whole["h.0.mlp.c_proj"].tuned.shape) == (16, 64)


def test_a_half_precision_base_is_merged_in_float32(tmp_path, save_tensors, save_adapter):
    """A bfloat16 base and a float16 adapter are converted first: a small update is not rounded away."""
    W0 = torch.from_numpy(matrix()).bfloat16()
    base = save_tensors(tmp_path / "base", {f"{NAME}.weight": W0})
    B, A = (torch.from_numpy(f).half() for f in factors())
    adapter = save_adapter(tmp_path / "adapter", {MODULE: (B * 1e-3, A)})
    pair = next(checkpoint_pairs(base, adapter))
    exact = 4 * (B * 1e-3).double() @ A.double()
    assert pair.tuned.dtype == torch.float32
    torch.testing.assert_close(pair.tuned.double() - W0.double(), exact, rtol=1e-3, atol=1e-6)
    assert (W0 + exact.bfloat16() == W0).any()  # a merge in bfloat16 would have lost entries


# Which matrices, under which names -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor, name",
    [
        ("bert.encoder.layer.0.output.dense.weight", NAME),
        ("encoder.layer.0.output.dense.weight", NAME),
        ("base_model.model.bert.encoder.layer.0.output.dense.base_layer.weight", NAME),
        ("module.roberta.encoder.layer.0.output.dense.weight", NAME),
        ("_orig_mod.module.encoder.layer.0.output.dense", NAME),
        ("model.layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj"),
        ("distilbert.transformer.layer.1.ffn.lin1.weight", "transformer.layer.1.ffn.lin1"),
    ],
)
def test_wrappers_and_prefixes_are_taken_off(tensor, name):
    """The same matrix has one name, however the model that saved it was wrapped."""
    assert matrix_name(tensor) == name


def test_only_the_linear_layers_of_the_encoder_are_counted(base_dir, tuned_dir):
    """Six matrices a layer: no embedding, bias, LayerNorm, pooler or head; in the order of the layers."""
    kinds = ["attention.output.dense", "attention.self.key", "attention.self.query", "attention.self.value"]
    kinds += ["intermediate.dense", "output.dense"]
    names = [pair.name for pair in checkpoint_pairs(base_dir, tuned_dir)]
    assert names == [f"encoder.layer.{layer}.{kind}" for layer in range(2) for kind in kinds]
    for name in ("classifier.dense", "classifier.0", "pooler.dense", "embeddings.word_embeddings", "lm_head.dense"):
        assert not is_counted(name)


def test_a_bare_encoder_pairs_with_a_classifier_of_the_same_encoder(base_dir, tuned_dir, tiny_bert):
    """encoder.layer... of the base meets bert.encoder.layer... of the tuned model; only the moved matrix differs."""
    state = tiny_bert().state_dict()
    for pair in checkpoint_pairs(base_dir, tuned_dir):
        torch.testing.assert_close(pair.pretrained, state[f"bert.{pair.name}.weight"], rtol=0, atol=0)
        assert torch.equal(pair.pretrained, pair.tuned) == (pair.name != "encoder.layer.1.attention.self.query")
        assert pair.update is None


def test_a_sharded_checkpoint_reads_as_one_file(tmp_path, base_dir, tuned_dir, tiny_bert):
    """model.safetensors.index.json with several shards gives the same pairs."""
    tiny_bert().bert.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    whole, parts = list(checkpoint_pairs(base_dir, tuned_dir)), list(checkpoint_pairs(tmp_path, tuned_dir))
    for a, b in zip(whole, parts, strict=True):
        assert a.name == b.name
        assert torch.equal(a.pretrained, b.pretrained)
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(InputError, match="shard 'model-0"):
        checkpoint_pairs(tmp_path, tuned_dir)


def test_an_unknown_head_on_one_side_is_no_partner(tmp_path, save_tensors):
    """A head under a root of its own is passed over; a layer that only one side has is an error."""
    body = {f"{NAME}.weight": matrix()}
    base = save_tensors(tmp_path / "base", body)
    tuned = save_tensors(tmp_path / "tuned", body | {"my_head.0.weight": matrix()})
    assert [pair.name for pair in checkpoint_pairs(base, tuned)] == [NAME]
    deeper = save_tensors(tmp_path / "deeper", body | {"encoder.layer.1.output.dense.weight": matrix()})
    with pytest.raises(InputError, match=r"base has no tensor for the matrix encoder.layer.1.output.dense"):
        checkpoint_pairs(base, deeper)
    with pytest.raises(InputError, match=r"base has no tensor for the matrix encoder.layer.1.output.dense"):
        checkpoint_pairs(deeper, base)


def test_one_name_for_two_tensors_is_refused(tmp_path, save_tensors):
    """A checkpoint with encoder... and bert.encoder... is ambiguous, and both tensors are named."""
    both = {f"{NAME}.weight": matrix(), f"bert.{NAME}.weight": matrix()}
    base = save_tensors(tmp_path / "base", both)
    with pytest.raises(
        InputError, match=f"'{NAME}.weight'.*'bert.{NAME}.weight'|'bert.{NAME}.weight'.*'{NAME}.weight'"
    ):
        checkpoint_pairs(base, base)


def test_an_adapter_on_heads_only_has_nothing_to_count(tmp_path, save_tensors, save_adapter):
    """LoRA on the pooler alone adapts no counted matrix."""
    base = save_tensors(tmp_path / "base", {f"{NAME}.weight": matrix(), "pooler.dense.weight": matrix()})
    adapter = save_adapter(tmp_path / "adapter", {"bert.pooler.dense": factors()})
    with pytest.raises(InputError, match="no matrix to count"):
        checkpoint_pairs(base, adapter)


def test_modules_to_save_are_read_where_they_are_counted(tmp_path, save_tensors, save_adapter):
    """A tensor that the adapter stores whole is passed over if it is a head and a pair of its own if it is counted."""
    head = {"base_model.model.classifier.weight": matrix()}
    base, adapter = plain(tmp_path, save_tensors, save_adapter, extra=head)
    assert [pair.name for pair in checkpoint_pairs(base, adapter)] == [NAME]
    assert not_counted(base, adapter) == ["classifier"]
    other = "encoder.layer.1.output.dense"
    base = save_tensors(tmp_path / "two", {f"{NAME}.weight": matrix(), f"{other}.weight": matrix()})
    whole = {f"base_model.model.bert.{other}.weight": matrix(3)}
    adapter = save_adapter(tmp_path / "whole", {MODULE: factors()}, whole)
    pairs = {pair.name: pair for pair in checkpoint_pairs(base, adapter)}
    assert set(pairs) == {NAME, other}
    np.testing.assert_array_equal(pairs[other].tuned, matrix(3))
    assert pairs[other].update is None
    with pytest.raises(InputError, match=f"no tensor for {other}.*modules_to_save"):
        checkpoint_pairs(save_tensors(tmp_path / "one", {f"{NAME}.weight": matrix()}), adapter)


# What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, words",
    [
        ({"peft_type": "IA3"}, "type 'IA3'"),
        ({"peft_type": None}, "type None"),
        ({"peft_type": "ADALORA"}, "lora_A.weight.*type ADALORA"),
        ({"peft_type": "VERA"}, "lora_A.weight.*type VERA"),
        ({"use_dora": True}, "uses DoRA and has no '.*lora_magnitude_vector'"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "'corda'.*depends on data"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga'.*depends on data"),
        ({"init_lora_weights": "loftq"}, "'loftq'.*quantised"),
        ({"init_lora_weights": "brand_new"}, "'brand_new'.*not known"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"rank_pattern": {"(": 5}}, "no regular expression"),
        ({"rank_pattern": ["dense"]}, "rank_pattern"),
        ({"r": "2"}, "rank '2'"),
        ({"base_model_name_or_path": "../../etc/base"}, "climbs out of its folder"),
        ({"corda_config": {"cache_file": "x/../../y"}}, "corda_config.cache_file.*climbs out"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"something_new": {"x": 1}}, "something_new"),
        ({"r": 3}, "rank 3"),
        ({"rank_pattern": {r"output\.dense": 5}}, "rank 5"),
        ({"lora_alpha": "8"}, "lora_alpha '8'"),
        ({"lora_alpha": math.inf}, "lora_alpha inf.*number"),
        ({"rank_pattern": [4]}, r"pattern \[4\]"),
        ({"alpha_pattern": {"(": 4}}, r"'\('.*regular expression"),
        ({"fan_in_fan_out": True}, r"\(4, 6\).*\(6, 4\)"),
    ],
)
def test_other_adapters_are_refused_by_name(tmp_path, save_tensors, save_adapter, config, words):
    """Anything but plain LoRA, and a configuration that does not fit the factors, is an InputError that names it."""
    with pytest.raises(InputError, match=words):
        checkpoint_pairs(*plain(tmp_path, save_tensors, save_adapter, **config))


@pytest.mark.parametrize("ending", ["lora_magnitude_vector", "lora_B.bias", "lora_A.default.weight"])
def test_tensors_that_plain_lora_does_not_have_are_refused(tmp_path, save_tensors, save_adapter, ending):
    """A DoRA magnitude or a LoRA bias is refused also when the configuration is silent about it."""
    extra = {f"base_model.model.{MODULE}.{ending}": np.ones((2, 2), "f4")}
    with pytest.raises(InputError, match=ending.split(".")[0]):
        checkpoint_pairs(*plain(tmp_path, save_tensors, save_adapter, extra=extra))


def test_an_adapter_of_another_base_is_refused(tmp_path, save_tensors, save_adapter):
    """A module that the base does not have, another shape, and a missing factor are each named."""
    base = save_tensors(tmp_path / "base", {f"{NAME}.weight": matrix()})
    other = save_adapter(tmp_path / "a", {"bert.encoder.layer.7.output.dense": factors()})
    with pytest.raises(InputError, match="base has no tensor for encoder.layer.7.output.dense"):
        checkpoint_pairs(base, other)
    wide = save_adapter(tmp_path / "b", {MODULE: factors(into=5)})
    with pytest.raises(InputError, match=r"\(6, 4\).*\(6, 5\)"):
        checkpoint_pairs(base, wide)
    half = save_adapter(tmp_path / "c", {MODULE: factors()})
    save_tensors(half, {f"base_model.model.{MODULE}.lora_A.weight": factors()[1]}, "adapter_model.safetensors")
    with pytest.raises(InputError, match="lora_B.weight"):
        checkpoint_pairs(base, half)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_nan_in_a_checkpoint_is_named(tmp_path, save_tensors, value, side):
    """NaN or infinity is refused with the name of the tensor and of the file."""
    good, bad = matrix(), matrix()
    bad[2, 1] = value
    base = save_tensors(tmp_path / "base", {f"{NAME}.weight": bad if side == "base" else good})
    tuned = save_tensors(tmp_path / "tuned", {f"{MODULE}.weight": bad if side == "tuned" else good})
    with pytest.raises(InputError, match=rf"{NAME}.weight in .*{side}.model.safetensors holds NaN"):
        list(checkpoint_pairs(base, tuned))


def test_shapes_that_differ_are_named(tmp_path, save_tensors):
    """Two checkpoints with another width are refused before anything is read."""
    base = save_tensors(tmp_path / "base", {f"{NAME}.weight": matrix()})
    tuned = save_tensors(tmp_path / "tuned", {f"{NAME}.weight": matrix(shape=(6, 5))})
    with pytest.raises(InputError, match=rf"{NAME} has shape \(6, 4\).*\(6, 5\)"):
        checkpoint_pairs(base, tuned)


def test_a_quantised_weight_is_refused(tmp_path, save_tensors):
    """Integer weights are no weights to decompose."""
    base = save_tensors(tmp_path / "base", {f"{NAME}.weight": np.ones((6, 4), "u1")})
    with pytest.raises(InputError, match="uint8.*quantised"):
        list(checkpoint_pairs(base, base))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_a_pickle_is_refused_and_never_opened(tmp_path, base_dir, name):
    """A folder with a pickle instead of safetensors, or the pickle itself, is refused by its name."""
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    for tuned in (tmp_path, tmp_path / name):
        with pytest.raises(InputError, match=f"{name} is a pickle"):
            checkpoint_pairs(base_dir, tuned)
        with pytest.raises(InputError, match=f"{name} is a pickle"):
            checkpoint_pairs(tuned, base_dir)


def test_a_pickled_adapter_is_refused(tmp_path, base_dir):
    """adapter_model.bin beside adapter_config.json is refused by its name."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(InputError, match="no adapter_model.safetensors"):
        checkpoint_pairs(base_dir, tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="adapter_model.bin is a pickle"):
        checkpoint_pairs(base_dir, tmp_path)


def test_missing_and_broken_files_are_named(tmp_path, base_dir, adapter_dir):
    """A missing folder, an empty one, a broken file, and an adapter in the place of the base are refused."""
    with pytest.raises(InputError, match="no folder .*absent"):
        checkpoint_pairs(base_dir, tmp_path / "absent")
    with pytest.raises(InputError, match="no model.safetensors"):
        checkpoint_pairs(base_dir, tmp_path)
    with pytest.raises(InputError, match="is a PEFT adapter; wanted a full checkpoint"):
        checkpoint_pairs(adapter_dir, base_dir)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(InputError, match="model.safetensors cannot be read as safetensors"):
        checkpoint_pairs(base_dir, tmp_path)
    with pytest.raises(InputError, match="is a file; wanted the folder"):
        checkpoint_pairs(tmp_path / "model.safetensors", base_dir)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match="adapter_config.json holds no JSON object"):
        checkpoint_pairs(base_dir, tmp_path)


# Models in memory ------------------------------------------------------------------------------------------------


def test_a_model_in_memory_pairs_with_its_base(tiny_bert):
    """Without an adapter every counted matrix is paired with its own pre-trained value."""
    base, model = tiny_bert("Model"), tiny_bert()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight += 1
    pairs = {pair.name: pair for pair in model_pairs(base.state_dict(), model)}
    assert len(pairs) == 12
    for name, pair in pairs.items():
        assert torch.equal(pair.pretrained, base.state_dict()[f"{name}.weight"])
        assert torch.equal(pair.tuned, model.state_dict()[f"bert.{name}.weight"])


def test_an_adapter_in_memory_is_refused_where_it_cannot_be_read(tiny_bert, add_lora):
    """A merged adapter, a foreign base, a missing base and a model without layers are refused."""
    state = tiny_bert().state_dict()
    wrapped = add_lora(tiny_bert())
    with pytest.raises(InputError, match="differs from base_state"):
        list(model_pairs(tiny_bert(seed=1).state_dict(), wrapped))
    wrapped.merge_adapter()
    with pytest.raises(InputError, match="merged"):
        list(model_pairs(state, wrapped))
    with pytest.raises(InputError, match="base_state has no tensor for encoder.layer.0"):
        model_pairs({}, tiny_bert())
    with pytest.raises(InputError, match="no matrix to count"):
        model_pairs(state, torch.nn.Linear(2, 2))


def test_a_fresh_adapter_changes_nothing(tiny_bert):
    """With B = 0 every tuned matrix equals the pre-trained one."""
    import peft  # here, so that the tests of plain tensors run without it

    model = tiny_bert()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"]))
    pairs = list(model_pairs(state, wrapped))
    assert len(pairs) == 2
    assert all(torch.equal(pair.pretrained, pair.tuned) for pair in pairs)
