"""Properties that any counter of intruder dimensions must have; each is a claim, tried on every counter of `plugs`."""

import numpy as np
import pytest
import torch
from plugs import COUNTERS, MISTAKES, Counter

from intruder.synthetic import planted_intruders

SHAPES = [(60, 60), (100, 60), (60, 100)]


def orthogonal(n: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]


def planted(shape=(60, 60), count=2, seed=0):
    return tuple(torch.from_numpy(matrix) for matrix in planted_intruders(shape, count, seed=seed))


def spectrum(m: int, n: int, values, seed: int = 0):
    """U, W0 and V of a matrix of shape (m, n) with these singular values."""
    values = torch.as_tensor(values, dtype=torch.float64)
    U, V = orthogonal(m, seed)[:, : len(values)], orthogonal(n, seed + 1)[:, : len(values)]
    return U, (U * values) @ V.T, V


def single(W: torch.Tensor) -> torch.Tensor:
    return W.float()


# The properties ----------------------------------------------------------------------------------------------------


def planted_answers(counter: Counter):
    """Exactly the planted intruders are counted, in square, tall and wide matrices, at epsilon .3 and .5."""
    for shape in SHAPES:
        for count in (0, 1, 2, 3):
            W0, W = planted(shape, count, seed=count)
            for epsilon in (0.3, 0.5):
                assert counter.count(single(W0), single(W), 10, epsilon) == count, (shape, count, epsilon)


def no_change(counter: Counter):
    """A matrix has no intruder against itself, at any epsilon below 1."""
    for shape in SHAPES:
        W0 = single(planted(shape, 0)[0])
        assert counter.count(W0, W0.clone(), 10, 0.99) == 0, shape


def signs(counter: Counter):
    """W0 -> -W0 or W -> -W changes no count: singular vectors are unique only up to sign."""
    W0, W = (single(matrix) for matrix in planted())
    for first, second in ((-W0, W), (W0, -W), (-W0, -W)):
        assert counter.count(first, second, 10, 0.5) == 2
    for seed in range(4):
        _, W0, _ = spectrum(30, 30, torch.linspace(5, 1, 30), seed)
        assert counter.count(single(W0), single(-W0), 10, 0.9) == 0


def rotations(counter: Counter):
    """P W0 Q and P W Q with orthogonal P and Q have the count of W0 and W."""
    for shape in SHAPES:
        W0, W = planted(shape, 2)
        P, Q = orthogonal(shape[0], 5), orthogonal(shape[1], 6)
        assert counter.count(single(P @ W0 @ Q), single(P @ W @ Q), 10, 0.5) == 2, shape


def left_vectors(counter: Counter):
    """Kept left vectors are matched whatever the right ones do; transposing both matrices swaps the two sides."""
    values = torch.linspace(9, 1, 40)
    U, W0, V = spectrum(40, 40, values)
    W = (U * values) @ orthogonal(40, 9).T
    assert counter.count(single(W0), single(W), 10, 0.5) == 0
    transposed = counter.count(single(W0.T), single(W.T), 10, 0.5)
    expected = int((np.abs((V.T @ orthogonal(40, 9)[:, :10]).numpy()).max(0) < 0.5).sum())
    assert transposed == expected > 0


def scales(counter: Counter):
    """A common factor, and a factor on W0 alone, change nothing: only directions are compared."""
    W0, W = planted()
    for factor in (1e-6, 1e-2, 1e3, 1e6):
        assert counter.count(single(factor * W0), single(factor * W), 10, 0.5) == 2, factor
    for factor in (0.01, 7.0):
        assert counter.count(single(factor * W0), single(W), 10, 0.5) == 2, factor


def anywhere(counter: Counter):
    """A top vector that equals x_25 is no intruder: the maximum runs over all pre-trained vectors."""
    for m, n in ((40, 40), (60, 40), (40, 60)):
        U, W0, V = spectrum(m, n, torch.linspace(5, 1, 40))
        W = W0 + 50 * torch.outer(U[:, 24], V[:, 24])
        assert counter.count(single(W0), single(W), 10, 0.9) == 0, (m, n)


def weak(counter: Counter):
    """An update far below the spectrum of W0 leaves its vectors where they were, whatever its own vectors are."""
    U, W0, V = spectrum(60, 60, torch.linspace(60, 1, 60))
    mixed = torch.outer(U.sum(1), V.sum(1)) / 60
    assert counter.count(single(W0), single(W0 + 1e-3 * mixed), 10, 0.9) == 0


def top_k(counter: Counter):
    """An intruder in third place counts from k = 3 on."""
    U, _, V = spectrum(60, 60, torch.ones(60))
    values = torch.linspace(1, 0.1, 60, dtype=torch.float64)
    values[:2] = torch.tensor([100.0, 90.0])
    W0 = (U * values) @ V.T
    mixed = torch.outer(U[:, 2:].sum(1), V[:, 2:].sum(1)) / 58
    W = W0 + 50 * mixed
    assert [counter.count(single(W0), single(W), k, 0.5) for k in (1, 2, 3, 10)] == [0, 0, 1, 1]


def threshold(counter: Counter):
    """The count never falls as epsilon grows, and a direction spread evenly over q vectors turns at 1 / sqrt(q)."""
    U, W0, V = spectrum(48, 48, torch.linspace(2, 0.1, 48))
    for q in (4, 9, 16):
        W = W0 + 1e4 * torch.outer(U[:, :q].sum(1), V[:, :q].sum(1)) / q
        at = 1 / q**0.5
        assert counter.count(single(W0), single(W), 1, at - 0.02) == 0, q
        assert counter.count(single(W0), single(W), 1, at + 0.02) == 1, q
    counts = [counter.count(single(W0), single(W), 10, epsilon) for epsilon in (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)]
    assert counts == sorted(counts)


def outside_the_span(counter: Counter):
    """In a tall matrix a direction outside the span of the pre-trained left vectors is an intruder at any epsilon."""
    U, _, V = spectrum(60, 20, torch.ones(20))
    full = orthogonal(60, 0)
    W0 = (U * torch.linspace(5, 1, 20, dtype=torch.float64)) @ V.T
    W = W0 + 50 * torch.outer(full[:, 40], V.sum(1) / 20**0.5)
    assert counter.count(single(W0), single(W), 1, 0.05) == 1


def half_precision(counter: Counter):
    """bfloat16 and float16 weights are promoted: the planted count stays, and nothing crashes."""
    W0, W = planted((60, 60), 2)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert counter.count(W0.to(dtype), W.to(dtype), 10, 0.5) == 2, dtype


def clusters(counter: Counter):
    """Equal singular values: a planted leader among them still counts, and an untouched cluster does not."""
    for values in (torch.ones(60), torch.cat([torch.full((30,), 2.0), torch.full((30,), 1.0)])):
        U, W0, V = spectrum(60, 60, values)
        # numpy's basis of a cluster is arbitrary; a direction spread over all 60 is far from any basis of it.
        mixed = torch.outer(U @ torch.ones(60, dtype=torch.float64), V @ torch.ones(60, dtype=torch.float64)) / 60
        count = counter.count(single(W0), single(W0 + 500 * mixed), 1, 0.99)
        assert count in (0, 1)
        assert count == counter.count(single(W0), single(W0 + 500 * mixed), 1, 0.99)
    head = torch.cat([torch.tensor([10.0, 9, 8]), torch.ones(57)])
    U, W0, V = spectrum(60, 60, head)
    W = W0 + 5 * torch.outer(U[:, 0], V[:, 0])
    assert counter.count(single(W0), single(W), 3, 0.9) == 0


def deficient(counter: Counter):
    """W0 of rank 12: a spread direction inside its span is an intruder, a kept vector is none."""
    for m, n in ((40, 40), (60, 40), (40, 60)):
        U, W0, V = spectrum(m, n, torch.linspace(4, 2, 12))
        W = W0 + 80 * torch.outer(U.sum(1), V.sum(1)) / 12
        assert counter.count(single(W0), single(W), 1, 0.5) == 1, (m, n)
        assert counter.count(single(W0), single(2 * W0), 10, 0.9) == 0, (m, n)


def zeros(counter: Counter):
    """A zero matrix gives a whole number between 0 and k, not a crash; the directions are not defined."""
    W0 = torch.zeros(20, 20)
    W = torch.outer(torch.ones(20), torch.ones(20))
    for first, second in ((W0, W0), (W0, W), (W, W0)):
        assert 0 <= counter.count(first, second, 3, 0.5) <= 3


def one_column(counter: Counter):
    """Vectors are matrices too: one row has one left vector, which always matches; one column can turn away."""
    row = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    assert counter.count(row, row + 1, 1, 0.5) == 0
    column = torch.eye(8)[:, :1]
    assert counter.count(column, torch.eye(8)[:, 1:2].contiguous(), 1, 0.5) == 1


PROPERTIES = {
    "planted answers": planted_answers,
    "no change, no intruder": no_change,
    "a sign does not matter": signs,
    "rotations do not matter": rotations,
    "left vectors are compared": left_vectors,
    "scales do not matter": scales,
    "a match anywhere in the spectrum counts": anywhere,
    "a weak update makes no intruder": weak,
    "only the top k are examined": top_k,
    "the threshold is where the definition has it": threshold,
    "outside the span": outside_the_span,
    "half precision": half_precision,
    "clustered singular values": clusters,
    "rank-deficient matrices": deficient,
    "zero matrices": zeros,
    "vectors": one_column,
}


def cases():
    for counter in COUNTERS:
        for claim in PROPERTIES:
            known = counter.fails.get(claim)
            marks = [known.mark()] if known else []
            yield pytest.param(counter, claim, marks=marks, id=f"{counter.name}: {claim}")


@pytest.mark.parametrize("counter, claim", list(cases()))
def test_counter(counter, claim):
    """Every counter has every property, except those it is known to lack, each with its reason."""
    PROPERTIES[claim](counter)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_published_mistake_fails_its_property(mistake):
    """The suite has teeth: each mistake of a published re-implementation fails the property that is there for it."""
    count, claim = MISTAKES[mistake]
    with pytest.raises(AssertionError):
        PROPERTIES[claim](Counter(mistake, count))
