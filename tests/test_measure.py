"""Measurement: spectra and matches against numpy, the matched null, the update's effective rank, the pseudo-loss."""

import math

import numpy as np
import pytest
import torch

from intruder import InputError, count_intruders
from intruder.measure import matrix_seed, measure_pairs, pseudo_loss
from intruder.synthetic import planted_intruders
from intruder.weights import MatrixPair


def left(matrix) -> np.ndarray:
    return np.linalg.svd(np.asarray(matrix, dtype=np.float64), full_matrices=False)[0]


def pair_of(W0: np.ndarray, W: np.ndarray, name: str = "encoder.layer.0.q", update=None) -> MatrixPair:
    return MatrixPair(name, *(torch.tensor(x, dtype=torch.float32) for x in (W0, W)), update)


def low_rank_pair(shape=(40, 24), rank: int = 3, carried: bool = False, scale: float = 0.05) -> MatrixPair:
    rng = np.random.default_rng(rank)
    W0 = torch.tensor(rng.standard_normal(shape), dtype=torch.float32)
    B = torch.tensor(rng.standard_normal((shape[0], rank)), dtype=torch.float32)
    A = torch.tensor(rng.standard_normal((rank, shape[1])), dtype=torch.float32)
    update = scale * B @ A
    return MatrixPair("encoder.layer.0.q", W0, W0 + update, update if carried else None)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (24, 24)])
def test_the_spectra_are_those_of_numpy(shape):
    """Singular values of W and m_j = max_i |<x_i, y_j>| of the left vectors, every index, as numpy computes them."""
    rng = np.random.default_rng(0)
    W0 = rng.standard_normal(shape).astype("f4")
    W = W0 + 0.5 * rng.standard_normal(shape).astype("f4")
    table, matrices = measure_pairs([pair_of(W0, W)])
    X, Y = left(W0), left(W)
    by_hand = [max(abs(float(X[:, i] @ Y[:, j])) for i in range(X.shape[1])) for j in range(Y.shape[1])]
    assert list(table.columns) == ["matrix", "index", "singular_value", "max_cosine", "null_max_cosine"]
    assert list(table["index"]) == list(range(1, min(shape) + 1))
    assert table["max_cosine"].dtype == np.float32
    np.testing.assert_allclose(table["max_cosine"], by_hand, atol=1e-6)
    np.testing.assert_allclose(table["singular_value"], np.linalg.svd(W, compute_uv=False), rtol=1e-5)
    assert matrices[0]["shape"] == list(shape)
    assert matrices[0]["update_norm"] == pytest.approx(np.linalg.norm(W - W0), rel=1e-5)
    assert matrices[0]["pretrained_norm"] == pytest.approx(np.linalg.norm(W0), rel=1e-5)


def test_a_planted_matrix_measures_its_number_of_intruders():
    """Two planted intruders are two in the table at k = 2, 10 and all."""
    W0, W = planted_intruders((48, 64), count=2, seed=1)
    table, _ = measure_pairs([pair_of(W0, W)])
    for k in (2, 10, 48):
        assert count_intruders(table["max_cosine"], 0.5, k) == 2


def test_a_vector_aligned_with_a_mid_spectrum_one_is_not_an_intruder():
    """The lifted x_20 matches x_20; compared with the ten leading x_i it would be an intruder."""
    rng = np.random.default_rng(3)
    U, _ = np.linalg.qr(rng.standard_normal((32, 32)))
    V, _ = np.linalg.qr(rng.standard_normal((32, 32)))
    W0 = (U * np.linspace(5, 1, 32)) @ V.T
    table, _ = measure_pairs([pair_of(W0, W0 + 50 * np.outer(U[:, 19], V[:, 19]))])
    assert table["max_cosine"].iloc[:10].min() > 0.99


def test_left_vectors_are_compared_not_right_ones():
    """An update with an old left vector and a new right one is no intruder; its transpose is one."""
    rng = np.random.default_rng(4)
    U, _ = np.linalg.qr(rng.standard_normal((16, 16)))
    V, _ = np.linalg.qr(rng.standard_normal((24, 24)))
    W0 = (U * np.linspace(4, 1, 16)) @ V[:, :16].T
    W = W0 + 100 * np.outer(U[:, 0], V[:, 20])
    table, _ = measure_pairs([pair_of(W0, W, "a.0"), pair_of(W0.T.copy(), W.T.copy(), "b.0")])
    assert table[table["matrix"] == "a.0"]["max_cosine"].iloc[0] > 0.99
    assert table[table["matrix"] == "b.0"]["max_cosine"].iloc[0] < 0.1


def test_an_unchanged_matrix_measures_one_everywhere():
    """A zero update: all matches 1, the null too, effective rank and norm 0."""
    W0 = np.random.default_rng(5).standard_normal((10, 8))
    table, matrices = measure_pairs([pair_of(W0, W0)])
    assert (table[["max_cosine", "null_max_cosine"]] > 1 - 1e-6).all(axis=None)
    assert matrices[0]["effective_rank"] == 0
    assert matrices[0]["update_norm"] == 0


@pytest.mark.parametrize("carried", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("rank", [1, 3])
def test_rounding_does_not_inflate_the_effective_rank(rank, scale, carried):
    """An update of rank r has the effective rank of its r singular values, carried or found by subtraction."""
    pair = low_rank_pair(rank=rank, carried=carried, scale=scale)
    exact = low_rank_pair(rank=rank, carried=True, scale=scale).update.double().numpy()
    sigma = np.linalg.svd(exact, compute_uv=False)[:rank]
    p = sigma / sigma.sum()
    _, matrices = measure_pairs([pair])
    assert matrices[0]["effective_rank"] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-3)
    assert matrices[0]["effective_rank"] <= rank + 1e-6


def test_an_update_of_full_rank_keeps_its_effective_rank():
    """The cut for rounding does not touch an update whose singular values are all well above it."""
    rng = np.random.default_rng(6)
    W0 = rng.standard_normal((20, 16)).astype("f4")
    W = W0 + (1e-3 * rng.standard_normal((20, 16))).astype("f4")
    sigma = np.linalg.svd(W.astype("f8") - W0, compute_uv=False)
    p = sigma / sigma.sum()
    _, matrices = measure_pairs([pair_of(W0, W)])
    assert matrices[0]["effective_rank"] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_the_null_is_reproducible_and_differs_between_matrices():
    """The null depends on the seed and on the matrix's name, not on the order of the pairs."""
    pair = low_rank_pair(scale=1.0)
    renamed = pair._replace(name="encoder.layer.1.q")
    first, _ = measure_pairs([pair, renamed], null_seed=7)
    second, _ = measure_pairs([renamed, pair], null_seed=7)
    other, _ = measure_pairs([pair], null_seed=8)
    by_name = {name: part["null_max_cosine"].to_numpy() for name, part in first.groupby("matrix")}
    again = {name: part["null_max_cosine"].to_numpy() for name, part in second.groupby("matrix")}
    for name in by_name:
        np.testing.assert_array_equal(by_name[name], again[name])
    assert not np.array_equal(by_name[pair.name], by_name[renamed.name])
    assert not np.array_equal(by_name[pair.name], other["null_max_cosine"])
    assert matrix_seed(7, pair.name) != matrix_seed(8, pair.name)


def test_the_null_answers_to_the_strength_of_the_update():
    """A strong random update of rank 3 puts three intruders on top; a tiny one leaves the leading vectors in place."""
    strong, _ = measure_pairs([low_rank_pair(shape=(64, 64), scale=50.0)])
    assert count_intruders(strong["null_max_cosine"], 0.6, 3) == 3
    weak, _ = measure_pairs([low_rank_pair(shape=(64, 64), scale=1e-6)])
    assert weak["null_max_cosine"].iloc[:10].min() > 0.99


def test_no_pairs_give_an_empty_table():
    """Nothing to measure is an empty table with the columns of a full one."""
    table, matrices = measure_pairs([])
    assert len(table) == 0
    assert matrices == []
    assert list(table.columns) == ["matrix", "index", "singular_value", "max_cosine", "null_max_cosine"]


def test_a_pair_that_cannot_be_measured_is_named():
    """NaN and shapes that differ are refused with the name of the matrix."""
    good, bad = np.ones((3, 2)), np.full((3, 2), np.nan)
    with pytest.raises(InputError, match="matrix encoder.layer.0.q: .*NaN"):
        measure_pairs([pair_of(good, bad)])
    with pytest.raises(InputError, match=r"matrix encoder.layer.0.q: .*\(3, 2\).*\(2, 3\)"):
        measure_pairs([pair_of(good, good.T)])


# Pseudo-loss -----------------------------------------------------------------------------------------------------

MASK, SPECIAL = 4, [0, 1, 2]
SEQUENCES = [[0, 10, 11, 12, 2], [0, 20, 21, 2], [0, 9, 2], [0, 10, 12, 11, 2], [0, 2]]


def loss_by_hand(model, sequences) -> float:
    """One sequence, one masked position, one forward pass at a time; the softmax written out in float64."""
    losses = []
    for sequence in sequences:
        for t, token in enumerate(sequence):
            if token in SPECIAL:
                continue
            ids = list(sequence)
            ids[t] = MASK
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, t].double().tolist()
            top = max(logits)
            losses.append(top + math.log(math.fsum(math.exp(x - top) for x in logits)) - logits[token])
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_pseudo_loss_is_one_masked_token_at_a_time(tiny_roberta, batch_size):
    """The batched pseudo-loss equals the hand-written loop, whatever the batch size."""
    model = tiny_roberta()
    expected = loss_by_hand(model, SEQUENCES)
    assert pseudo_loss(model, SEQUENCES, MASK, SPECIAL, batch_size) == pytest.approx(expected, rel=1e-6)


def test_the_pseudo_loss_of_a_model_that_knows_nothing_is_log_of_the_vocabulary(tiny_roberta):
    """With all logits equal the loss is ln(40) nats per token."""
    model = tiny_roberta()
    with torch.no_grad():
        for parameter in model.lm_head.parameters():
            parameter.zero_()
        model.lm_head.decoder.weight.zero_()
    assert pseudo_loss(model, SEQUENCES, MASK, SPECIAL) == pytest.approx(math.log(40), rel=1e-6)


def test_the_pseudo_loss_weighs_tokens_equally(tiny_roberta):
    """It is a mean over tokens, not over sequences: it is the weighted mean of the parts."""
    model = tiny_roberta()
    long, short = pseudo_loss(model, SEQUENCES[:1], MASK, SPECIAL), pseudo_loss(model, SEQUENCES[2:3], MASK, SPECIAL)
    both = pseudo_loss(model, [SEQUENCES[0], SEQUENCES[2]], MASK, SPECIAL)
    assert both == pytest.approx((3 * long + short) / 4, rel=1e-6)


def test_the_pseudo_loss_leaves_the_model_in_its_mode(tiny_roberta):
    """A model in training mode is evaluated without dropout and handed back in training mode."""
    model = tiny_roberta()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    expected = pseudo_loss(model, SEQUENCES, MASK, SPECIAL)
    assert pseudo_loss(model.train(), SEQUENCES, MASK, SPECIAL) == expected
    assert model.training


@pytest.mark.parametrize(
    "sequences, batch_size, words",
    [
        ([], 64, "no token to mask"),
        ([[0, 2]], 64, "no token to mask"),
        ([[0, 9, 2], []], 64, "sequence 1"),
        ([[9]], 0, "=0"),
    ],
)
def test_sequences_without_a_token_to_mask_are_refused(tiny_roberta, sequences, batch_size, words):
    """Nothing to mask, an empty sequence and a batch size of 0 are refused."""
    with pytest.raises(InputError, match=words):
        pseudo_loss(tiny_roberta(), sequences, MASK, SPECIAL, batch_size)
