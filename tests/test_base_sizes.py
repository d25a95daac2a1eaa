"""The alternatives to the nano base: made from a file, judged by loss, heads and spectra, one record each."""

import json

import pytest

from intruder import InputError, base_sizes
from intruder.cli import main
from intruder.pretrain import NANO
from intruder.records import load_base_record, load_base_sizes
from intruder.tables import size_table
from intruder.tasks import TASKS

TINY = {"sizes": [{"layers": 1, "hidden_size": 32, "intermediate_size": 64}], "pretrain": {"steps": 12, "batch_size": 8},
        "head": {"method": "head", "learning_rate": 3e-3, "steps": 2, "train_size": 32, "validation_size": 20,
                 "evaluations": 1, "stage": "tuning"}, "tasks": ["nli"]}


def test_a_size_is_made_once_and_judged(tmp_path, monkeypatch):
    """A record for the size and one for the committed base; a second call makes nothing."""
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(TINY))
    assert main(["pretrain", "nano", "--sizes", str(plan), "--out", str(tmp_path / "out")]) == 0
    small, base = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("1x32", "nano"))
    assert small["parameters"] < base["parameters"] and small["held_out_loss"] > base["held_out_loss"]
    assert set(small["head_accuracy"]) == {"nli"} and len(small["spectral_head"]) == 6
    assert not list((tmp_path / "out").rglob("*.safetensors")) and small["provenance"]["commit"]
    monkeypatch.setattr(base_sizes, "pretrain", None)
    assert base_sizes.compare_sizes(plan, tmp_path / "out", say=lambda line: None) == [small, base]


def test_a_bad_plan_makes_nothing(tmp_path, capsys):
    """Missing part, unknown part, wrong head, both modes: one error, exit 2, no folder."""
    plan = tmp_path / "plan.json"
    for change, message in (({"tasks": None}, "wanted sizes"), ({"more": 1}, "wanted sizes"),
                            ({"head": {"method": "lora"}}, "rank is missing"),
                            ({"sizes": [2]}, "wanted a list of objects"), ({"tasks": "nli"}, "wanted a list of tasks"),
                            ({"sizes": [{"layer": 2}]}, "'layer' is unknown"),
                            ({"sizes": [{}, {"layers": NANO["layers"]}]}, "two sizes are 4x128")):
        broken = {key: value for key, value in (TINY | change).items() if value is not None}
        plan.write_text(json.dumps(broken))
        assert main(["pretrain", "nano", "--sizes", str(plan), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert main(["pretrain", "nano", "--sizes", str(plan), "--stop-after", "3", "--out", str(tmp_path / "out")]) == 2
    with pytest.raises(InputError, match="no configuration file"):
        base_sizes.compare_sizes(tmp_path / "none.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_committed_alternatives_stand_beside_the_base():
    """Several sizes under one schedule, and the base itself, judged by the same six heads; the base's record is its own."""
    sizes = load_base_sizes()
    *others, base = sizes
    assert base["name"] == "nano" and base["settings"] == NANO and len(others) >= 4
    assert base["held_out_loss"] == load_base_record()["curve"][-1]["held_out_loss"]
    assert len({(s["settings"]["layers"], s["settings"]["hidden_size"]) for s in others}) == len(others)
    for record in sizes:
        assert set(record["head_accuracy"]) == set(TASKS) and not record["provenance"]["dirty"]
        assert len(record["spectral_head"]) == 6 * record["settings"]["layers"]
    assert len({json.dumps(s["settings"] | dict.fromkeys(("layers", "hidden_size", "intermediate_size")))
                for s in others}) == 1
    assert list(size_table(sizes)["parameters"]) == [f"{record['parameters']:,}" for record in sizes]
