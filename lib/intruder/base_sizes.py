"""Alternatives to the nano base: other sizes pre-trained for fewer steps, judged without looking at any intruder.

Three things are looked at: the held-out loss, the accuracy of a head trained on the frozen encoder for each task, and
how many singular values stand clear of the random bulk. The base itself is judged by the same heads.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from .config import check_out, make_config, read_config
from .errors import InputError
from .models import nano_folder
from .pretrain import NANO, check_settings, describe, pretrain
from .provenance import provenance, write_json
from .records import load_base_record
from .run import run_config

PARTS = {"sizes": list, "pretrain": dict, "head": dict, "tasks": list}


def compare_sizes(path: str | Path, out: str | Path, say=print, command: str = "") -> list[dict]:
    """Pre-train every size of the file `path`, judge it and the committed base, and write one record each to `out`.

    The file is one JSON object: `sizes` (a list of differences from `pretrain.NANO`), `pretrain` (differences that all
    of them share), `head` (a `RunConfig` without a task) and `tasks`. A size that has a record in `out` is not made
    again. No weights are kept. Returns the records, the committed base's last.
    Raises InputError for a missing or unknown part or setting, and for two sizes of one name, before anything is made.
    """
    plan = read_config(path)
    if set(plan) != set(PARTS):
        raise InputError(f"{path}: parts are {', '.join(sorted(plan))}; wanted {', '.join(PARTS)}")
    for part, kind in PARTS.items():
        if not isinstance(plan[part], kind) or part == "sizes" and not all(isinstance(size, dict) for size in plan[part]):
            raise InputError(f"{path}: {part} is {json.dumps(plan[part])[:60]}; wanted "
                             + {"sizes": "a list of objects", "tasks": "a list of tasks"}.get(part, "an object"))
    heads = [make_config(plan["head"] | {"task": task}) for task in plan["tasks"]]
    settings_of = {}
    for size in plan["sizes"]:
        settings = plan["pretrain"] | size
        check_settings(settings)
        name = "{layers}x{hidden_size}".format_map(NANO | settings)
        if name in settings_of:
            raise InputError(f"{path}: two sizes are {name}; wanted sizes that differ in layers or hidden_size")
        settings_of[name] = settings
    check_out(out)
    records = []
    for name, settings in settings_of.items():
        with tempfile.TemporaryDirectory() as folder:
            made = _once(Path(out) / f"{name}.json", lambda: _judged(
                name, pretrain(Path(folder) / "base", settings, progress=False, command=command),
                Path(folder) / "base", heads, command))
        records.append(made)
        say(f"{name}: held-out loss {made['held_out_loss']:.3f}, heads {made['head_accuracy']}")
    base = load_base_record()
    records.append(_once(Path(out) / "nano.json", lambda: _judged("nano", base, nano_folder(), heads, command)))
    return records


def _once(path: Path, make) -> dict:
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    record = make()
    write_json(path, record)
    return record


def _judged(name: str, made: dict, folder: Path, heads: list, command: str) -> dict:
    """The record of one size: settings, loss, spectral head and the accuracy of each task's head."""
    origin, clock, accuracy = provenance(command), time.perf_counter(), {}
    for head in heads:
        run = run_config(make_config(head.values() | {"model": str(folder)}), progress=False)
        accuracy[head.task] = run.record.metrics["validation_accuracy"]
    spectra = describe(folder, NANO["seed"])["spectral_head"]
    seconds = made["provenance"]["wall_seconds"] + time.perf_counter() - clock
    return {"schema": 1, "kind": "size", "name": name, "settings": made["settings"], "parameters": made["parameters"],
            "held_out_loss": made["curve"][-1]["held_out_loss"], "head_accuracy": accuracy,
            "head": heads[0].values() | {"task": None},
            "spectral_head": sorted(row["head"] for row in spectra),
            "provenance": origin | {"wall_seconds": round(seconds, 1)}}
