"""The nano base model can be made again: the committed run's first steps come out of the same command."""

import json

import pytest
import torch

from intruder import InputError, pretrain
from intruder.cli import main
from intruder.models import load_tokenizer, nano_folder
from intruder.records import load_base_record


def test_a_short_run_reproduces_the_first_steps(tmp_path):
    """`intruder pretrain nano --stop-after 5` gives the first five losses of the committed record."""
    assert main(["pretrain", "nano", "--out", str(tmp_path / "again"), "--stop-after", "5"]) == 0
    again = json.loads((tmp_path / "again" / "record.json").read_text())
    expected = load_base_record()["first_losses"]
    assert again["first_losses"] == pytest.approx(expected[:5], abs=2e-3)
    assert not (tmp_path / "again" / "model.safetensors").exists() and again["status"] == "partial"


def test_the_committed_tokenizer_is_the_one_the_command_builds():
    """Same words, same ids."""
    assert pretrain.build_tokenizer().get_vocab() == load_tokenizer(str(nano_folder())).get_vocab()


def test_fifteen_per_cent_of_the_words_are_predicted():
    """80 % masked, 10 % replaced, 10 % kept; special tokens never; labels are the original words."""
    ids = torch.randint(5, 600, (200, 60), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = 0, 2
    inputs, labels = pretrain.mask(ids, 0.15, 655, torch.Generator().manual_seed(1))
    chosen = labels >= 0
    assert not chosen[:, 0].any() and not chosen[:, -1].any() and torch.equal(labels[chosen], ids[chosen])
    assert chosen.float().mean() == pytest.approx(0.15 * 58 / 60, abs=0.01)
    masked = (inputs == 4)[chosen].float().mean()
    kept = (inputs == ids)[chosen].float().mean()
    assert masked == pytest.approx(0.8, abs=0.03) and kept == pytest.approx(0.1, abs=0.03)
    assert torch.equal(inputs[~chosen], ids[~chosen])


def test_bad_settings_are_refused(tmp_path):
    """An unknown setting by name; a folder that already holds a model."""
    with pytest.raises(InputError, match="'layer' is unknown"):
        pretrain.pretrain(tmp_path, {"layer": 2})
    with pytest.raises(InputError, match="already holds a model"):
        pretrain.pretrain(nano_folder())
    with pytest.raises(SystemExit):
        main(["pretrain", "micro"])
    assert main(["pretrain", "nano", "--stop-after", "0", "--out", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()
