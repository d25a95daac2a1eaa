"""Sweeps as data: a file that says which runs there are; this module runs those that have no record yet.

A sweep file is one JSON object: `base` (values shared by every run), `methods` (a list of differences, each with its
own `learning_rates` grid), `grid` (the list of seeds, and of tasks if there are several), and `tuning` (differences of
the trials).
First every rate of every grid is tried once on the validation data with the tuning seed; the best one (the smaller of
two equals) is then used by the reported runs. Both kinds are records.
"""

from __future__ import annotations

import gc
import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from .config import RunConfig, check_out, make_config, read_config
from .errors import InputError
from .records import RunRecord, load_records

KEYS = ("base", "methods", "grid", "tuning")
RATES = "learning_rates"
LOCAL = ("model", "data")  # where things lie on one machine: no part of what a run is


def read_sweep(path: str | Path) -> dict:
    """The sweep of a file, checked: InputError names a missing or unknown part."""
    sweep = read_config(path)
    unknown, missing = set(sweep) - set(KEYS), set(KEYS) - set(sweep)
    if unknown or missing:
        raise InputError(f"{path}: {'unknown' if unknown else 'missing'} part {sorted(unknown or missing)[0]!r}; "
                         f"wanted {', '.join(KEYS)}")
    for part in KEYS:
        if not isinstance(sweep[part], list if part == "methods" else dict):
            raise InputError(f"{path}: {part} is {json.dumps(sweep[part])[:60]}; wanted "
                             + ("a list of methods" if part == "methods" else "an object of keys and values"))
    for method in sweep["methods"]:
        if not isinstance(method, dict) or not _filled(method.get(RATES)):
            raise InputError(f"{path}: method {json.dumps(method)} has no {RATES}; wanted a list such as [1e-4, 3e-4]")
    grid = sweep["grid"]
    if not set(grid) <= {"task", "seed"} or not _filled(grid.get("seed")) or not _filled(grid.get("task", [""])):
        raise InputError(f"{path}: grid is {json.dumps(grid)[:90]}; wanted a list of seeds and, if there are several, "
                         "of tasks, e.g. {\"task\": [\"nli\"], \"seed\": [0, 1]}")
    return sweep


def _filled(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0


def check_runs(sweep: dict) -> None:
    """Raise InputError unless every run of the sweep is a valid configuration with a place of its own."""
    seen = set()
    reported = [make_config(values | {"learning_rate": rates[0], "seed": seed})
                for values, rates in _cells(sweep) for seed in sweep["grid"]["seed"]]
    for config in tuning_runs(sweep) + reported:
        path = place(config, "") / config.run
        if path in seen:
            raise InputError(f"the sweep has two runs named {path}; wanted names that differ (task, method, rank, and "
                             "seed or rate): put the others into a sweep with another --out")
        seen.add(path)


def _cells(sweep: dict) -> Iterator[tuple[dict, list[float]]]:
    """(values without a seed, grid of learning rates) for every task and method of the sweep."""
    tasks = sweep["grid"].get("task", [None])
    for task, method in itertools.product(tasks, sweep["methods"]):
        values = sweep["base"] | {key: value for key, value in method.items() if key != RATES}
        yield values | ({"task": task} if task else {}), method[RATES]


def tuning_runs(sweep: dict) -> list[RunConfig]:
    """The learning-rate trials of a sweep; a grid of one rate needs none."""
    return [make_config(values | sweep["tuning"] | {"learning_rate": rate, "stage": "tuning"})
            for values, rates in _cells(sweep) if len(rates) > 1 for rate in rates]


def best_rate(trials: list[dict]) -> float:
    """The learning rate with the highest validation accuracy; the smaller of two equals."""
    return min(trials, key=lambda trial: (-trial["validation_accuracy"], trial["learning_rate"]))["learning_rate"]


def report_runs(sweep: dict, folder: str | Path) -> list[RunConfig]:
    """The reported runs, each with the rate chosen from the trials under `folder`; cells still untried are left out."""
    tried = {}
    for record in load_records(folder, stage="tuning") if Path(folder).is_dir() else []:
        config = record.config
        cell = tuple(config[key] for key in ("preset", "task", "method", "rank", "alpha"))
        tried.setdefault(cell, []).append(
            {"learning_rate": config["learning_rate"], "validation_accuracy": record.metrics["validation_accuracy"]})
    runs = []
    for values, rates in _cells(sweep):
        probe = make_config(values | {"learning_rate": rates[0]})
        trials = tried.get((probe.preset, probe.task, probe.method, probe.rank, probe.alpha), [])
        trials = [trial for trial in trials if trial["learning_rate"] in rates]
        if len(rates) > 1 and len(trials) < len(rates):
            continue
        rate = best_rate(trials) if trials else rates[0]
        runs += [make_config(values | {"learning_rate": rate, "seed": seed}) for seed in sweep["grid"]["seed"]]
    return runs


def place(config: RunConfig, out: str | Path) -> Path:
    """The folder of a run's record under `out`."""
    folder = Path(out) / config.preset / config.task
    return folder / "tuning" if config.stage == "tuning" else folder


def is_done(config: RunConfig, out: str | Path) -> bool:
    """Whether the run's record is there; InputError if it is the record of another configuration."""
    path = place(config, out) / f"{config.run}.json"
    if not path.is_file():
        return False
    found, wanted = RunRecord.from_json(path.read_text(encoding="utf-8")).config, config.values()
    for key in wanted:
        if key in found and key not in LOCAL and found[key] != wanted[key]:
            raise InputError(f"{path} was made with {key} {json.dumps(found[key])}, and this sweep wants "
                             f"{json.dumps(wanted[key])}: remove it, or choose another --out")
    return True


def run_sweep(path: str | Path, out: str | Path, jobs: int = 1, say=print, **local) -> int:
    """Run what has no record under `out` yet: the trials, then the reported runs. Returns how many runs were made.

    `jobs` processes work side by side, one thread each. `local` are values such as model= and data= that depend on the
    machine. A killed sweep is started again with the same call: finished runs are skipped and the interrupted ones
    continue from their checkpoints.

    Raises InputError before the first run for a sweep that cannot be, and after the last one if some runs failed.
    """
    sweep = read_sweep(path)
    sweep["base"] = sweep["base"] | {key: value for key, value in local.items() if value is not None}
    check_runs(sweep)
    check_out(out)
    command, failed = f"intruder sweep {Path(path).stem}", {}
    made = _run_all(tuning_runs(sweep), out, jobs, say, command, failed)
    made += _run_all(report_runs(sweep, out), out, jobs, say, command, failed)
    if failed:
        run, reason = next(iter(failed.items()))
        raise InputError(f"{len(failed)} of {made} runs failed; {run}: {reason}")
    return made


def _run_all(configs: list[RunConfig], out: str | Path, jobs: int, say, command: str, failed: dict[str, str]) -> int:
    todo = [config for config in configs if not is_done(config, out)]
    say(f"{len(configs)} runs, {len(configs) - len(todo)} with a record, {len(todo)} to do, {jobs} at a time")
    if not todo:
        return 0
    start = time.perf_counter()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        futures = {pool.submit(_one, config.values(), str(place(config, out)), command): config for config in todo}
        for done, future in enumerate(as_completed(futures), start=1):
            config, passed = futures[future], time.perf_counter() - start
            outcome, name = future.result(), f"{config.preset}/{config.task}/{config.run}"
            if "failed" in outcome:
                failed[name] = outcome["failed"]
            say(f"[{done}/{len(todo)}] {name} rate {config.learning_rate:g}: "
                f"{json.dumps(outcome)}; {passed / 60:.1f} min passed, about "
                f"{passed / done * (len(todo) - done) / 60:.1f} min to go")
    return len(todo)


def _one_thread() -> None:
    import torch
    torch.set_num_threads(1)


def _one(values: dict, folder: str, command: str) -> dict:
    """Make one run in a worker process; what it says is shown beside the estimate of the time left."""
    from .run import run_config
    gc.collect()  # models and their wrappers refer to each other in circles, and a worker makes many
    try:
        record = run_config(make_config(values), folder, command, progress=False).record
    except InputError as error:
        return {"failed": str(error)}
    return {"validation": record.metrics["validation_accuracy"], "test": record.metrics["test_accuracy"]}
