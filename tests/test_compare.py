"""Three routes, one answer: cached and certified never contradict two full decompositions, and the call is checked."""

import importlib
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from random_pairs import draw, exact

import intruder
from intruder import Basis, BasisStore, InputError, LowRank, basis, certified, compare, comparison
from intruder.synthetic import planted_intruders

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


def check(case: dict, routes: Counter) -> list[str]:
    """What is wrong with the three routes on one case; counts the vectors each one decided.

    Wrong is a verdict of cached or certified that differs from the definition, except where dense itself calls the
    vector borderline (an arbitrary choice among equal singular values, or a tie with epsilon), and a true m_j outside
    the bounds. The dense route is run once: what cached and certified leave to it gets that answer.
    """
    faults, truth = [], exact(case)
    arguments = (case["pretrained"], case["change"], case["k"], case["epsilon"])
    dense = compare(*arguments, method="dense")
    sure = ~dense.borderline
    routes["cases"] += 1
    routes["dense: borderline"] += int(dense.borderline.sum())
    if ((dense.intruder != (truth < case["epsilon"])) & sure).any():
        faults.append(f"dense differs from the definition: {case['kind']}")
    for method, given in (("cached", Basis.of(case["pretrained"])), ("certified", None)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(comparison, "_dense", lambda *_: {**vars(dense), "decided": sure})
            found = compare(*arguments, method=method, basis=given)
        tried = [method]
        if method == "certified" and certified.can_certify(min(case["pretrained"].shape), case["k"]):
            tried.append("certified with room")  # for the Krylov spaces of k vectors
        for name in tried:
            routes.update(f"{name}: {'decided' if route == method else 'left to dense'}" for route in found.route)
        mine = (found.route == method) & sure
        routes[f"{method}: differs where dense is borderline"] += int(
            ((found.route == method) & ~sure & (found.intruder != dense.intruder)).sum()
        )
        if (mine & (found.intruder != (truth < case["epsilon"]))).any():
            faults.append(f"{method}: wrong verdict: {case['kind']}")
        if (mine & ((truth < found.lower - 1e-9) | (truth > found.upper + 1e-9))).any():
            faults.append(f"{method}: m_j outside its bounds: {case['kind']}")
        value = np.where(np.isnan(found.max_cosine), truth, found.max_cosine)
        if (mine & (np.abs(value - truth) > found.upper - found.lower + 1e-6)).any():
            faults.append(f"{method}: wrong value: {case['kind']}")
        if found.count != int(found.intruder.sum()) or (found.intruder != dense.intruder)[~mine & sure].any():
            faults.append(f"{method}: fall-back differs from dense: {case['kind']}")
    return faults


def shares(routes: Counter) -> str:
    """The counts, and the share of all vectors that each route decided by itself."""
    lines = [f"{name}: {count}" for name, count in sorted(routes.items())]
    for method in ("cached", "certified", "certified with room"):
        decided, left = routes[f"{method}: decided"], routes[f"{method}: left to dense"]
        lines.append(f"{method} decided {decided / max(decided + left, 1):.1%} of {decided + left} vectors")
    return "\n".join(lines)


@pytest.mark.parametrize("start", range(0, 240, 40))
def test_never_a_wrong_verdict_on_random_cases(start):
    """40 random cases: sizes 2 to 160, every kind of spectrum and update; no wrong verdict, bound or value."""
    routes: Counter = Counter()
    faults = [(seed, fault) for seed in range(start, start + 40) for fault in check(draw(seed, 2, 160), routes)]
    assert not faults
    assert routes["cached: decided"] > routes["cached: left to dense"]


def test_never_a_wrong_verdict_on_larger_cases():
    """15 cases of 200 to 400, where the certified route has room to decide."""
    routes: Counter = Counter()
    assert not [(s, fault) for s in range(5000, 5015) for fault in check(draw(s, 200, 400), routes)]
    assert routes["certified: decided"] > 0


@pytest.mark.slow
@pytest.mark.skipif("INTRUDER_CASES" not in os.environ, reason="set INTRUDER_CASES=10000; about 0.1 s each")
def test_never_a_wrong_verdict_on_many_random_cases():
    """INTRUDER_CASES random cases from number INTRUDER_FIRST_CASE (0) on; prints what each route decided.

    Sizes are log-uniform, 2 to 128 and in every fourth case 64 to 512, where the certified route has room. To divide the
    cases among processes, give each its own range.
    """
    routes: Counter = Counter()
    first, count = int(os.environ.get("INTRUDER_FIRST_CASE", "0")), int(os.environ["INTRUDER_CASES"])
    faults = []
    for number in range(first, first + count):
        sizes = (2, 128) if number % 4 else (64, 512)
        wrong = check(draw(100_000 + number, *sizes), routes)
        faults += [(number, fault) for fault in wrong]
        if wrong or (number + 1 - first) % 250 == 0 or number + 1 == first + count:
            print(f"\ncase {number}: {len(faults)} faults {faults}\n{shares(routes)}", flush=True)
    assert not faults


def test_one_call_at_package_level():
    """`import intruder` loads numpy only; intruder.compare is the function, listed, and no module hides it."""
    lines = [
        "import sys, intruder",
        "print('torch' in sys.modules, 'compare' in dir(intruder), set(intruder.__all__) <= set(dir(intruder)))",
        "from intruder import compare, LowRank, BasisStore",
        "import intruder.comparison, intruder.basis, torch",
        "print(intruder.compare is compare, intruder.compare(torch.eye(4), torch.eye(4), k=2).count)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "True", "True", "True", "0"], done.stderr
    for name in intruder.__all__:
        assert getattr(intruder, name).__name__ == name
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"intruder.{name}")
    with pytest.raises(AttributeError, match="no attribute 'compares'"):
        intruder.compares  # noqa: B018


def planted(shape: tuple[int, int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    pretrained, tuned = planted_intruders(shape, count, strength=10, seed=3)
    return torch.from_numpy(pretrained), torch.from_numpy(tuned)


@pytest.mark.parametrize("method", ["auto", "dense", "cached", "certified"])
@pytest.mark.parametrize("shape", [(160, 160), (220, 160), (160, 220)])
def test_planted_intruders_are_counted(shape, method):
    """Each route finds the planted number of intruders, from W and from the update in factors."""
    pretrained, tuned = planted(shape, 3)
    assert compare(pretrained, tuned, method=method).count == 3
    U, S, Vh = torch.linalg.svd(tuned - pretrained, full_matrices=False)
    update = LowRank(U[:, :3] * S[:3] * 4, Vh[:3], 0.25)
    found = compare(pretrained, update, method=method)
    assert found.count == 3 and found.intruder[:3].all()
    np.testing.assert_allclose(found.singular_values, torch.linalg.svdvals(tuned)[:10].numpy(), rtol=1e-9)


@pytest.mark.parametrize("shape", [(400, 400), (900, 300), (350, 500)])
def test_certified_decides_intruders_and_clear_matches(shape):
    """A bulk with a head and a strong random update: nearly every vector is decided without a decomposition of W0."""
    generator = torch.Generator().manual_seed(1)
    m, p = shape
    W0 = torch.randn(m, p, generator=generator) / (m**0.5 + p**0.5)
    U, V = (torch.linalg.qr(torch.randn(side, 6, generator=generator)).Q for side in shape)
    W0 += U * torch.tensor([9.0, 6.0, 4.5, 3.5, 2.8, 2.2]) @ V.T
    B, A = torch.randn(m, 4, generator=generator) / m**0.5, torch.randn(4, p, generator=generator) / p**0.5
    found = compare(W0, LowRank(B, A, 5.2), method="certified", k=8)
    assert (found.route == "certified").sum() >= 7
    assert found.intruder.any() and not found.intruder.all()
    exact_count = compare(W0, LowRank(B, A, 5.2), method="dense", k=8)
    assert (found.intruder == exact_count.intruder).all()


def test_a_tall_matrix_keeps_what_lies_outside_the_span():
    """An update outside span(U0) is an intruder with a cosine near 0; a cached basis must not project it away."""
    generator = torch.Generator().manual_seed(0)
    W0 = torch.randn(300, 120, generator=generator, dtype=torch.float64)
    outside = torch.linalg.qr(torch.cat([W0, torch.randn(300, 1, generator=generator).double()], 1)).Q[:, -1:]
    update = LowRank(outside, torch.randn(1, 120, generator=generator).double(), 40.0)
    for method in ("dense", "cached"):
        found = compare(W0, update, k=1, epsilon=0.2, method=method)
        assert found.count == 1 and found.max_cosine[0] < 0.1 and found.route[0] == method
    assert compare(W0, update, k=1, epsilon=0.2, method="certified").count == 1


@pytest.mark.parametrize("method", ["dense", "cached", "certified"])
def test_no_update_is_no_intruder(method):
    """W = W0: every vector matches itself."""
    pretrained = planted((90, 90), 1)[0]
    for change in (pretrained, LowRank(torch.zeros(90, 2), torch.zeros(2, 90), 1.0)):
        found = compare(pretrained, change, method=method)
        assert found.count == 0 and not found.borderline.any()


def test_equal_singular_values_are_borderline():
    """Where all singular values are equal any basis may come back: dense says borderline, the others leave it to it."""
    W0 = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    update = LowRank(torch.ones(60, 1).double() / 60**0.5, torch.ones(1, 60).double() / 60**0.5, 3.0)
    for method in ("dense", "cached", "certified"):
        found = compare(W0, update, k=3, method=method)
        assert found.borderline.all() and (found.route == "dense").all()


def test_epsilon_next_to_the_cosine_is_borderline():
    """A cosine within rounding of epsilon is flagged, one at a distance is not."""
    pretrained, tuned = planted((80, 80), 1)
    cosine = compare(pretrained, tuned, k=1, method="dense").max_cosine[0]
    assert compare(pretrained, tuned, k=1, epsilon=cosine + 1e-15, method="dense").borderline[0]
    assert not compare(pretrained, tuned, k=1, epsilon=cosine + 1e-3, method="dense").borderline[0]


def test_half_precision_is_promoted():
    """bfloat16 and float16 matrices are compared as the numbers they hold."""
    pretrained, tuned = planted((100, 100), 2)
    for dtype in (torch.bfloat16, torch.float16):
        half = (pretrained.to(dtype), tuned.to(dtype))
        expected = compare(*(matrix.double() for matrix in half))
        found = compare(*half)
        assert found.count == expected.count == 2
        np.testing.assert_allclose(found.max_cosine, expected.max_cosine, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e6, 1e25])
@pytest.mark.parametrize("method", ["dense", "cached", "certified"])
def test_the_scale_of_the_weights_does_not_matter(method, scale):
    """W0 and the update times a constant: the same verdicts, also where squares leave the range of float32."""
    pretrained, tuned = (matrix.float() for matrix in planted((150, 150), 2))
    expected = compare(pretrained, tuned, method=method)
    found = compare(pretrained * scale, tuned * scale, method=method)
    assert (found.intruder == expected.intruder).all()
    np.testing.assert_allclose(found.singular_values, expected.singular_values * scale, rtol=1e-4)


def test_the_store_is_used_and_auto_picks_it(tmp_path):
    """auto with a store is cached, without one dense for small matrices; the second call reads the first one's file."""
    pretrained, tuned = planted((120, 120), 2)
    store = BasisStore(tmp_path)
    assert (compare(pretrained, tuned, basis=store).route == "cached").all()
    assert pretrained in store
    assert (compare(pretrained, tuned, basis=store.get(pretrained)).route == "cached").all()
    assert (compare(pretrained, tuned).route == "dense").all()


@pytest.mark.parametrize(
    ("shape", "k", "stored", "keeps", "free", "expected"),
    [
        ((1000, 1000), 10, None, None, 1e12, "dense"),  # small
        ((1100, 1100), 10, None, None, 1e12, "certified"),
        ((1100, 3000), 10, None, None, 1e12, "certified"),
        ((3000, 1000), 10, None, None, 1e12, "dense"),  # the smaller side decides
        ((1100, 1100), 69, None, None, 1e12, "dense"),  # k > n / 16
        ((1000, 1000), 10, None, None, 1e6, "certified"),  # no memory for decompositions
        ((1100, 1100), 69, None, None, 1e6, "certified"),
        ((1100, 1100), 400, None, None, 1e6, "dense"),  # certified could decide nothing
        ((30, 30), 10, None, None, 1e3, "dense"),
        ((1100, 1100), 10, True, True, 1e6, "cached"),  # whatever the memory: it is read by parts
        ((1000, 1000), 10, False, True, 1e12, "cached"),  # made once for many adapters
        ((1100, 1100), 10, False, True, 1e12, "cached"),
        ((1100, 1100), 10, False, True, 1e6, "certified"),  # no memory to make it
        ((1100, 1100), 10, False, False, 1e12, "certified"),  # a store too small would make it every time
        ((1000, 1000), 10, False, False, 1e12, "dense"),
    ],
)
def test_auto_picks_by_shape_memory_and_what_is_cached(monkeypatch, tmp_path, shape, k, stored, keeps, free, expected):
    """Every choice of `choose`, with the free memory that is given."""
    monkeypatch.setattr(comparison, "free_memory", lambda device: free)
    store = None if stored is None else BasisStore(tmp_path, max_bytes=2**40 if keeps else 10)
    if stored:
        monkeypatch.setattr(store, "holds", lambda key: True)
    assert comparison.choose(torch.zeros(shape), k, store, key="") == expected


def test_auto_has_another_crossover_on_cuda(monkeypatch):
    """The device decides from which size on the certified route is preferred."""
    monkeypatch.setattr(comparison, "free_memory", lambda device: 1e12)

    class There:
        shape, device = (1500, 1500), torch.device("cuda")

    assert comparison.choose(There, 10) == "dense" and comparison.choose(torch.zeros(1500, 1500), 10) == "certified"
    There.shape = (2048, 2048)
    assert comparison.choose(There, 10) == "certified"


def test_auto_does_what_it_chose(monkeypatch):
    """Without memory for two decompositions a small matrix is certified; a given basis is used all the same."""
    pretrained, tuned = planted((300, 300), 3)
    monkeypatch.setattr(comparison, "free_memory", lambda device: 1e5)
    assert (compare(pretrained, tuned, k=3).route == "certified").all()
    assert (compare(pretrained, tuned, k=3, basis=Basis.of(pretrained)).route == "cached").all()


def test_free_memory_is_a_number_of_bytes(monkeypatch):
    """More than nothing and less than 1 PiB; where the system does not tell, no limit."""
    assert 0 < comparison.free_memory(torch.device("cpu")) < 2**50

    def refuse(*_, **__):
        raise OSError

    monkeypatch.setattr("builtins.open", refuse)
    assert 0 < comparison.free_memory(torch.device("cpu")) < 2**50
    monkeypatch.setattr(os, "sysconf", refuse)
    assert comparison.free_memory(torch.device("cpu")) == float("inf")


@pytest.mark.parametrize("shape", [(200, 200), (260, 200), (200, 260)])
def test_a_basis_that_stays_in_its_file_gives_the_same(monkeypatch, tmp_path, shape):
    """Read by parts of a few rows, from factors and from a dense matrix: the same numbers as from memory."""
    monkeypatch.setattr(basis, "PART_BYTES", 20_000)
    pretrained, tuned = planted(shape, 3)
    U, S, Vh = torch.linalg.svd(tuned - pretrained, full_matrices=False)
    update = LowRank(U[:, :3] * S[:3], Vh[:3])
    small = BasisStore(tmp_path, memory_bytes=0)
    small.get(pretrained)
    small._memory.clear()
    for change in (tuned, update):
        for k in (3, 60):
            read = compare(pretrained, change, k=k, basis=small)
            held = compare(pretrained, change, k=k, basis=Basis.of(pretrained))
            assert not small._memory and (read.route == held.route).all()
            assert (read.intruder == held.intruder).all()
            np.testing.assert_allclose(read.max_cosine, held.max_cosine, atol=1e-9)


def test_a_file_that_goes_while_it_is_read_does_no_harm(monkeypatch, tmp_path):
    """Another process may make room in the folder at any time: then the basis is made again."""
    pretrained, tuned = planted((90, 90), 2)
    store = BasisStore(tmp_path, memory_bytes=0)
    store.get(pretrained)
    store._memory.clear()
    stored = store.open(pretrained)
    stored.path.unlink()
    monkeypatch.setattr(store, "open", lambda *_: stored)
    found = compare(pretrained, tuned, basis=store)
    assert (found.route == "cached").all() and found.count == 2


def test_a_cosine_near_epsilon_is_settled_by_sharpening(monkeypatch):
    """Where only a smaller error of u_j can settle the verdict, float64 residuals do; without them dense must."""
    generator = torch.Generator().manual_seed(0)
    n = 600
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for _ in range(2))
    head = torch.cat([torch.tensor([8.0, 5.0]), torch.linspace(1, 0.1, n - 2)])
    u = 0.5 * U[:, 1] + 0.75**0.5 * U[:, 300:].sum(1) / 300**0.5
    update = LowRank(u[:, None], torch.randn(1, n, generator=generator) / n**0.5, 20.0)
    W0 = (U * head) @ V.T
    cosine = float(compare(W0, update, k=1, method="dense").max_cosine[0])
    for epsilon in (cosine - 4e-4, cosine + 1.5e-3):
        found = compare(W0, update, k=1, epsilon=epsilon, method="certified")
        assert found.route[0] == "certified" and found.intruder[0] == (cosine < epsilon)
    solve = certified.LeadingSpace.solve

    def vague(self, *arguments):
        leading = solve(self, *arguments)
        return leading._replace(error=leading.error.clamp(min=2e-3))

    monkeypatch.setattr(certified.LeadingSpace, "solve", vague)
    assert compare(W0, update, k=1, epsilon=cosine - 4e-4, method="certified").route[0] == "certified"
    monkeypatch.setattr(certified.LeadingSpace, "sharpen", lambda self, chosen: vague(self))
    assert compare(W0, update, k=1, epsilon=cosine - 4e-4, method="certified").route[0] == "dense"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["dense", "cached", "certified"])
@pytest.mark.parametrize("shape", [(200, 200), (260, 200), (200, 260)])
def test_every_device_gives_the_same_counts(device, method, shape):
    """On each device at hand, from a dense matrix and from factors, the planted intruders are found."""
    pretrained, tuned = (matrix.to(device) for matrix in planted(shape, 3))
    U, S, Vh = torch.linalg.svd(tuned - pretrained, full_matrices=False)
    for change in (tuned, LowRank(U[:, :3] * S[:3], Vh[:3])):
        assert compare(pretrained, change, k=8, method=method).count == 3


def test_the_product_setting_of_the_caller_is_left_alone():
    """TF32 is off inside the call only."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        compare(*planted((30, 30), 0), k=2)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_cannot_be_compared_is_refused():
    """Each refusal names the value received and what was wanted."""
    W0 = torch.eye(6)
    factors = LowRank(torch.ones(6, 1), torch.ones(1, 6), 1.0)
    for arguments, message in (
        ({"method": "fast"}, "method='fast'"),
        ({"k": 7}, "k=7"),
        ({"k": 0}, "k=0"),
        ({"epsilon": 1.5}, "epsilon=1.5"),
        ({"tuned_or_update": torch.eye(5)}, r"\(5, 5\)"),
        ({"tuned_or_update": W0 * float("nan")}, "NaN"),
        ({"tuned_or_update": factors._replace(A=torch.ones(2, 6))}, r"A has shape \(2, 6\)"),
        ({"tuned_or_update": factors._replace(scale=float("inf"))}, "scale=inf"),
        ({"tuned_or_update": [1]}, "tuned is a list"),
        ({"basis": Basis.of(torch.eye(5))}, "basis with U of shape"),
        ({"basis": Basis.of(2 * W0)}, "not that of the pre-trained"),
    ):
        with pytest.raises(InputError, match=message):
            compare(**({"pretrained": W0, "tuned_or_update": factors, "k": 1} | arguments))
