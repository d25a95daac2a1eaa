"""Loading and adapting: nothing fresh where something pre-trained is needed, and W = W0 + (alpha/r) B A throughout."""

import hashlib
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from intruder import InputError, pretrain
from intruder.models import (ADAPTED, adapt, adapted_names, encoder_state, load_classifier, load_masked_lm,
                             load_tokenizer, nano_folder, reattach_lm_head)
from intruder.records import load_base_record
from intruder.weights import model_pairs


def _ids(tokenizer):
    return torch.tensor([tokenizer("mary bought a dog .", "so mary bought an animal .")["input_ids"]])


def test_the_committed_nano_weights_are_those_of_the_record():
    """The weights' hash is in the record, the file is under 8 MB; the record names commit, versions and settings."""
    record = load_base_record()
    weights = (nano_folder() / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == record["sha256"] and len(weights) < 8_000_000
    assert record["status"] == "complete" and record["settings"] == pretrain.NANO
    assert {"commit", "versions", "device", "started", "wall_seconds"} <= set(record["provenance"])


def test_the_nano_base_has_learnt_the_language():
    """Its held-out loss, measured again, is the one in the record, and far below that of guessing among the words."""
    record = load_base_record()
    tokenizer, model = load_tokenizer(str(nano_folder())), load_masked_lm(str(nano_folder()))
    loss = pretrain.held_out_loss(model, tokenizer, record["settings"])
    assert loss == pytest.approx(record["curve"][-1]["held_out_loss"], abs=1e-3) and loss < 1.0


def test_lora_at_initialisation_changes_no_logit(tiny_nano):
    """B = 0, so the adapted model is the base model."""
    tokenizer = load_tokenizer(str(tiny_nano))
    before = load_classifier(str(tiny_nano), 3, 0.0, 0).eval()(input_ids=_ids(tokenizer)).logits
    model = adapt(load_classifier(str(tiny_nano), 3, 0.0, 0), "lora", 4, 8.0).eval()
    assert torch.equal(before, model(input_ids=_ids(tokenizer)).logits)


def test_the_head_depends_on_the_seed_alone(tiny_nano):
    """Every method starts from the same head under one seed, and from another under another."""
    heads = [load_classifier(str(tiny_nano), 3, 0.0, seed).classifier.dense.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_twelve_matrices_in_two_layers_are_adapted(tiny_nano):
    """q, k, v, attention output, FFN in and out of each layer; no head, no embedding, no LM head."""
    names = adapted_names(load_classifier(str(tiny_nano), 3, 0.0, 0))
    assert len(names) == 12 and not any("classifier" in n or "embeddings" in n for n in names)
    assert "(?:attention" in ADAPTED


def _trained(base, method, **more):
    model = adapt(load_classifier(str(base), 3, 0.0, 0), method, **more)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(("method", "more"), [("full", {}), ("lora", {"rank": 4, "alpha": 12.0}),
                                              ("lora", {"rank": 4, "alpha": 12.0, "norms_and_biases": True})])
def test_the_reattached_encoder_is_the_tuned_one(tiny_nano, method, more):
    """Hidden states of the masked LM with the tuned encoder equal those of the tuned classifier; the head is intact."""
    tokenizer = load_tokenizer(str(tiny_nano))
    model, masked_lm = _trained(tiny_nano, method, **more), load_masked_lm(str(tiny_nano))
    head = {k: v.clone() for k, v in masked_lm.state_dict().items() if k.startswith("lm_head")}
    tuned = reattach_lm_head(masked_lm, model)
    with torch.no_grad():
        wanted, got, untouched = (m(input_ids=_ids(tokenizer), output_hidden_states=True).hidden_states[-1]
                                  for m in (model, tuned, load_masked_lm(str(tiny_nano))))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert (got - untouched).abs().max() > 0.05
    assert all(torch.equal(tuned.state_dict()[k], v) for k, v in head.items())


def test_measured_pairs_and_the_reattached_encoder_agree(tiny_nano):
    """The matrix whose spectrum is recorded is the matrix whose pseudo-loss is measured."""
    base = load_classifier(str(tiny_nano), 3, 0.0, 0)
    state = {k: v.clone() for k, v in base.state_dict().items()}
    model = _trained(tiny_nano, "lora", rank=4, alpha=12.0)
    merged = encoder_state(model)
    pairs = list(model_pairs(state, model))
    assert len(pairs) == 12
    for pair in pairs:
        torch.testing.assert_close(merged[f"roberta.{pair.name}.weight"], pair.tuned)
        assert (pair.tuned - pair.pretrained).abs().max() > 0.01


def test_a_base_without_lm_head_is_refused_for_pseudo_loss(base_dir, tmp_path):
    """A fresh LM head would measure nothing."""
    with pytest.raises(InputError, match="ships no masked-LM head"):
        load_masked_lm(str(base_dir))


def test_a_missing_model_says_what_was_wanted(tmp_path):
    """Neither a folder nor, without a network, a hub id."""
    with pytest.raises(InputError, match="cannot load 'nobody/nothing'.*config.json"):
        load_tokenizer("nobody/nothing")


def test_a_pickled_checkpoint_is_never_loaded(tiny_nano, tmp_path):
    """A folder with pytorch_model.bin alone is refused: only safetensors are read."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_nano / "config.json").read_text())
    torch.save(load_masked_lm(str(tiny_nano)).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        load_classifier(str(folder), 3, 0.0, 0)


def _spoilt(base, folder, spoil=None):
    """A copy of the model folder `base` whose tensors went through `spoil`."""
    shutil.copytree(base, folder)
    if spoil:
        tensors = load_file(folder / "model.safetensors")
        spoil(tensors, next(name for name in tensors if name.endswith("layer.0.attention.self.query.weight")))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda tensors, name: tensors.pop(name), "holds no weights for .*query.weight"),
    (lambda tensors, name: tensors[name].fill_(float("nan")), "query.weight in .* holds NaN"),
    (lambda tensors, name: tensors.update({name: torch.zeros(3, 32)}), "disagree about the shape"),
])
def test_a_spoilt_base_is_refused(tiny_nano, tmp_path, spoil, message):
    """A weight of the encoder that is missing would be drawn at random; NaN or another shape is no weight either."""
    with pytest.raises(InputError, match=message):
        load_classifier(str(_spoilt(tiny_nano, tmp_path / "spoilt", spoil)), 3, 0.0, 0)


def test_a_truncated_base_and_a_lost_tokenizer_are_refused(tiny_nano, tmp_path):
    """Half a file is no checkpoint, and an empty tokenizer would read every text as nothing."""
    folder = _spoilt(tiny_nano, tmp_path / "half")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot load .*half"):
        load_classifier(str(folder), 3, 0.0, 0)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(str(folder))


def test_an_architecture_without_the_named_layers_is_refused():
    """DistilBERT calls its layers otherwise: nothing would be adapted."""
    sizes = {"vocab_size": 40, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 24}
    model = transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**sizes))
    for method in ("full", "lora"):
        with pytest.raises(InputError, match="DistilBertForSequenceClassification has no encoder.layer"):
            adapt(model, method, 2, 4.0)


def test_the_tokenizer_joins_pairs_as_roberta_does():
    """<s> a </s></s> b </s>, one token a word."""
    tokenizer = load_tokenizer(str(nano_folder()))
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("mary bought a dog .", "a dog .")["input_ids"])
    assert tokens == ["<s>", "mary", "bought", "a", "dog", ".", "</s>", "</s>", "a", "dog", ".", "</s>"]
    assert json.loads((nano_folder() / "config.json").read_text())["vocab_size"] == len(tokenizer)
