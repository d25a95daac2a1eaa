"""The chapters are thin, clean and honest, and the built pages load nothing from anywhere else."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml
from built_book import REPOSITORY, built_book
from IPython.core.inputtransformer2 import TransformerManager

CHAPTERS = sorted((REPOSITORY / "book").glob("*.ipynb"))
ALLOWED_IMPORTS = {"intruder", "numpy", "pandas", "altair", "IPython", "os", "sys"}
LOADS = re.compile(
    r'<(?:script|img|iframe|source|video|audio|embed|object)\b[^>]*\b(?:src|data)\s*=\s*"(?:https?:)?//[^"]+'
    r'|<link\b(?=[^>]*rel="(?:stylesheet|preload|prefetch|preconnect|icon|modulepreload)")'
    r'[^>]*href\s*=\s*"(?:https?:)?//[^"]+'
    r'|@import\s+(?:url\()?["\']?(?:https?:)?//[^)"\']+', re.IGNORECASE)
MOST_LINES, LONGEST_CELL, LONGEST_FUNCTION = 80, 15, 8

each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> list[tuple[str, set[str]]]:
    """(source, tags) of every code cell, magics turned into plain calls so that the source parses."""
    transform = TransformerManager().transform_cell
    return [(transform("".join(cell["source"])), set(cell["metadata"].get("tags", [])))
            for cell in notebook["cells"] if cell["cell_type"] == "code"]


def lines_of(source: str) -> int:
    return sum(bool(line.strip()) for line in source.splitlines())


def leftovers(notebook: dict) -> list[str]:
    """What a run leaves behind in a notebook and git must not hold."""
    found = ["widget state"] if "widgets" in notebook["metadata"] else []
    for number, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        found += [f"cell {number}: outputs"] if cell["outputs"] else []
        found += [f"cell {number}: execution count"] if cell["execution_count"] is not None else []
    return found


def over_budget(notebook: dict) -> list[str]:
    """Chapters teach; the library works: at most 80 lines of code, 15 a cell, 8 a function, no class, no loop."""
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    found = [f"{total} lines of code"] if (total := sum(map(lines_of, cells))) > MOST_LINES else []
    found += [f"a cell of {lines_of(source)} lines" for source in cells if lines_of(source) > LONGEST_CELL]
    for source, _ in code_cells(notebook):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.ClassDef, ast.For, ast.While)):
                found.append(f"a {type(node).__name__} statement")
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST_FUNCTION:
                found.append(f"a function of {node.end_lineno - node.lineno + 1} lines: {node.name}")
    return found


def hidden_hands(notebook: dict) -> list[str]:
    """Names that a cell assigns out of the reader's sight and a later cell reads; imports may be out of sight."""
    cells, found = code_cells(notebook), []
    for number, (source, tags) in enumerate(cells):
        if not any(tag.startswith(("hide-", "remove-")) for tag in tags):
            continue
        nodes = list(ast.walk(ast.parse(source)))
        assigned = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        assigned |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for later, _ in cells[number + 1:]:
            read_later = {node.id for node in ast.walk(ast.parse(later)) if isinstance(node, ast.Name)}
            found += [f"cell {number} assigns {name}" for name in sorted(assigned & read_later)]
    return found


def imports(notebook: dict) -> set[str]:
    """The top-level packages that the code cells import."""
    nodes = [node for source, _ in code_cells(notebook) for node in ast.walk(ast.parse(source))]
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}}


def test_there_are_chapters():
    """The tests below are not empty."""
    assert len(CHAPTERS) >= 2


@each_chapter
def test_chapters_are_committed_clean(path):
    """No outputs, no execution counts, no widget state."""
    assert leftovers(read(path)) == []


@each_chapter
def test_chapters_are_thin(path):
    """Budgets for lines, cells and functions hold."""
    assert over_budget(read(path)) == []


@each_chapter
def test_no_hidden_hand(path):
    """No cell outside the reader's sight assigns a name that a later cell reads."""
    assert hidden_hands(read(path)) == []


@each_chapter
def test_chapters_import_only_the_library_and_the_usual(path):
    """A page imports intruder, numpy, pandas, altair and IPython; anything else belongs in the library."""
    assert imports(read(path)) <= ALLOWED_IMPORTS


@each_chapter
def test_first_cell_installs_on_colab_and_nowhere_else(path):
    """The first code cell is the same in every chapter, folded, and runs nothing outside Colab."""
    source, tags = code_cells(read(path))[0]
    assert tags == {"hide-cell"}
    assert source == code_cells(read(CHAPTERS[0]))[0][0]
    raw = "".join(next(cell for cell in read(path)["cells"] if cell["cell_type"] == "code")["source"])
    assert "!git clone" in raw and '!pip install -q "./lib[train]"' in raw and "%cd -q book" in raw
    assert "-e " not in raw, "an editable install is not importable in the kernel that is running"
    calls = []
    ipython = type("IPython", (), {"run_line_magic": lambda self, *rest: calls.append(rest),
                                   "system": lambda self, *rest: calls.append(rest)})()
    exec(compile(source, path.name, "exec"), {"get_ipython": lambda: ipython})
    assert calls == []


def notebook_of(*cells: tuple[str, list[str]]) -> dict:
    return {"metadata": {}, "cells": [{"cell_type": "code", "source": source, "metadata": {"tags": tags},
                                       "outputs": [], "execution_count": None} for source, tags in cells]}


def test_the_checkers_find_what_they_look_for():
    """Each checker above fails on a notebook that breaks its rule."""
    broken = notebook_of(("x = 1", []))
    broken["cells"][0] |= {"outputs": [{}], "execution_count": 3}
    broken["metadata"]["widgets"] = {}
    assert len(leftovers(broken)) == 3
    assert over_budget(notebook_of(("x = 1\n" * 16, []))) == ["a cell of 16 lines"]
    assert over_budget(notebook_of(*[("x = 1\n" * 15, [])] * 6)) == ["90 lines of code"]
    assert over_budget(notebook_of(("for i in x:\n    pass", []))) == ["a For statement"]
    assert over_budget(notebook_of(("def f():\n" + "    x = 1\n" * 8, []))) == ["a function of 9 lines: f"]
    hidden = notebook_of(("accuracy = 1", ["remove-cell"]), ("accuracy", []))
    assert hidden_hands(hidden) == ["cell 0 assigns accuracy"]
    assert hidden_hands(notebook_of(("import numpy as np", ["hide-cell"]), ("np.pi", []))) == []
    assert imports(notebook_of(("from torch import nn\nimport scipy.linalg", []))) == {"torch", "scipy"}


def test_the_contents_list_every_page_and_no_other():
    """_toc.yml names each chapter and page of book/, once."""
    toc = yaml.safe_load((REPOSITORY / "_toc.yml").read_text(encoding="utf-8"))
    listed = [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]
    pages = [path for pattern in ("*.md", "*.ipynb") for path in (REPOSITORY / "book").glob(pattern)]
    assert sorted(listed) == sorted(f"book/{path.stem}" for path in pages)


def test_the_readme_names_every_module():
    """The tree in README.md has a line for each module of the library and no line for one that is gone."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    tree = set(re.findall(r"^    (\w+\.py) ", readme, re.MULTILINE))
    modules = {path.name for path in (REPOSITORY / "lib" / "intruder").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert modules == tree


def test_the_build_is_strict():
    """Notebooks run on every build, a failing one stops it, and no page gets scripts of a CDN by configuration."""
    config = yaml.safe_load((REPOSITORY / "_config.yml").read_text(encoding="utf-8"))
    assert config["execute"]["execute_notebooks"] == "force" and config["execute"]["raise_on_error"]
    assert config["sphinx"]["config"]["nb_ipywidgets_js"] == {}
    assert "sphinx_thebe" not in config["sphinx"]["config"]["extensions"]
    assert "--all -W -n --keep-going" in (REPOSITORY / "Makefile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    html = built_book()
    return {str(path.relative_to(html)): path.read_text(encoding="utf-8") for path in sorted(html.rglob("*.html"))}


@pytest.mark.slow
def test_every_page_was_built(pages):
    """Each chapter and the opening page became a page."""
    wanted = {f"book/{path.stem}.html" for path in CHAPTERS} | {"book/intro.html", "index.html"}
    assert wanted <= set(pages)


@pytest.mark.slow
def test_pages_load_nothing_from_another_host(pages):
    """No script, style, image or frame of any page comes from another host."""
    assert {name: found for name, text in pages.items() if (found := LOADS.findall(text))} == {}


@pytest.mark.slow
def test_pages_hold_no_widget_state(pages):
    """No live widget, a progress bar for example, leaked into a static page."""
    assert [name for name, text in pages.items() if "widget-view+json" in text or "require.min.js" in text] == []


@pytest.mark.slow
def test_chapters_have_their_figures_and_their_colab_button(pages):
    """Each chapter has a figure with a table of its numbers, and a button that opens it on Colab."""
    for path in CHAPTERS:
        text, button = pages[f"book/{path.stem}.html"], r"https://colab\.research\.google\.com/github/[\w.-]+/[\w.-]+"
        assert text.count('class="book-figure"') == text.count('<details class="book-table">') > 0
        assert re.search(rf"{button}/blob/main/book/{path.name}", text)


def test_the_search_for_loads_finds_them():
    """The expression above sees scripts, styles and images of other hosts, and lets links and own files pass."""
    assert LOADS.search('<script src="https://cdn.example/x.js">')
    assert LOADS.search('<img alt="" src="//cdn.example/x.png">')
    assert LOADS.search('<link rel="stylesheet" href="https://cdn.example/x.css">')
    assert not LOADS.search('<a href="https://example.org">') and not LOADS.search('<script src="../_static/x.js">')
