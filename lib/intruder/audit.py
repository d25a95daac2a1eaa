"""Audit fine-tuned models on disk: intruders, energies and ranks of every matrix; resumable, on many processes."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .audit_files import (
    SCHEMA,
    finished_audit,
    fingerprint,
    labels_of,
    result_of,
    summary_of,
    write_audit,
    write_summary,
)
from .audit_matrix import audit_matrix
from .basis import Basis, BasisStore
from .changes import PairSource
from .checkpoints import open_checkpoint
from .comparison import SMALLEST_CERTIFIED
from .errors import InputError
from .estimate import Estimate, in_words
from .hub import local_folder
from .intruders import check_epsilon, check_k
from .journal import Journal, launched_as, share
from .weights import pair_sources

Group = list[tuple[str, PairSource]]  # what several models make of one pre-trained matrix


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

    count            #{ j <= k : max_i |<x_i, u_j>| < epsilon }, as `comparison.compare` decides it
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
    return _Audit(base, {"": tuned}, k, epsilon, out, device, include, cache, cache_bytes, say).run(resume)


def audit_each(
    base: str | Path,
    tuned: Sequence[str | Path],
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
    """Audit several models of one base, each into a folder of its own in `out`, and return what summary.json holds.

    Arguments, files and errors are those of `audit`. Every matrix of the base is read once for all models and, up to
    the size where the certified route begins, decomposed once; for a larger base of many adapters give a `cache`. The
    threads of torch (OMP_NUM_THREADS) take one model each. The folders are called by the last part of the names of the
    models, or as many parts as tell them apart. summary.json lists per model its `label` (the folder), `tuned`,
    `matrices`, `vectors`, `total`, `borderline`, and means over its matrices: `rank`, `effective_rank`, `energy_share`.
    Raises InputError also for no model, or one that is given twice.
    """
    models = labels_of(tuned)
    return _Audit(base, models, k, epsilon, out, device, include, cache, cache_bytes, say).run(resume)


class _Audit:
    """One audit of one model (label "") or several: checked when made, before anything is written."""

    def __init__(self, base, models: dict[str, str | Path], k, epsilon, out, device, include, cache, cache_bytes, say):
        self.began, self.say, self.out = time.time(), say or (lambda line: None), Path(out)
        self.epsilon, self.k, (self.rank, self.world) = check_epsilon(epsilon), check_k(k), launched_as()
        self.device = _device(device, self.rank)
        checkpoint = open_checkpoint(local_folder(base))
        self.sources = {label: _chosen(pair_sources(checkpoint, place), include) for label, place in models.items()}
        everything = [source for sources in self.sources.values() for source in sources]
        _check_depth(everything, self.k)
        self.groups, self.where = _grouped(self.sources)
        self.alone = list(models) == [""]
        self.store = None if cache is None else BasisStore(cache, cache_bytes)
        shapes = {name: {s.name: list(s.shape) for s in sources} for name, sources in self.sources.items()}
        contents = [fingerprint(base), *map(fingerprint, models.values())]
        tuned = {label: str(place) for label, place in models.items()}
        self.settings = {
            "schema": SCHEMA,
            "base": str(base),
            "tuned": tuned[""] if self.alone else tuned,
            "k": self.k,
            "epsilon": self.epsilon,
            "include": include,
            "contents": contents,
            "shapes": shapes[""] if self.alone else shapes,
        }

    def run(self, resume: bool) -> dict | None:
        """Do this process's share; the first process waits for the others, writes and returns the result."""
        finished = finished_audit(self.out, self.settings, self.alone) if resume else None
        if finished is not None:
            self.say(f"{self.out} is complete already")
            return finished if self.rank == 0 else None
        names = list(self.groups)
        mine = share([_cost(group) for group in self.groups.values()], self.rank, self.world)
        if self.rank and not mine:
            return None
        journal = Journal(self.out, self.settings, self.rank, resume)
        try:
            self._work([names[i] for i in mine], journal)
            if self.rank:
                return None
            done = journal.wait(names, self.began)
            result = self._write(done)
            journal.finish()
            return result
        except BaseException as error:
            if isinstance(error, InputError):
                journal.fail(str(error))
            journal.abandon()
            raise

    def _work(self, names: list[str], journal: Journal) -> None:
        todo = [name for name in names if name not in journal.done]
        before = len(names) - len(todo)
        whose = f" of this process, one of {self.world}" if self.world > 1 else ""
        whose = whose if self.alone else f" in {len(self.sources)} models{whose}"
        if before:
            self.say(f"{before} of {len(names)} matrices{whose} are done already")
        estimate, clock, found = Estimate(), time.monotonic(), 0
        for number, name in enumerate(todo):
            start, group = time.monotonic(), self.groups[name]
            records = self._matrix(group)
            journal.add({"name": name, "models": records})
            estimate.add((*group[0][1].shape, len(group)), time.monotonic() - start)
            found += sum(record["count"] for record in records.values())
            rest = [self.groups[other] for other in todo[number + 1 :]]
            left = estimate.remaining((*other[0][1].shape, len(other)) for other in rest)
            words = "" if left is None or not rest else f", {_range(*left)} left"
            self.say(
                f"{before + number + 1}/{len(names)} matrices{whose}, {found} intruders, "
                f"{in_words(time.monotonic() - clock)}{words}: {group[0][1].name}"
            )

    def _matrix(self, group: Group) -> dict[str, dict]:
        """The entries of one pre-trained matrix, by model: it is read once, and decomposed at most once."""
        start = time.monotonic()
        first = group[0][1]
        # Many small problems: a thread each is worth more than all threads on each. Large ones use the threads inside.
        small = min(first.shape) < SMALLEST_CERTIFIED
        with _naming(first.name):
            pretrained, basis = first.read_pretrained().to(self.device), self.store
            if small:
                basis = Basis.of(pretrained) if self.store is None else self.store.get(pretrained)
        shared = (time.monotonic() - start) / len(group)

        def entry(source: PairSource) -> dict:
            start = time.monotonic()
            with _naming(source.name):
                record = audit_matrix(source.change(pretrained), self.k, self.epsilon, self.device, basis)
            return record | {"seconds": round(shared + time.monotonic() - start, 4)}

        sources = [source for _, source in group]
        threads = min(torch.get_num_threads(), len(group)) if small and self.device == "cpu" else 1
        return dict(zip((label for label, _ in group), _side_by_side(entry, sources, threads), strict=True))

    def _write(self, done: dict[str, dict]) -> dict:
        results = {}
        for label, sources in self.sources.items():
            records = [done[self.where[label, source.name]]["models"][label] for source in sources]
            results[label] = result_of(self.settings, label, records)
            write_audit(self.out / label, results[label])
        if self.alone:
            return results[""]
        summary = summary_of(self.settings, results)
        write_summary(self.out, summary)
        return summary


def _side_by_side(call: Callable, values: list, threads: int) -> list:
    """[call(value) for value in values], on as many threads, in each of which torch uses one."""
    if threads == 1:
        return [call(value) for value in values]
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    # `compare` sets the precision back to what it found: with several at once it must find what all want.
    torch.set_float32_matmul_precision("highest")
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(call, values))
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)


def _grouped(models: dict[str, list[PairSource]]) -> tuple[dict[str, Group], dict[tuple[str, str], str]]:
    """({unique name: what each model makes of one pre-trained matrix}, {(label, name): the key of its group})."""
    groups, places, where = {}, {}, {}
    for label, sources in models.items():
        for source in sources:
            unique = source.name if source.name not in groups else f"{source.name}#{len(groups)}"
            key = places.setdefault(source.place, unique)
            groups.setdefault(key, []).append((label, source))
            where[label, source.name] = key
    return groups, where


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Every InputError says which matrix it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error) if name in str(error) else f"{name}: {error}") from error


def _range(low: float, high: float) -> str:
    low_words, high_words = in_words(low), in_words(high)
    return f"about {high_words}" if low_words == high_words else f"{low_words} to {high_words}"


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


def _cost(group: Group) -> float:
    rows, columns = group[0][1].shape
    return float(rows) * columns * min(rows, columns) ** 0.5 * len(group)
