"""Sweeps as data: a file that says which runs there are; this module runs those that have no record yet.

A sweep file is one JSON object: `base` (values shared by every run), `methods` (a list of differences, each with its own
`learning_rates` grid), `grid` (lists of values to combine, e.g. task and seed), and `tuning` (differences of the trials).
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

from .config import RunConfig, make_config, read_config
from .errors import InputError
from .records import load_records

KEYS = ("base", "methods", "grid", "tuning")
RATES = "learning_rates"


def read_sweep(path: str | Path) -> dict:
    """The sweep of a file, checked: InputError names a missing or unknown part."""
    sweep = read_config(path)
    unknown, missing = set(sweep) - set(KEYS), set(KEYS) - set(sweep)
    if unknown or missing:
        raise InputError(f"{path}: {'unknown' if unknown else 'missing'} part {sorted(unknown or missing)[0]!r}; wanted "
                         f"{', '.join(KEYS)}")
    for method in sweep["methods"]:
        if not method.get(RATES):
            raise InputError(f"{path}: method {method} has no {RATES}; wanted a list such as [1e-4, 3e-4]")
    return sweep


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
        tried.setdefault((config["preset"], config["task"], config["method"], config["rank"], config["alpha"]), []).append(
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
    """Whether the run's record is there."""
    return (place(config, out) / f"{config.run}.json").is_file()


def run_sweep(path: str | Path, out: str | Path, jobs: int = 1, say=print, **local) -> int:
    """Run what has no record under `out` yet: the trials, then the reported runs. Returns how many runs were made.

    `jobs` processes work side by side, one thread each. `local` are values such as model= and data= that depend on the
    machine. A killed sweep is started again with the same call: finished runs are skipped and the interrupted ones
    continue from their checkpoints.
    """
    sweep = read_sweep(path)
    sweep["base"] = sweep["base"] | {key: value for key, value in local.items() if value is not None}
    made = _run_all(tuning_runs(sweep), out, jobs, say, f"intruder sweep {Path(path).stem}")
    return made + _run_all(report_runs(sweep, out), out, jobs, say, f"intruder sweep {Path(path).stem}")


def _run_all(configs: list[RunConfig], out: str | Path, jobs: int, say, command: str) -> int:
    todo = [config for config in configs if not is_done(config, out)]
    say(f"{len(configs)} runs, {len(configs) - len(todo)} with a record, {len(todo)} to do, {jobs} at a time")
    if not todo:
        return 0
    start = time.perf_counter()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        futures = {pool.submit(_one, config.values(), str(place(config, out)), command): config for config in todo}
        for done, future in enumerate(as_completed(futures), start=1):
            config, passed = futures[future], time.perf_counter() - start
            outcome = future.result()
            say(f"[{done}/{len(todo)}] {config.preset}/{config.task}/{config.run} rate {config.learning_rate:g}: "
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
