"""In a real browser, with no kernel and no network, the figures count exactly as the library does."""

from __future__ import annotations

import json
import re
import statistics

import pytest
from built_book import REPOSITORY

from intruder import count_intruders
from intruder.findings import label_order, label_text
from intruder.records import load_spectra

pytestmark = [pytest.mark.browser, pytest.mark.slow]
CHAPTERS = sorted(path.stem for path in (REPOSITORY / "book").glob("*.ipynb"))
PAGES = ["intro", *CHAPTERS]
EXPLORERS = "book/02_intruder_dimensions.html"
# Sets controls of a figure as a reader does, waits for the redraw, returns the sentence and the milliseconds it took.
MOVE = """async ([number, values]) => {
  const host = document.querySelectorAll('.book-vega')[number], before = +host.dataset.draws, start = performance.now();
  for (const [name, value] of Object.entries(values)) {
    const control = host.querySelector(`[name=${name}]`);
    control.value = value;
    control.dispatchEvent(new Event('input', {bubbles: true}));
  }
  while (+host.dataset.draws === before) await new Promise(done => setTimeout(done, 2));
  return [host.querySelector('.book-readout').textContent, performance.now() - start];
}"""


def wake(page) -> int:
    """Scroll to every figure until it is drawn; returns their number."""
    figures = page.locator(".book-vega")
    for number in range(figures.count()):
        figures.nth(number).scroll_into_view_if_needed()
        page.wait_for_function("n => document.querySelectorAll('.book-vega')[n].dataset.ready", arg=number)
    return figures.count()


def explorers(page) -> list[int]:
    """Positions of the figures that have the explorer's controls."""
    return page.evaluate("[...document.querySelectorAll('.book-vega')].flatMap((host, n) =>"
                         " host.querySelector('[name=eps]') ? [n] : [])")


def expected(spectra, source: str, label: str, epsilon: float, k: int) -> tuple[list[int], list[int]]:
    """Counts and null counts of every seed, straight from the table of spectra through count_intruders."""
    preset, task = source.split(" · ")
    rows = spectra[(spectra["preset"] == preset) & (spectra["task"] == task)]
    rows = rows[rows["run"].str.rsplit("-s", n=1).str[0] == label]
    counts = []
    for column in ("max_cosine", "null_max_cosine"):
        counts.append([sum(count_intruders(matrix.sort_values("index")[column].to_numpy(), epsilon, k)
                           for _, matrix in run.groupby("matrix")) for _, run in rows.groupby("seed")])
    return counts[0], counts[1]


@pytest.mark.parametrize("scheme", ["http", "file"])
@pytest.mark.parametrize("name", PAGES)
def test_pages_ask_no_other_host_and_raise_no_error(open_page, address, scheme, name):
    """Every page, figures drawn, loads from its own folder alone and writes no error to the console."""
    page = open_page(f"{address(scheme)}/book/{name}.html")
    drawn = wake(page)
    page.wait_for_load_state("networkidle")
    assert page.foreign == [] and page.complaints == []
    assert drawn > 0 or name == "intro"
    assert page.locator(".book-vega-error").count() == 0


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_browser_counts_equal_count_intruders(open_page, address, scheme):
    """On a grid of (method or rank, ε, k, task) the sentence's counts are those of the library, seed by seed."""
    spectra = load_spectra(REPOSITORY / "book" / "results")
    page = open_page(f"{address(scheme)}/{EXPLORERS}")
    wake(page)
    times, tried = [], 0
    for number in explorers(page):
        host = page.locator(".book-vega").nth(number)
        sources = host.locator("[name=task] option").all_text_contents()
        presets = {source.split(" · ")[0] for source in sources}
        runs = spectra[spectra["preset"].isin(presets)]["run"].str.rsplit("-s", n=1).str[0]
        labels = sorted(runs.unique(), key=label_order)
        largest = int(host.locator("[name=k]").get_attribute("max"))
        grid = [(0.3, 10), (0.57, 1), (0.9, largest)] if scheme == "http" else [(0.5, 10)]
        for source in sources:
            for choice, label in enumerate(labels):
                for epsilon, k in grid:
                    values = {"task": source, "choice": choice, "eps": epsilon, "k": k}
                    said, took = page.evaluate(MOVE, [number, values])
                    counts, nulls = expected(spectra, source, label, epsilon, k)
                    times.append(took)
                    tried += 1
                    if not counts:
                        assert said == "No run of this method is recorded here."
                        continue
                    listed = re.findall(r"\((?:seed by seed: )?([\d, ]+)\)", said)
                    assert listed == [", ".join(map(str, numbers)) for numbers in (counts, nulls)], (values, said)
                    assert said.startswith(f"{label_text(label)}, {source}: {sum(counts) / len(counts):.1f}")
    assert tried > 0
    print(f"\n{scheme}: {tried} moves, median {statistics.median(times):.0f} ms, slowest {max(times):.0f} ms")


def test_arrow_keys_move_the_sliders(open_page, address):
    """ArrowRight on the focused slider moves one step, is spoken as a name, and changes the sentence."""
    page = open_page(f"{address('http')}/{EXPLORERS}")
    wake(page)
    host = page.locator(".book-vega").nth(explorers(page)[0])
    slider, readout = host.locator("[name=choice]"), host.locator(".book-readout")
    page.evaluate(MOVE, [explorers(page)[0], {"choice": 0}])
    before = readout.text_content()
    slider.focus()
    slider.press("ArrowRight")
    page.wait_for_function("([host, old]) => host.querySelector('.book-readout').textContent !== old",
                           arg=[host.element_handle(), before])
    assert slider.input_value() == "1" and slider.get_attribute("aria-valuetext").startswith(("LoRA r = ", "full ("))
    assert readout.text_content().startswith(slider.get_attribute("aria-valuetext"))
    epsilon = host.locator("[name=eps]")
    epsilon.focus()
    epsilon.press("ArrowRight")
    assert epsilon.input_value() == "0.51" and epsilon.get_attribute("aria-valuetext") == "0.51"


def test_controls_have_names_and_figures_descriptions(open_page, address):
    """Every control has a label, every figure a description and a live readout or a table."""
    page = open_page(f"{address('http')}/{EXPLORERS}")
    wake(page)
    assert page.evaluate("[...document.querySelectorAll('.book-control')].every(row =>"
                         " row.querySelector('label').htmlFor === row.querySelector('input, select').id)")
    ids = page.evaluate("[...document.querySelectorAll('.book-control :is(input, select)')].map(e => e.id)")
    assert len(set(ids)) == len(ids) > 0
    labels = page.evaluate("[...document.querySelectorAll('.book-vega')].map(host => host.getAttribute('aria-label'))")
    assert min(map(len, labels)) > 40
    assert page.locator(".book-readout[aria-live=polite]").count() == page.locator(".book-vega").count()


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [320, 390])
def test_phones_have_no_sideways_scroll(open_page, address, name, width):
    """At phone widths neither the page nor a figure is wider than the screen."""
    page = open_page(f"{address('http')}/book/{name}.html", viewport={"width": width, "height": 844}, has_touch=True)
    wake(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    widths = "[...document.querySelectorAll('.book-vega-target')].map(t => [t.scrollWidth, t.clientWidth])"
    assert [pair for pair in page.evaluate(widths) if pair[0] > pair[1] + 1] == []


def test_dark_mode_keeps_the_values_and_changes_the_colours(open_page, address):
    """Switching the theme redraws the figure in its colours and leaves every control where it was."""
    page = open_page(f"{address('http')}/{EXPLORERS}")
    wake(page)
    number = explorers(page)[0]
    said, _ = page.evaluate(MOVE, [number, {"choice": 1, "eps": 0.71, "k": 7}])
    figure = "document.querySelectorAll('.book-vega')[n]"
    colour = f"n => getComputedStyle({figure}.querySelector('.role-axis-label text')).fill"
    light, draws = page.evaluate(colour, number), page.locator(".book-vega").nth(number).get_attribute("data-draws")
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_function(f"([n, old]) => {figure}.dataset.draws !== old", arg=[number, draws])
    values = page.evaluate(f"n => [...{figure}.querySelectorAll('input')].map(e => e.value)", number)
    assert values == ["1", "0.71", "7"]
    assert page.locator(".book-readout").nth(number).text_content() == said
    assert page.evaluate(colour, number) != light


def test_print_and_no_script_lose_no_information(open_page, address):
    """Each figure carries a table of its numbers that needs no script."""
    page = open_page(f"{address('http')}/{EXPLORERS}", java_script_enabled=False)
    assert page.locator(".book-figure table").count() == page.locator(".book-figure").count() > 0
    specs = page.locator(".book-vega > script").all_text_contents()
    assert all("vega-lite" in json.loads(text)["$schema"] for text in specs)
