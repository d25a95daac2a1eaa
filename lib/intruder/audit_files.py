"""What an audit writes: audit.json, audit.parquet and the page of each model, and the summary of several."""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from .errors import InputError
from .report import report_html
from .whole import write_files

SCHEMA = 1
MEANS = ("rank", "effective_rank", "energy_share")


def result_of(settings: dict, label: str, matrices: list[dict]) -> dict:
    """What audit.json holds for one model: the settings, totals over its matrices, and the matrices."""
    result = {key: settings[key] for key in ("schema", "base", "tuned", "epsilon", "k", "include", "contents")}
    if label:
        number = list(settings["tuned"]).index(label)
        contents = [settings["contents"][0], settings["contents"][1 + number]]
        result |= {"tuned": settings["tuned"][label], "contents": contents}
    routes = [route for matrix in matrices for route in matrix["route"]]
    return result | {
        "total": sum(matrix["count"] for matrix in matrices),
        "vectors": sum(len(matrix["route"]) for matrix in matrices),
        "borderline": sum(sum(matrix["borderline"]) for matrix in matrices),
        "routes": {route: routes.count(route) for route in sorted(set(routes))},
        "seconds": round(sum(matrix["seconds"] for matrix in matrices), 2),
        "matrices": matrices,
    }


def summary_of(settings: dict, results: dict[str, dict]) -> dict:
    """What summary.json holds for several models: the settings, and totals and means of each."""
    models = []
    for label, result in results.items():
        matrices = result["matrices"]
        totals = {key: result[key] for key in ("tuned", "vectors", "total", "borderline", "seconds")}
        means = {key: statistics.fmean(matrix[key] for matrix in matrices) for key in MEANS}
        models.append({"label": label, "matrices": len(matrices)} | totals | means)
    return {key: settings[key] for key in ("schema", "base", "epsilon", "k", "include", "contents")} | {
        "shapes": settings["shapes"],
        "seconds": round(sum(model["seconds"] for model in models), 2),
        "models": models,
    }


def write_audit(out: Path, result: dict) -> None:
    """audit.json, audit.parquet (a row per matrix and j) and report.html, all of them or none."""
    columns = ("singular_values", "max_cosine", "lower", "upper", "intruder", "route", "borderline")
    names = ("singular_value", *columns[1:])
    matrices = result["matrices"]
    depth = [len(matrix["route"]) for matrix in matrices]
    table = {"matrix": [matrix["name"] for matrix, count in zip(matrices, depth, strict=True) for _ in range(count)]}
    table["index"] = [j + 1 for count in depth for j in range(count)]
    for name, column in zip(names, columns, strict=True):
        table[name] = [value for matrix in matrices for value in matrix[column]]
    frame = pd.DataFrame(table).astype({"index": "int32"} | dict.fromkeys(names[:4], "float64"))
    write_files(
        out,
        {
            "report.html": lambda path: path.write_text(report_html(result), encoding="utf-8"),
            "audit.parquet": lambda path: frame.to_parquet(path, index=False),
            "audit.json": lambda path: path.write_text(_json(result), encoding="utf-8"),
        },
    )


def write_summary(out: Path, summary: dict) -> None:
    """summary.json, the last file of an audit of several models: where it is, the folders beside it are whole."""
    write_files(out, {"summary.json": lambda path: path.write_text(_json(summary), encoding="utf-8")})


def _json(value: dict) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def finished_audit(out: Path, settings: dict, alone: bool) -> dict | None:
    """The audit of these settings that `out` holds whole already, if it does; InputError if it holds another one."""
    try:
        result = json.loads((out / ("audit.json" if alone else "summary.json")).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = dict(result)
    if alone:
        known["shapes"] = {matrix["name"]: matrix["shape"] for matrix in result["matrices"]}
    else:
        known["tuned"] = {model["label"]: model["tuned"] for model in result["models"]}
    if any(known.get(key) != settings[key] for key in settings):
        raise InputError(
            f"{out} holds the audit of other models or settings; wanted a new folder: choose it with --out"
        )
    return result


def fingerprint(place: str | Path) -> str:
    """A digest of the names, sizes and times of the weight files of a local folder; the text itself of a hub id."""
    folder = Path(place)
    if not folder.is_dir():
        return str(place)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    listed = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def labels_of(tuned: Sequence[str | Path]) -> dict[str, str | Path]:
    """A name for each model that can be that of a folder: the last parts of its own, as many as tell all apart."""
    tuned = [tuned] if isinstance(tuned, (str, Path)) else list(tuned)
    if not tuned:
        raise InputError("no model was given; wanted at least one folder or hub id beside the base")
    parts = []
    for place in tuned:
        text = os.path.abspath(place) if Path(place).is_dir() else str(place)
        words = [re.sub(r"[^\w.@+=-]", "_", part).lstrip(".") for part in re.split(r"[/\\]", text)]
        parts.append([word for word in words if word] or ["model"])
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["-".join(words[-depth:]) for words in parts]
        if len({label.casefold() for label in labels}) == len(labels):
            return dict(zip(labels, tuned, strict=True))
    twice = next(place for place, words in zip(tuned, parts, strict=True) if parts.count(words) > 1)
    raise InputError(f"{twice} was given twice; wanted every model once")


def table_of(summary: dict) -> str:
    """The summary as text: a line per model."""
    rows = [("model", "matrices", "rank", "effective rank", "intruders", "of", "energy share")]
    for model in summary["models"]:
        share = f"{100 * model['energy_share']:.1f} %"
        ranks = f"{model['rank']:.4g}", f"{model['effective_rank']:.1f}"
        rows.append((model["label"], str(model["matrices"]), *ranks, str(model["total"]), str(model["vectors"]), share))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]))) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
