"""The page of an audit in a browser: it counts like the definition, without a network, by keyboard, light and dark."""

import pytest

from intruder.intruders import count_intruders
from intruder.report import report_html
from test_report import NASTY, fake_result

pytestmark = pytest.mark.browser
NAMES = [f"encoder.layer.{i}.{module}" for i in range(3) for module in ("attention.query", "output.dense")]


@pytest.fixture
def report(tmp_path):
    """report(result) -> the address of the page in a file."""

    def write(result):
        path = tmp_path / "report.html"
        path.write_text(report_html(result), encoding="utf-8")
        return path.as_uri()

    return write


def slide(page, name, value):
    page.evaluate(
        "([id, value]) => { const slider = document.getElementById(id); slider.value = value;"
        " slider.dispatchEvent(new Event('input')); }",
        [name, value],
    )


def total(page):
    return int(page.inner_text("#total").split()[0])


def test_the_sliders_count_like_the_definition(open_page, report):
    """At every pair of epsilon and k tried, total, heat map and table equal count_intruders; nothing is requested."""
    result = fake_result(NAMES, k=6)
    page = open_page(report(result))
    assert total(page) == result["total"]
    for E, k in ((500, 6), (250, 6), (260, 6), (10, 1), (1000, 3), (730, 5)):
        slide(page, "epsilon", E)
        slide(page, "k", k)
        expected = [count_intruders(m["max_cosine"], E / 1000, k) for m in result["matrices"]]
        assert total(page) == sum(expected)
        assert [int(text) for text in page.locator("#matrices td.count").all_inner_texts()] == expected
        assert sorted(int(text) for text in page.locator(".grid td button").all_inner_texts()) == sorted(expected)
    page.click("#audited")
    assert total(page) == result["total"] and page.foreign == [] and page.complaints == []


def test_what_a_bound_does_not_decide_is_said(open_page, report):
    """With bounds alone the audited epsilon gives the audited count, another one a range and the command to run."""
    result = fake_result(NAMES, k=6, bounds_only=range(6))
    page = open_page(report(result))
    assert total(page) == result["total"] and "not decided" not in page.inner_text("#total")
    slide(page, "epsilon", 200)
    text = page.inner_text("#total")
    assert "not decided at this ε: run intruder audit with --epsilon 0.2" in text
    truth_low = sum(upper < 0.2 for m in result["matrices"] for upper in m["upper"])
    assert total(page) == truth_low


def test_everything_works_by_keyboard(open_page, report):
    """Arrow keys move the slider and walk the map; Enter opens a matrix, whose vectors are listed as text."""
    result = fake_result(NAMES, k=4)
    page = open_page(report(result))
    page.focus("#epsilon")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#epsilon-now") == "0.51"
    page.focus('.grid button[tabindex="0"]')
    for key in ("ArrowDown", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert page.inner_text("#detail-title") == "encoder.layer.1.output.dense"
    assert page.locator("#vectors tbody tr").count() == 4
    assert page.locator("#plot svg[role=img][aria-label]").count() == 1


def test_markup_in_names_is_never_run(open_page, report):
    """A matrix named like a script shows its name, in the table, in the map and in the details."""
    page = open_page(report(fake_result([NASTY, "layer.1.query"])))
    page.locator("#matrices button.name").first.click()
    assert page.inner_text("#detail-title") == NASTY
    assert page.locator("img").count() == 0 and page.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_on_its_ground(open_page, report, scheme):
    """Contrast of at least 4.5 in every cell of the map and in the text, light and dark; no sideways scrolling."""
    page = open_page(report(fake_result(NAMES, k=4)), color_scheme=scheme, viewport={"width": 390, "height": 800})
    contrast = page.evaluate("""() => {
      const paint = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
      const light = (colour) => {
        paint.clearRect(0, 0, 1, 1); paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1);
        const part = [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255)
          .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
      };
      const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      const of = (element, ground) =>
        ratio(light(getComputedStyle(element).color), light(getComputedStyle(ground).backgroundColor));
      const cells = [...document.querySelectorAll('.grid button')].map((cell) => of(cell, cell));
      return Math.min(...cells, ...['.what', '.models', 'h1'].map((q) => of(document.querySelector(q), document.body)));
    }""")
    assert contrast >= 4.5
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_without_javascript_the_table_stands(open_page, report):
    """Counts and ranks as text; sliders and map are not shown."""
    result = fake_result(NAMES, k=4)
    page = open_page(report(result), java_script_enabled=False)
    assert str(result["total"]) in page.inner_text("#total") and page.locator(".controls").is_hidden()
    assert [int(t) for t in page.locator("#matrices td.count").all_inner_texts()] == [
        m["count"] for m in result["matrices"]
    ]
