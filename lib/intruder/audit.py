"""Audit a fine-tuned model on disk: intruders, energies and ranks of every matrix; resumable, on many processes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from .audit_matrix import audit_matrix
from .changes import PairSource
from .errors import InputError
from .estimate import Estimate, in_words
from .intruders import check_epsilon, check_k
from .journal import Journal, launched_as, share
from .report import report_html
from .weights import pair_sources
from .whole import write_files

SCHEMA = 1


def audit(
    base: str | Path,
    tuned: str | Path,
    k: int = 10,
    epsilon: float = 0.5,
    out: str | Path = "audit",
    device: str | None = None,
    resume: bool = False,
    include: str | None = None,
    cache: str | Path | None = None,
    cache_bytes: int = 20 * 2**30,
    say: Callable[[str], None] | None = None,
) -> dict | None:
    """Compare every counted matrix of `tuned` with `base`, write `out`, and return what audit.json holds.

    `base` and `tuned` are what `weights.pair_sources` takes: folders or hub ids; the tuned side a checkpoint or an
    adapter. Per matrix W0 -> W = W0 + Delta W of shape (m, p), n = min(m, p), with u_j, sigma_j of W, j = 1..k:

    count            #{ j <= k : max_i |<x_i, u_j>| < epsilon }, as `compare.compare` decides it
    max_cosine       max_i |<x_i, u_j>|, or None where a route proved only `lower` <= max_cosine <= `upper`
    energy_share     sum over the intruders of sigma_j^2 / sum over j <= k of sigma_j^2
    rank             rank of Delta W: of its factors, else the number of its singular values above rounding
    effective_rank   exp(H) of the singular values of Delta W (0 if Delta W = 0)
    null_expectation E max_i |<x_i, u>| for a uniformly random direction u: what a new direction is expected to score

    Writes audit.json, audit.parquet (a row per matrix and j) and report.html (one page, no network) when all is done,
    and not before; until then `out` holds a journal. `resume` continues an audit that was stopped. Under `accelerate
    launch` or `torchrun` each process does its share of the matrices (RANK, WORLD_SIZE; a GPU each by LOCAL_RANK), and
    the first one writes; the others return None. `include` keeps the matrices whose name it finds (`re.search`).
    `cache` is a folder for decompositions of the base, reused by later audits on the same base. `say` receives lines
    about the progress. Memory: one matrix and its working copies per process.

    Raises InputError for settings out of range, a pattern that matches nothing, an `out` that is in use, a disk that
    is full, and everything that `pair_sources` and `compare` refuse.
    """
    began, say = time.time(), say or (lambda line: None)
    epsilon, k, (rank, world) = check_epsilon(epsilon), check_k(k), launched_as()
    place = _device(device, rank)
    sources = _chosen(pair_sources(base, tuned), include)
    _check_depth(sources, k)
    settings = {
        "schema": SCHEMA,
        "base": str(base),
        "tuned": str(tuned),
        "k": k,
        "epsilon": epsilon,
        "include": include,
        "contents": [_fingerprint(base), _fingerprint(tuned)],
        "shapes": {source.name: list(source.shape) for source in sources},
    }
    finished = _finished(Path(out), settings) if resume else None
    if finished is not None:
        say(f"{out} is complete already")
        return finished if rank == 0 else None
    mine = share([_cost(source.shape) for source in sources], rank, world)
    if rank and not mine:
        return None
    journal = Journal(out, settings, rank, resume)
    try:
        _work([sources[i] for i in mine], journal, k, epsilon, place, _store(cache, cache_bytes), say, world)
        if rank:
            return None
        done = journal.wait([source.name for source in sources], began)
        result = _result(settings, [done[source.name] for source in sources])
        _write(Path(out), result)
        journal.finish()
        return result
    except BaseException as error:
        if isinstance(error, InputError):
            journal.fail(str(error))
        journal.abandon()
        raise


def _work(sources: list[PairSource], journal: Journal, k: int, epsilon: float, device: str, store, say, world) -> None:
    todo = [source for source in sources if source.name not in journal.done]
    before = len(sources) - len(todo)
    whose = f" of this process, one of {world}" if world > 1 else ""
    if before:
        say(f"{before} of {len(sources)} matrices{whose} are done already")
    estimate, clock, found = Estimate(), time.monotonic(), 0
    for number, source in enumerate(todo):
        start = time.monotonic()
        try:
            record = audit_matrix(source.load_change(), k, epsilon, device, store)
        except InputError as error:
            raise InputError(str(error) if source.name in str(error) else f"{source.name}: {error}") from error
        seconds = time.monotonic() - start
        journal.add(record | {"seconds": round(seconds, 4)})
        estimate.add(source.shape, seconds)
        found += record["count"]
        left = estimate.remaining(rest.shape for rest in todo[number + 1 :])
        words = "" if left is None or number + 1 == len(todo) else f", {_range(*left)} left"
        say(
            f"{before + number + 1}/{len(sources)} matrices{whose}, {found} intruders, "
            f"{in_words(time.monotonic() - clock)}{words}: {source.name}"
        )


def _range(low: float, high: float) -> str:
    low_words, high_words = in_words(low), in_words(high)
    return f"about {high_words}" if low_words == high_words else f"{low_words} to {high_words}"


def _result(settings: dict, matrices: list[dict]) -> dict:
    result = {key: settings[key] for key in ("schema", "base", "tuned", "epsilon", "k", "include", "contents")}
    routes = [route for matrix in matrices for route in matrix["route"]]
    return result | {
        "total": sum(matrix["count"] for matrix in matrices),
        "vectors": sum(len(matrix["route"]) for matrix in matrices),
        "borderline": sum(sum(matrix["borderline"]) for matrix in matrices),
        "routes": {route: routes.count(route) for route in sorted(set(routes))},
        "seconds": round(sum(matrix["seconds"] for matrix in matrices), 2),
        "matrices": matrices,
    }


def _write(out: Path, result: dict) -> None:
    columns = ("singular_values", "max_cosine", "lower", "upper", "intruder", "route", "borderline")
    names = ("singular_value", *columns[1:])
    rows = [
        {"matrix": matrix["name"], "index": j + 1, **{name: matrix[column][j] for name, column in zip(names, columns)}}
        for matrix in result["matrices"]
        for j in range(len(matrix["route"]))
    ]
    floats = dict.fromkeys(names[:4], "float64")
    frame = pd.DataFrame(rows).astype({"index": "int32"} | floats)
    text = json.dumps(result, indent=1, allow_nan=False)
    write_files(
        out,
        {
            "report.html": lambda path: path.write_text(report_html(result), encoding="utf-8"),
            "audit.parquet": lambda path: frame.to_parquet(path, index=False),
            "audit.json": lambda path: path.write_text(text + "\n", encoding="utf-8"),
        },
    )


def _finished(out: Path, settings: dict) -> dict | None:
    """The audit of these settings that `out` holds whole already, if it does."""
    try:
        result = json.loads((out / "audit.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    shapes = {matrix["name"]: matrix["shape"] for matrix in result["matrices"]}
    same = shapes == settings["shapes"] and all(result.get(key) == settings[key] for key in settings if key != "shapes")
    if not same:
        raise InputError(
            f"{out} holds the audit of other models or settings; wanted a new folder: choose it with --out"
        )
    return result


def _chosen(sources: list[PairSource], include: str | None) -> list[PairSource]:
    if include is None:
        return sources
    try:
        pattern = re.compile(include)
    except re.error as error:
        raise InputError(
            f"include is {include!r}, no regular expression ({error}); wanted one such as 'layer\\.(0|1)\\.'"
        ) from error
    chosen = [source for source in sources if pattern.search(source.name)]
    if not chosen:
        raise InputError(
            f"include {include!r} matches none of {len(sources)} matrices; their names are like {sources[0].name}"
        )
    return chosen


def _check_depth(sources: list[PairSource], k: int) -> None:
    smallest = min(sources, key=lambda source: min(source.shape))
    n = min(smallest.shape)
    if k > n:
        raise InputError(
            f"k={k} was given and {smallest.name} of shape {tuple(smallest.shape)} has {n} singular "
            f"vectors; wanted 1 <= k <= {n}: add --k {min(10, n)}, or leave it out with --include"
        )


def _device(device: str | None, rank: int) -> str:
    count = torch.cuda.device_count()
    if device is None:
        return f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % count}" if count else "cpu"
    try:
        kind = torch.device(device)
        torch.empty(1, device=kind)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"device {device!r} cannot be used ({str(error).splitlines()[0]}); wanted cpu, cuda or cuda:0"
        ) from error
    return device


def _store(cache: str | Path | None, max_bytes: int):
    if cache is None:
        return None
    from .basis import BasisStore

    return BasisStore(cache, max_bytes)


def _fingerprint(place: str | Path) -> str:
    """A digest of the names, sizes and times of the weight files of a local folder; the text itself of a hub id."""
    folder = Path(place)
    if not folder.is_dir():
        return str(place)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    listed = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def _cost(shape: tuple[int, int]) -> float:
    return float(shape[0]) * shape[1] * min(shape) ** 0.5
