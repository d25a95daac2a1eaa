"""The page of an audit as text: self-contained, escaped, and whole without JavaScript."""

import json
import re

import numpy as np
import pytest

from intruder.report import place_of, report_html


def fake_result(names, k=4, epsilon=0.5, seed=0, bounds_only=()):
    """What audit.json holds, for matrices with random cosines; those numbered in `bounds_only` are known by bounds."""
    rng, matrices = np.random.default_rng(seed), []
    for number, name in enumerate(names):
        cosines = np.round(rng.uniform(0.05, 0.99, k), 6)
        cosines[0] = 0.25  # on a grid point: no intruder at 0.25, one at 0.26
        hit = cosines < epsilon
        lower, upper, known = cosines.copy(), cosines.copy(), list(map(float, cosines))
        if number in bounds_only:
            upper[hit], lower[hit] = np.minimum(cosines[hit] + 0.1, epsilon - 0.001), 0.0
            upper[~hit] = 1.0
            known = [None] * k
        S = np.sort(rng.uniform(0.5, 5, k))[::-1]
        matrices.append(
            {
                "name": name,
                "shape": [32, 48],
                "count": int(hit.sum()),
                "max_cosine": known,
                "lower": lower.tolist(),
                "upper": upper.tolist(),
                "singular_values": S.tolist(),
                "intruder": hit.tolist(),
                "route": ["dense"] * k,
                "borderline": [False] * k,
                "energy_share": float((S[hit] ** 2).sum() / (S**2).sum()),
                "rank": 8,
                "effective_rank": 6.5,
                "null_expectation": 0.4,
            }
        )
    return {
        "base": "owner/base",
        "tuned": "folder/adapter",
        "epsilon": epsilon,
        "k": k,
        "total": sum(m["count"] for m in matrices),
        "vectors": k * len(names),
        "borderline": 0,
        "routes": {"dense": k * len(names)},
        "seconds": 1.5,
        "matrices": matrices,
    }


NASTY = "layer.0.</script><img src=x onerror=alert(1)>&\"'--><!--"


def data_of(page):
    """The JSON that the page carries."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_names_from_the_checkpoint_are_data_and_never_markup():
    """A name made of markup appears escaped in the table, cannot end the script element, and survives as data."""
    page = report_html(fake_result([NASTY, "layer.1.query"]) | {"tuned": "x/<b>bold</b>"})
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;" in page and "<img" not in page
    assert "<b>bold" not in page and "<!--" not in page
    assert data_of(page)["matrices"][0]["name"] == NASTY
    assert page.count("</script>") == 2


def test_the_page_loads_nothing():
    """No address of another host, no import, and a policy under which the browser would refuse one."""
    page = report_html(fake_result(["layer.0.query"])).replace(
        "http://www.w3.org/2000/svg", ""
    )  # a name, not an address
    assert not re.search(r"https?://|@import|url\(|src=|<link(?! rel=\"icon\" href=\"data:,\")", page)
    assert "default-src 'none'" in page and "{{" not in page


def test_without_a_script_the_table_holds_the_audited_counts():
    """Every matrix has a row with its rank and count; the total stands in a sentence; sliders are hidden."""
    result = fake_result([f"layer.{i}.query" for i in range(3)])
    page = report_html(result)
    assert f"{result['total']} intruder dimensions among 12 vectors of 3 matrices" in page
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', page)
    assert [name for name, _ in rows] == [m["name"] for m in result["matrices"]]
    for (_, cells), matrix in zip(rows, result["matrices"]):
        assert f'<td class="count">{matrix["count"]}</td>' in cells and '<td data-value="8">8</td>' in cells
    assert '<form class="controls" hidden>' in page and "<noscript>" in page


@pytest.mark.parametrize("epsilon", [0.25, 0.26, 0.5, 0.333])
def test_the_packed_cosines_count_like_the_definition(epsilon):
    """v < E exactly when m < E/1000, for every E, cosines on grid points included."""
    result = fake_result([f"layer.{i}.query" for i in range(4)], k=6, epsilon=epsilon)
    data = data_of(report_html(result))
    assert data["E"] == round(1000 * epsilon) and data["step"] == (10 if epsilon != 0.333 else 1)
    for packed, matrix in zip(data["matrices"], result["matrices"]):
        for E in range(1, 1001):
            expected = [m < E / 1000 for m in matrix["max_cosine"]]
            assert [v < E for v in packed["lo"]] == [v < E for v in packed["hi"]] == expected


def test_a_matrix_has_a_place_in_the_map():
    """Group, layer and module; experts share a column; names without a number have a place too."""
    assert place_of("encoder.layer.3.attention.self.query") == ("encoder.layer", 3, "attention.self.query")
    assert place_of("layers.0.mlp.experts.7.up") == ("layers", 0, "mlp.experts.*.up")
    assert place_of("embed") == ("outside the layers", 0, "embed")
