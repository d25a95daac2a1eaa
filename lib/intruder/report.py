"""The page of an audit: one file that needs no network, with sliders for epsilon and k. It never imports torch."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

# The grid of `charts`, which would bring Altair with it.
GRID = np.arange(1, 1001) / 1000

ASSETS = Path(__file__).parent / "assets" / "report"
COLUMNS = (
    "matrix",
    "shape",
    "rank",
    "effective rank",
    "intruders",
    "energy share",
    "least max cosine",
    "null expectation",
    "decided by",
)


def report_html(result: dict) -> str:
    """The page for what audit.json holds. Every name from the checkpoint is data, never markup.

    Counts in the page follow the rule of `charts`: a cosine m is stored as v = #{ grid points g <= m } on the grid
    0.001, 0.002 ... 1, so m < E/1000 exactly when v < E. Where a route proved only lower <= m <= upper, a vector counts
    as an intruder if upper < epsilon, as a match if lower >= epsilon, and else as not decided; at the audited epsilon
    the verdicts of the audit stand. Without JavaScript the page is a table of the audited counts.
    """
    matrices = result["matrices"]
    near = f"{result['borderline']} of {result['vectors']} verdicts are borderline. " if result["borderline"] else ""
    routes = ", ".join(f"{route} {count}" for route, count in result["routes"].items())
    values = {
        "TITLE": f"Intruder dimensions of {_last(result['tuned'])}",
        "BASE": _last(result["base"]),
        "TUNED": _last(result["tuned"]),
        "TOTAL": f"{result['total']} intruder dimensions among {result['vectors']} vectors of {len(matrices)} matrices "
        f"at ε = {result['epsilon']:g}, k = {result['k']}.",
        "ROUTES": f"{near}Vectors decided by each route: {routes}.",
        "FOOT": f"Audited at ε = {result['epsilon']:g}, k = {result['k']} in {result['seconds']:.1f} s. Definition: "
        "arXiv 2410.21228, Algorithm 1; left singular vectors, strict <.",
    }
    whole = {"TABLE": _table(matrices), "DATA": _data(result), "STYLE": _asset("page.css"), "SCRIPT": _asset("page.js")}
    filled = {name: html.escape(value) for name, value in values.items()} | whole
    return re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], _asset("page.html"))


def place_of(name: str) -> tuple[str, int, str]:
    """(group, layer, module): 'encoder.layer.3.mlp.experts.7.up' -> ('encoder.layer', 3, 'mlp.experts.*.up')."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return "outside the layers", 0, name
    rest = ["*" if part.isdecimal() else part for part in parts[at + 1 :]]
    return ".".join(parts[:at]), int(parts[at]), ".".join(rest) or "weight"


def _data(result: dict) -> str:
    thousandth = round(1000 * result["epsilon"])
    on_grid = abs(thousandth - 1000 * result["epsilon"]) < 1e-9
    start = min(max(thousandth, 1), 1000)
    rows = []
    for matrix in result["matrices"]:
        group, layer, module = place_of(matrix["name"])
        known = matrix["max_cosine"]
        rows.append(
            {
                "name": matrix["name"],
                "group": group,
                "layer": layer,
                "module": module,
                "shape": matrix["shape"],
                "rank": matrix["rank"],
                "effective": round(matrix["effective_rank"], 3),
                "null": round(matrix["null_expectation"], 4),
                "m": [None if value is None else round(value, 4) for value in known],
                "lo": _bounds(known, matrix["lower"]),
                "hi": _bounds(known, matrix["upper"]),
                "hit": [int(hit) for hit in matrix["intruder"]],
                "near": [int(near) for near in matrix["borderline"]],
                "route": matrix["route"],
                "sv": [float(f"{value:.6g}") for value in matrix["singular_values"]],
            }
        )
    data = {
        "E": start,
        "exact": thousandth if on_grid else None,
        "step": 10 if start % 10 == 0 else 1,
        "k": result["k"],
        "matrices": rows,
    }
    # "<" could end the script element or begin a comment; JSON allows it to be written as an escape.
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _bounds(known: list[float | None], bounds: list[float]) -> list[int]:
    values = [bound if value is None else value for value, bound in zip(known, bounds)]
    return np.searchsorted(GRID, values, side="right").tolist()


def _table(matrices: list[dict]) -> str:
    head = "".join(f'<th scope="col">{column}</th>' for column in COLUMNS)
    return f'<table id="matrices"><thead><tr>{head}</tr></thead><tbody>{"".join(map(_row, matrices))}</tbody></table>'


def _row(matrix: dict) -> str:
    routes = ", ".join(f"{route} {count}" for route, count in Counter(matrix["route"]).items())
    known = [value for value in matrix["max_cosine"] if value is not None]
    smallest = min(known, default=None)
    if smallest is None or min(matrix["upper"]) < smallest:
        smallest_text = f"≤ {min(matrix['upper']):.3f}"
    else:
        smallest_text = f"{smallest:.3f}"
    rows, columns = matrix["shape"]
    cells = [
        ("", f"{rows} × {columns}", rows * columns),
        ("", matrix["rank"], matrix["rank"]),
        ("", f"{matrix['effective_rank']:.1f}", matrix["effective_rank"]),
        ("count", matrix["count"], None),
        ("energy", f"{100 * matrix['energy_share']:.1f} %", None),
        ("", smallest_text, min([*known, *matrix["upper"]])),
        ("", f"{matrix['null_expectation']:.3f}", None),
        ("", routes, 0),
    ]
    return f'<tr><th scope="row">{html.escape(matrix["name"])}</th>' + "".join(_cell(*cell) for cell in cells) + "</tr>"


def _cell(kind: str, text: object, value: float | None) -> str:
    kind = f' class="{kind}"' if kind else ""
    value_text = "" if value is None else f' data-value="{value:.6g}"'
    return f"<td{kind}{value_text}>{html.escape(str(text))}</td>"


def _last(place: str) -> str:
    """How the page calls a model: a hub id as it is, a folder by its last two names."""
    parts = [part for part in re.split(r"[/\\]", place) if part not in ("", ".", "..")]
    return "/".join(parts[-2:]) or place


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
