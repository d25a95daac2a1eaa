"""Edits of one matrix in factors: exact growth, best truncation, controls that match what they control for."""

import numpy as np
import pytest
import torch

from intruder.edit import check_scale, grow, keep, low_rank_norm, plan
from intruder.errors import InputError
from intruder.spectrum import LowRank, svd


def _case(seed=0, shape=(40, 28), r=3, scale=-1.5):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *sides: torch.randn(*sides, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(*shape), LowRank(draw(shape[0], r), draw(r, shape[1]), scale)


def _dense(update):
    return update.scale * (update.B @ update.A)


@pytest.mark.parametrize("which", ["top", "all"])
@pytest.mark.parametrize("scale", [0.0, 0.4, 1.7])
def test_growing_is_the_papers_edit_exactly(which, scale):
    """W0 + s B'A' = W + (lambda - 1) sum u sigma v^T to rounding, old columns untouched, also for a negative scale."""
    W0, update = _case()
    spectrum = svd(W0 + _dense(update))
    intruder = np.array([False, True, True, False, True])
    step = plan(spectrum, intruder, low_rank_norm(update), scale, 5, which)
    chosen = [1] if which == "top" else [1, 2, 4]
    assert step.indices == chosen
    grown = grow(update, step.added)
    expected = _dense(update) + (scale - 1) * (spectrum.U[:, chosen] * spectrum.S[chosen]) @ spectrum.Vh[chosen]
    torch.testing.assert_close(_dense(grown), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(grown.B[:, :3], update.B) and torch.equal(grown.A[:3], update.A) and grown.scale == update.scale
    assert step.norm == pytest.approx(abs(scale - 1) * float(spectrum.S[chosen].norm()))


def test_nothing_to_do_is_none():
    """No intruder among the leading k, or lambda = 1."""
    W0, update = _case()
    spectrum = svd(W0 + _dense(update))
    assert plan(spectrum, np.array([False, False, True]), 1.0, 0.0, 2) is None
    assert plan(spectrum, np.array([True, True]), 1.0, 1.0, 2) is None


def test_keeping_the_rank_is_the_best_approximation_and_says_what_it_loses():
    """Against the truncated decomposition of the dense matrix (Eckart-Young), for a negative scale too."""
    _, update = _case(r=7)
    cut, lost = keep(update, 4)
    U, S, Vh = svd(_dense(update))
    torch.testing.assert_close(_dense(cut), (U[:, :4] * S[:4]) @ Vh[:4], rtol=1e-10, atol=1e-10)
    assert cut.B.shape == (40, 4) and lost == pytest.approx(float(S[4:].norm()))


def test_the_norm_matched_control_moves_the_update_as_far_as_the_edit():
    """|c - 1| |Delta W| = |edit|, shrinking for lambda < 1 and growing for lambda > 1; never past zero."""
    W0, update = _case()
    spectrum, norm = svd(W0 + _dense(update)), low_rank_norm(update)
    assert norm == pytest.approx(float(torch.linalg.matrix_norm(_dense(update))))
    small = spectrum._replace(S=spectrum.S * 0.1)
    for scale, sign in ((0.5, 1), (1.5, -1)):
        step = plan(small, np.array([True]), norm, scale, 1, control="norm-matched")
        assert step.added is None and sign * (1 - step.factor) * norm == pytest.approx(step.norm)
    assert plan(spectrum, np.array([True] * 9), 1.0, 0.0, 9, "all", "norm-matched").factor == 0.0


def test_the_random_control_has_the_edits_singular_values_and_other_directions():
    """Same singular values, nearly orthogonal to the edit, the same for the same name and seed."""
    W0, update = _case(shape=(400, 300))
    spectrum = svd(W0 + _dense(update))
    intruder = np.array([True, False, True])
    step = plan(spectrum, intruder, 1.0, 0.25, 3, "all", "random", "layer.0", 1)
    dense = step.added.B @ step.added.A
    torch.testing.assert_close(svd(dense).S[:2], 0.75 * spectrum.S[[0, 2]], rtol=1e-8, atol=0)
    assert float((spectrum.U[:, 0] @ dense @ spectrum.Vh[0]).abs()) < 0.05 * float(spectrum.S[0])
    again = plan(spectrum, intruder, 1.0, 0.25, 3, "all", "random", "layer.0", 1)
    other = plan(spectrum, intruder, 1.0, 0.25, 3, "all", "random", "layer.1", 1)
    assert torch.equal(again.added.B, step.added.B) and not torch.equal(other.added.B, step.added.B)


def test_the_neighbour_control_takes_matched_vectors_of_similar_size():
    """The nearest free matched vector by ratio for each intruder; none left is an error that names the matrix."""
    W0, update = _case()
    spectrum = svd(W0 + _dense(update))._replace(S=torch.tensor([10.0, 9.9, 5.0, 4.8, 1.0], dtype=torch.float64))
    step = plan(spectrum, np.array([True, False, True, False, False]), 1.0, 0.0, 5, "all", "neighbour", "layer.0")
    assert step.indices == [1, 3]
    with pytest.raises(InputError, match="layer.0 has 1 matched vectors"):
        plan(spectrum, np.array([True, True, True, True, False]), 1.0, 0.0, 4, "all", "neighbour", "layer.0")


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf"), "much", None])
def test_a_lambda_that_means_nothing_is_refused(scale):
    """Negative, NaN, infinite, a word, nothing."""
    with pytest.raises(InputError, match="lambda >= 0"):
        check_scale(scale)
