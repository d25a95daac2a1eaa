"""Every kind of adapter against what PEFT itself merges, and the checkpoints that hold them: hub, shards, experts."""

import contextlib
import json
import shutil
import warnings
import weakref

import numpy as np
import pytest
import safetensors.torch
import torch
from adapter_kinds import KINDS, base_model, base_state, build, matrix, merged

from intruder import InputError
from intruder.adapters import open_adapter
from intruder.changes import lora_update
from intruder.checkpoints import open_checkpoint
from intruder.experts import restack
from intruder.spectrum import LowRank
from intruder.weights import checkpoint_pairs, model_pairs, pair_sources

LOW_RANK = {name for name in KINDS if "DoRA" not in name}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """make(name) -> the case of one kind, built once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = build(name, tmp_path_factory.mktemp("kind"))
        return made[name]

    return make


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_reads_as_peft_merges_it(case, name):
    """W0 is the base's own weight, and W is PEFT's merged weight, in float32, for every matrix the adapter changes."""
    made = case(name)
    before, after = base_state(made), merged(made)
    pairs = {pair.name: pair for pair in checkpoint_pairs(made.base, made.adapter)}
    assert pairs
    for key, pair in pairs.items():
        model = KINDS[name].model
        torch.testing.assert_close(pair.pretrained, matrix(key, before, model).float(), rtol=0, atol=0)
        torch.testing.assert_close(pair.tuned, matrix(key, after, model), rtol=2e-5, atol=2e-5)
        assert (pair.tuned - pair.pretrained).abs().max() > 1e-2
    # Nothing that changed is left out: every other matrix of a numbered layer is equal before and after.
    for key in before:
        bare = key.removesuffix(".weight")
        for prefix in ("model.", "transformer.", "bert.", "roberta."):
            bare = bare.removeprefix(prefix)
        numbered = any(part.isdigit() for part in bare.split(".")) and before[key].ndim >= 2 and "bias" not in bare
        if numbered and bare not in pairs and "experts" not in bare:
            assert torch.equal(before[key], after[key]), key


@pytest.mark.parametrize("name", KINDS)
def test_a_change_is_low_rank_where_it_can_be(case, name):
    """load_change gives factors with pretrained + s B A = tuned, of the rank that the source says; DoRA gives tuned."""
    made = case(name)
    for source in pair_sources(made.base, made.adapter):
        change, pair = source.load_change(), source.load()
        assert tuple(change.pretrained.shape) == source.shape
        assert (change.factors is None) == (change.tuned is not None)
        if name in LOW_RANK:
            assert change.factors.A.shape[0] == change.factors.B.shape[1] <= source.rank
            torch.testing.assert_close(pair.tuned, change.pretrained + lora_update(*change.factors))
        else:
            assert source.rank is None


@pytest.mark.parametrize("name", [name for name in KINDS if "experts" not in name and "expert" not in name])
def test_a_model_in_memory_reads_as_its_files_do(case, name):
    """model_pairs on the trained PEFT model gives the pairs that its saved files give."""
    made = case(name)
    files = {pair.name: pair for pair in checkpoint_pairs(made.base, made.adapter)}
    memory = {pair.name: pair for pair in model_pairs(made.load().state_dict(), made.trained)}
    assert set(files) == set(memory)
    for key, pair in memory.items():
        torch.testing.assert_close(pair.pretrained, files[key].pretrained, rtol=0, atol=0)
        torch.testing.assert_close(pair.tuned, files[key].tuned, rtol=2e-5, atol=2e-5)


# Where the weights come from, and what is refused -----------------------------------------------------------------


def test_a_fully_pruned_module_has_no_update(tmp_path, save_tensors):
    """AdaLoRA that pruned every rank of a module leaves factors without rows: the update is zero, not an error."""
    name = "encoder.layer.0.output.dense"
    base = save_tensors(tmp_path / "base", {f"{name}.weight": torch.randn(6, 4)})
    shapes = {"lora_A": (0, 4), "lora_B": (6, 0), "lora_E": (0, 1)}
    tensors = {f"base_model.model.{name}.{part}": torch.zeros(shape) for part, shape in shapes.items()}
    adapter = save_tensors(tmp_path / "adapter", tensors, "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "ADALORA", "init_r": 2, "lora_alpha": 8}))
    (pair,) = checkpoint_pairs(base, adapter)
    assert torch.equal(pair.pretrained, pair.tuned)


def test_pissa_recovers_the_true_weight_not_the_residual(case):
    """The W0 of a PiSSA adapter is the base's weight; PEFT's frozen layer holds a residual that differs from it."""
    made = case("PiSSA")
    residual = made.trained.base_model.model.bert.encoder.layer[0].output.dense.base_layer.weight
    pair = next(p for p in checkpoint_pairs(made.base, made.adapter) if p.name == "encoder.layer.0.output.dense")
    assert (pair.pretrained - residual).abs().max() > 0.1
    s, k = torch.linalg.svdvals(residual), torch.linalg.svdvals(pair.pretrained)
    assert s[0] < k[4] * 1.01  # the four leading values are gone from the residual


def test_pissa_that_peft_converted_is_plain_lora(tmp_path, base_dir, tiny_bert):
    """Saved with path_initial_model_for_weight_conversion, PiSSA is LoRA of twice the rank on the true base."""
    wrapped = add_plain(tiny_bert(), init_lora_weights="pissa")
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    merged_state = wrapped.merge_and_unload().state_dict()
    sources = pair_sources(base_dir, tmp_path / "lora")
    assert {(source.kind, source.rank) for source in sources} == {("lora", 8)}
    for source in sources:
        tuned = merged_state[f"bert.{source.name}.weight"]
        torch.testing.assert_close(source.load().tuned, tuned, rtol=2e-5, atol=2e-5)


def add_plain(model, **config):
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=12, target_modules=["query"], **config))


def test_an_embedding_is_counted_where_an_adapter_adapts_it_and_nowhere_else(case, tmp_path):
    """LoRA on the tied embedding gives one pair (width, tokens); a full fine-tune and the tied head give none."""
    made = case("embedding")
    names = [source.name for source in pair_sources(made.base, made.adapter)]
    assert names.count("embed_tokens") == 1
    assert next(s.shape for s in pair_sources(made.base, made.adapter) if s.name == "embed_tokens") == (32, 40)
    assert "embed_tokens" not in [source.name for source in pair_sources(made.base, made.base)]


def test_one_tensor_under_two_adapted_names_is_refused(tmp_path, save_tensors):
    """Two updates of one tied embedding are ambiguous, and both names are given."""
    base = save_tensors(tmp_path / "base", {"model.shared.weight": torch.randn(8, 4)})
    tensors = {}
    for side in ("encoder", "decoder"):
        tensors[f"base_model.model.{side}.embed_tokens.lora_embedding_A"] = torch.randn(2, 8)
        tensors[f"base_model.model.{side}.embed_tokens.lora_embedding_B"] = torch.randn(4, 2)
    adapter = save_tensors(tmp_path / "adapter", tensors, "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    with pytest.raises(InputError, match="both .*decoder.embed_tokens' and .*encoder.embed_tokens'"):
        pair_sources(base, adapter)


def test_tied_weights_of_a_model_in_memory_are_counted_once():
    """A linear layer that two numbered layers share is one matrix."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert [pair.name for pair in model_pairs(state, model)] == ["0"]


def test_a_bitsandbytes_base_is_refused_unless_the_full_one_is_given(case, tmp_path, save_tensors):
    """Packed four-bit weights are refused with the way out; the adapter is read against the full-precision base."""
    made = case("linear")
    packed = {}
    for name, tensor in base_state(made).items():
        packed[name] = tensor
        if name.endswith("query.weight"):
            packed[name] = torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8)
            packed[f"{name}.absmax"] = torch.ones(tensor.numel() // 64)
            packed[f"{name}.quant_map"] = torch.ones(16)
            packed[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(10, dtype=torch.uint8)
    quantised = save_tensors(tmp_path / "base", packed)
    for tuned in (made.adapter, quantised, made.base):
        with pytest.raises(InputError, match="quantised weight .*absmax.*full-precision model .* as BASE"):
            pair_sources(quantised, tuned)
    assert pair_sources(made.base, made.adapter)


@pytest.mark.parametrize("ending", ["mlp.gate_proj.qweight", "mlp.experts.down_proj_blocks", "q_proj.weight_scale_inv"])
def test_other_quantised_bases_are_refused(tmp_path, save_tensors, ending):
    """GPTQ, mxfp4 and float8 are recognised by the tensors beside the weight."""
    base = save_tensors(tmp_path, {f"model.layers.0.{ending}": torch.zeros(4, 4, dtype=torch.uint8)})
    with pytest.raises(InputError, match="quantised weight"):
        pair_sources(base, base)


@pytest.mark.parametrize("cut", [4, 100, -5])
def test_a_truncated_shard_is_one_clear_error(case, tmp_path, cut):
    """A shard that was cut off anywhere is refused by its name before anything is read."""
    base_model("bert").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(InputError, match=f"{shard.name} cannot be read as safetensors"):
        pair_sources(tmp_path, case("linear").adapter)


def test_nan_in_an_adapter_is_named(case, tmp_path):
    """NaN in a factor names the tensor and the file, when that matrix is read."""
    made = case("linear")
    shutil.copytree(made.adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    next(value for name, value in tensors.items() if "query.lora_A" in name)[0, 0] = float("nan")
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(InputError, match=r"query.lora_A.weight in .*adapter_model.safetensors holds NaN"):
        list(checkpoint_pairs(made.base, tmp_path / "adapter"))


def test_an_adapter_of_another_architecture_is_refused(case):
    """A GPT-2 adapter on a BERT base names the first module that the base does not have."""
    with pytest.raises(InputError, match="no tensor for h.0.attn.c_attn.*wanted the base"):
        pair_sources(case("linear").base, case("Conv1D").adapter)
    with pytest.raises(InputError, match="do not fit the expert tensors"):
        pair_sources(case("linear").base, case("stacked experts").adapter)


def test_a_grouped_convolution_is_refused(tmp_path, save_tensors):
    """The factors of a grouped convolution do not multiply to its weight; the shapes say so."""
    base = save_tensors(tmp_path / "base", {"blocks.0.weight": torch.randn(8, 2, 3, 3)})
    module = "base_model.model.blocks.0"
    tensors = {f"{module}.lora_A.weight": torch.randn(2, 4, 3, 3), f"{module}.lora_B.weight": torch.randn(8, 2, 1, 1)}
    adapter = save_tensors(tmp_path / "adapter", tensors, "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    with pytest.raises(InputError, match=r"\(8, 18\).*\(8, 36\).*grouped convolutions"):
        pair_sources(base, adapter)


def test_full_checkpoints_of_experts_are_counted_expert_by_expert(case):
    """Stacked experts of a full checkpoint: one pair an expert, (out, in), the same as an adapter on them gives."""
    made = case("stacked experts")
    full = {source.name: source for source in pair_sources(made.base, made.base)}
    assert "layers.0.self_attn.q_proj" in full
    for source in pair_sources(made.base, made.adapter):
        assert full[source.name].shape == source.shape
        assert torch.equal(full[source.name].load().pretrained, source.load().pretrained)


def test_pairs_are_read_one_at_a_time(case):
    """No matrix stays in memory once the next one is read."""
    alive = []
    for pair in checkpoint_pairs(case("linear").base, case("linear").adapter):
        assert all(reference() is None for reference in alive)
        alive = [weakref.ref(tensor) for tensor in pair if isinstance(tensor, torch.Tensor)]
        del pair


STRANGE = [None, "x", -1, True, ["a"], {"(": "b"}, 10**400]


@pytest.mark.parametrize("name", ["stacked experts", "VeRA, projections drawn"])
def test_a_strange_value_in_the_configuration_is_read_or_refused(case, tmp_path, name):
    """Whatever a field of adapter_config.json holds, the adapter is read or refused with an InputError."""
    made = case(name)
    shutil.copytree(made.adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    for field in sorted({*config, "use_dora", "target_parameters", "rank_pattern", "projection_prng_key"}):
        for value in STRANGE:
            path.write_text(json.dumps(config | {field: value}))
            try:
                pair_sources(made.base, tmp_path / "adapter")[0].load()
            except InputError as error:
                assert len(str(error)) > 20


@pytest.mark.parametrize("side", ["base", "adapter"])
def test_a_damaged_header_is_read_or_refused(case, tmp_path, side):
    """Bytes changed at random in the header of a safetensors file end in an InputError, or in nothing."""
    made = case("linear")
    folders = {"base": made.base, "adapter": made.adapter}
    shutil.copytree(folders[side], tmp_path / side)
    path = next((tmp_path / side).glob("*.safetensors"))
    folders[side], whole, random = tmp_path / side, path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in random.integers(0, 3000, size=3):
            damaged[place] = random.integers(256)
        path.write_bytes(bytes(damaged))
        with contextlib.suppress(InputError):
            pair_sources(folders["base"], folders["adapter"])[0].load()


def test_new_factors_of_stacked_experts_keep_every_expert(case):
    """Growing one expert of one parameter changes that expert alone; the others are filled with zeros."""
    made = case("stacked experts")
    base, adapter = open_checkpoint(made.base), open_adapter(made.adapter)
    sources = {source.name: source for source in pair_sources(made.base, made.adapter)}
    name = "layers.0.mlp.experts.down_proj.1"
    B, A, scale = sources[name].load_change().factors
    grown = LowRank(torch.cat([B, torch.ones(32, 1)], 1), torch.cat([A, torch.ones(1, A.shape[1])]), scale)
    (new,) = restack(base, adapter, {name: grown})
    assert (new.rank, new.parameter) == (5, "model.layers.0.mlp.experts.down_proj")
    whole = adapter.targets[new.module]
    assert new.A.shape == (3 * 5, whole.columns)
    assert new.B.shape == (whole.rows, 3 * 5)
    for expert in range(3):
        update = scale * new.B[:, expert::3] @ new.A[5 * expert : 5 * expert + 5]
        old = sources[f"layers.0.mlp.experts.down_proj.{expert}"].load().update
        added = scale * torch.ones_like(old) if expert == 1 else torch.zeros_like(old)
        torch.testing.assert_close(update, old + added, rtol=1e-5, atol=1e-5)
