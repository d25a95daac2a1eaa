"""Counting two checkpoints on disk: the numbers, the table, and one clear error for what cannot be counted."""

import json

import numpy as np
import pytest

from intruder import InputError
from intruder.count import count_checkpoints, format_table
from intruder.synthetic import planted_intruders

QUERY, OUTPUT = "encoder.layer.0.attention.self.query", "encoder.layer.0.output.dense"


def planted_checkpoints(tmp_path, save_tensors):
    """Two matrices with 1 and 2 planted intruders; the tuned side is wrapped in `bert.`."""
    query, output = planted_intruders((48, 48), 1, seed=1), planted_intruders((40, 60), 2, seed=2)
    tensors = [{QUERY: query[side].astype("f4"), OUTPUT: output[side].astype("f4")} for side in (0, 1)]
    base = save_tensors(tmp_path / "base", {f"{name}.weight": value for name, value in tensors[0].items()})
    tuned = save_tensors(tmp_path / "tuned", {f"bert.{name}.weight": value for name, value in tensors[1].items()})
    return base, tuned


def save_pair(tmp_path, save_tensors, W0, W):
    return (
        save_tensors(tmp_path / "base", {f"{QUERY}.weight": W0.astype("f4")}),
        save_tensors(tmp_path / "tuned", {f"{QUERY}.weight": W.astype("f4")}),
    )


def test_planted_intruders_are_counted_matrix_by_matrix(tmp_path, save_tensors):
    """1 and 2 planted intruders are counted as such, with name, shape and k matches, and their sum is the total."""
    result = count_checkpoints(*planted_checkpoints(tmp_path, save_tensors), k=5, epsilon=0.3)
    assert (result["total"], result["k"], result["epsilon"]) == (3, 5, 0.3)
    assert [(m["name"], m["shape"], m["count"]) for m in result["matrices"]] == [
        (QUERY, [48, 48], 1),
        (OUTPUT, [40, 60], 2),
    ]
    assert all(len(m["max_cosine"]) == 5 for m in result["matrices"])
    json.dumps(result, allow_nan=False)


def test_the_matches_are_those_of_the_left_vectors(tmp_path, save_tensors):
    """On a rectangular matrix the matches are numpy's for U, over all pre-trained vectors, not those for V."""
    rng = np.random.default_rng(3)
    W0, W = rng.standard_normal((20, 30)), rng.standard_normal((20, 30))
    result = count_checkpoints(*save_pair(tmp_path, save_tensors, W0, W), k=6)
    sides = []
    for first, second in ((W0, W), (W0.T, W.T)):
        X = np.linalg.svd(first.astype("f4").astype("f8"), full_matrices=False)[0]
        Y = np.linalg.svd(second.astype("f4").astype("f8"), full_matrices=False)[0]
        sides.append(np.abs(X.T @ Y[:, :6]).max(axis=0))
    np.testing.assert_allclose(result["matrices"][0]["max_cosine"], sides[0], atol=1e-6)
    assert np.abs(sides[0] - sides[1]).max() > 0.01


def test_a_vector_aligned_with_a_mid_spectrum_one_is_not_counted(tmp_path, save_tensors):
    """x_20 lifted to the top is not an intruder, though it matches none of the k leading pre-trained vectors."""
    rng = np.random.default_rng(4)
    U, V = (np.linalg.qr(rng.standard_normal((32, 32)))[0] for _ in range(2))
    W0 = (U * np.linspace(5, 1, 32)) @ V.T
    W = W0 + 50 * np.outer(U[:, 19], V[:, 19])
    assert count_checkpoints(*save_pair(tmp_path, save_tensors, W0, W), k=10)["total"] == 0


def test_a_checkpoint_has_no_intruder_against_itself(base_dir):
    """The same checkpoint twice gives 0 in every matrix and matches of 1."""
    result = count_checkpoints(base_dir, base_dir, epsilon=0.999)
    assert result["total"] == 0
    assert len(result["matrices"]) == 12
    assert min(min(m["max_cosine"]) for m in result["matrices"]) > 1 - 1e-9


def test_only_the_matrix_that_moved_is_counted(base_dir, tuned_dir):
    """A bare base against a tuned classifier: the one matrix with a strong new direction has the only intruders."""
    result = count_checkpoints(base_dir, tuned_dir)
    assert {m["name"] for m in result["matrices"] if m["count"]} == {"encoder.layer.1.attention.self.query"}


def test_an_adapter_counts_as_its_merged_model_does(tmp_path, base_dir, adapter_dir, tiny_bert, add_lora):
    """base + PEFT adapter gives the counts and matches of the model that PEFT merged and saved."""
    add_lora(tiny_bert()).merge_and_unload().save_pretrained(tmp_path)
    adapter, merged = count_checkpoints(base_dir, adapter_dir), count_checkpoints(base_dir, tmp_path)
    assert adapter["total"] == merged["total"] > 0
    for a, b in zip(adapter["matrices"], merged["matrices"], strict=True):
        assert (a["name"], a["count"]) == (b["name"], b["count"])
        np.testing.assert_allclose(a["max_cosine"], b["max_cosine"], atol=1e-4)


def test_the_table_shows_every_matrix_and_the_total(tmp_path, save_tensors):
    """One line per matrix with its shape and count, the total last, columns aligned."""
    text = format_table(count_checkpoints(*planted_checkpoints(tmp_path, save_tensors), k=5, epsilon=0.5))
    lines = text.splitlines()
    assert "5 leading" in lines[0]
    assert "epsilon = 0.5" in lines[0]
    assert [line.split()[:5] for line in lines if line.startswith("encoder")] == [
        [QUERY, "48", "x", "48", "1"],
        [OUTPUT, "40", "x", "60", "2"],
    ]
    assert lines[-1].split() == ["total", "3"]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"k": 0}, "k=0"),
        ({"k": -3}, "k=-3"),
        ({"k": 41}, rf"k=41.*{OUTPUT} of shape \(40, 60\) has 40.*1 <= k <= 40"),
        ({"epsilon": 0}, "epsilon=0"),
        ({"epsilon": 1.5}, "epsilon=1.5"),
        ({"epsilon": float("nan")}, "epsilon=nan"),
    ],
)
def test_settings_outside_their_range_are_refused(tmp_path, save_tensors, settings, words):
    """k = 0, k above the smallest n (whose matrix is named) and epsilon outside (0, 1] are refused."""
    with pytest.raises(InputError, match=words):
        count_checkpoints(*planted_checkpoints(tmp_path, save_tensors), **settings)


def test_settings_are_checked_before_the_checkpoints(tmp_path):
    """A wrong epsilon is reported although the folders do not exist either."""
    with pytest.raises(InputError, match="epsilon=2"):
        count_checkpoints(tmp_path / "a", tmp_path / "b", epsilon=2)
    with pytest.raises(InputError, match="no folder"):
        count_checkpoints(tmp_path / "a", tmp_path / "b")
