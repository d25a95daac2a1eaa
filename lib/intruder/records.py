"""Records of runs as files and tables: one JSON per run, one Parquet of spectra per task, both written atomically."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import InputError
from .schema import METHODS, METRICS, STAGES, RunRecord, parse_run

__all__ = [
    "RunRecord",
    "check_records",
    "gather",
    "load_records",
    "load_spectra",
    "parse_run",
    "results_folder",
    "summary_table",
    "write_record",
    "write_spectra",
]

SPECTRA_TYPES = {
    "run": pa.string(),
    "matrix": pa.string(),
    "index": pa.int32(),
    "singular_value": pa.float32(),
    "max_cosine": pa.float32(),
    "null_max_cosine": pa.float32(),
}
SPECTRA_COLUMNS = tuple(SPECTRA_TYPES)


def write_record(record: RunRecord, folder: str | Path) -> Path:
    """Write `folder`/<run>.json atomically (a temporary file in the same folder, then a rename) and return its path."""
    path = Path(folder) / f"{record.run}.json"
    text = record.to_json()
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def write_spectra(spectra: pd.DataFrame, path: str | Path) -> Path:
    """Write spectra as Parquet (zstd), atomically, sorted by run, matrix and index; floating-point columns as float32.

    Columns: run, matrix, index (1-based j), singular_value, max_cosine, null_max_cosine. InputError if a column is
    missing or unknown, if a value is NaN or infinite, or if a row occurs twice.
    """
    path = Path(path)
    if set(spectra.columns) != set(SPECTRA_COLUMNS):
        raise InputError(f"spectra have the columns {list(spectra.columns)}; wanted {list(SPECTRA_COLUMNS)}")
    spectra = spectra.sort_values(["run", "matrix", "index"], kind="stable")
    if spectra.duplicated(["run", "matrix", "index"]).any():
        raise InputError("spectra hold the same run, matrix and index twice; wanted each row once")
    for name in SPECTRA_COLUMNS[3:]:
        if not np.isfinite(spectra[name].to_numpy(dtype=np.float64)).all():
            raise InputError(f"spectra column {name!r} holds NaN or infinity; wanted finite numbers")
    table = pa.table({name: pa.array(spectra[name].to_numpy(), type=kind) for name, kind in SPECTRA_TYPES.items()})
    floats = {name: "BYTE_STREAM_SPLIT" for name in SPECTRA_COLUMNS[3:]}
    _replace(
        path,
        lambda temporary: pq.write_table(
            table, temporary, compression="zstd", use_dictionary=["run", "matrix"], column_encoding=floats
        ),
    )
    return path


def load_records(folder: str | Path, stage: str | None = "report") -> list[RunRecord]:
    """All records under `folder`, of one stage ("report", "tuning") or of both (None).

    Sorted by preset, task, method (full, lora by rank, head), seed, learning rate. JSON files without a "run" key are
    not records and are passed over. InputError names the file that is not a valid record, or a folder that is missing.
    """
    if stage is not None and stage not in STAGES:
        raise InputError(f"stage={stage!r} was given; wanted one of {', '.join(STAGES)} or None")
    records = [record for _, record in _records_under(_folder(folder))]
    return sorted((record for record in records if stage in (None, record.config["stage"])), key=_record_order)


def load_spectra(folder: str | Path) -> pd.DataFrame:
    """All spectra under `folder`, laid out <preset>/<task>/spectra.parquet, as one table.

    Columns: preset, task, run, method, rank (Int64, missing for full), seed, matrix, index, singular_value, max_cosine,
    null_max_cosine (float32). No file gives an empty table with these columns.
    """
    parts = []
    for path in sorted(_folder(folder).rglob("spectra.parquet")):
        part = _read_spectra(path)
        parsed = {run: parse_run(run) for run in part["run"].unique()}
        keys = part["run"]
        part.insert(0, "preset", path.parent.parent.name)
        part.insert(1, "task", path.parent.name)
        part.insert(3, "method", keys.map({run: value[0] for run, value in parsed.items()}))
        part.insert(4, "rank", pd.array([parsed[run][1] for run in keys], dtype="Int64"))
        part.insert(5, "seed", pd.array([parsed[run][2] for run in keys], dtype="Int64"))
        parts.append(part)
    columns = ["preset", "task", "run", "method", "rank", "seed", *SPECTRA_COLUMNS[1:]]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def summary_table(records: Iterable[RunRecord]) -> pd.DataFrame:
    """One row per run: what was run and what came out. A null metric is NaN here; its reason is in the record."""
    rows = []
    for record in records:
        config, trainable = record.config, record.training["trainable"]
        row = {"preset": config["preset"], "task": config["task"], "run": record.run, "label": record.label}
        row |= {name: config[name] for name in ("method", "rank", "alpha", "learning_rate", "steps", "seed")}
        row |= {name: record.metrics[name] for name in METRICS}
        row |= {"trainable_adapted": trainable.get("adapted"), "trainable_head": trainable.get("head")}
        rows.append(row | {"wall_seconds": record.provenance["wall_seconds"]})
    names = ["preset", "task", "run", "label", "method", "rank", "alpha", "learning_rate", "steps", "seed", *METRICS]
    names += ["trainable_adapted", "trainable_head", "wall_seconds"]
    table = pd.DataFrame(rows, columns=names)
    whole = dict.fromkeys(("rank", "steps", "seed", "trainable_adapted", "trainable_head"), "Int64")
    return table.astype(whole | dict.fromkeys(("alpha", "learning_rate", *METRICS, "wall_seconds"), "float64"))


def results_folder() -> Path:
    """The committed records seen from here: `book/results` at the top level, `results` inside the book."""
    for folder in (Path("book") / "results", Path("results")):
        if folder.is_dir():
            return folder
    raise InputError(
        "no folder book/results or results in the current folder; wanted the repository's top level or its "
        "folder book: change to one of them, or pass the folder of the records"
    )


def load_base_record() -> dict:
    """The record of the run that pre-trained the nano base: settings, held-out losses, spectra, hash, provenance.

    Read from the installed package, where the weights lie beside it; needs neither torch nor a network.
    """
    return json.loads((files("intruder") / "assets" / "nano" / "record.json").read_text(encoding="utf-8"))


def load_base_sizes() -> list[dict]:
    """The records of the alternatives to the nano base (`intruder pretrain nano --sizes`), the base itself last.

    Each holds `name`, `settings`, `parameters`, `held_out_loss`, `head_accuracy` by task, `spectral_head`, `provenance`.
    """
    folder = files("intruder") / "assets" / "nano" / "sizes"
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.iterdir() if path.name.endswith(".json")]
    return sorted(records, key=lambda record: (record["settings"]["steps"], record["parameters"]))


def gather(run_folder: str | Path, results_folder: str | Path) -> list[Path]:
    """Pack what `intruder run --out` wrote into the layout of the results; return the paths written.

    Every record under `run_folder` becomes <preset>/<task>/<run>.json (tuning runs: <preset>/<task>/tuning/<run>.json).
    The spectra beside it, <run>.spectra.parquet, are merged into <preset>/<task>/spectra.parquet, where they replace
    the rows of the same run. A report run with matrices but without spectra, and two records that belong in one place,
    raise InputError before anything is written.
    """
    found, new_spectra, target, sources = _records_under(_folder(run_folder)), {}, Path(results_folder), {}
    for path, record in found:
        other = sources.setdefault((*(record.config[key] for key in ("preset", "task", "stage")), record.run), path)
        if other != path:
            raise InputError(f"{path} and {other} are two records of one run; wanted one of them: remove the other")
        spectra_path = path.with_name(f"{record.run}.spectra.parquet")
        if record.config["stage"] == "tuning":
            continue
        place = target / record.config["preset"] / record.config["task"] / "spectra.parquet"
        if spectra_path.is_file():
            spectra = _read_spectra(spectra_path)
            problems = _spectra_problems(record, spectra)
            if problems:
                raise InputError(f"{spectra_path.name}: {problems[0]}; run `intruder run` again for {record.run}")
            new_spectra.setdefault(place, {})[record.run] = spectra
        elif record.matrices and record.config["method"] != "head":
            raise InputError(
                f"no {spectra_path.name} beside {path.name}; wanted the spectra that `intruder run` writes"
            )
    written = []
    for place, by_run in new_spectra.items():
        kept = [_read_spectra(place).query("run not in @by_run")] if place.is_file() else []
        written.append(write_spectra(pd.concat([*kept, *by_run.values()], ignore_index=True), place))
    for _, record in found:
        folder = target / record.config["preset"] / record.config["task"]
        written.append(write_record(record, folder / "tuning" if record.config["stage"] == "tuning" else folder))
    return written


def check_records(folder: str | Path) -> list[str]:
    """What is wrong under a results folder, one sentence each; an empty list if nothing is.

    Looks for: a record in the wrong place, spectra missing for a report run (other than head), spectra of an unknown
    run, and per run: a matrix missing or unknown, an index missing, singular values not falling, cosines outside [0,
    1].
    """
    folder, problems, known = _folder(folder), [], {}
    for path, record in _records_under(folder):
        place = folder / record.config["preset"] / record.config["task"]
        tuning = record.config["stage"] == "tuning"
        wanted = place / "tuning" / f"{record.run}.json" if tuning else place / f"{record.run}.json"
        if path != wanted:
            problems.append(f"{path.relative_to(folder)}: wanted at {wanted.relative_to(folder)}")
        if not tuning:
            known.setdefault(place, {})[record.run] = record
    for place in sorted(set(known) | {path.parent for path in folder.rglob("spectra.parquet")}):
        path, runs, name = place / "spectra.parquet", known.get(place, {}), place.relative_to(folder).as_posix()
        by_run = dict(list(_read_spectra(path).groupby("run"))) if path.is_file() else {}
        problems += [f"{name}: spectra of {run}, which has no record" for run in sorted(set(by_run) - set(runs))]
        for run, record in sorted(runs.items()):
            if run in by_run:
                problems += [f"{name}: {problem}" for problem in _spectra_problems(record, by_run[run])]
            elif record.config["method"] != "head":
                problems.append(f"{name}: no spectra of {run}")
    return problems


def _spectra_problems(record: RunRecord, spectra: pd.DataFrame) -> list[str]:
    problems, run = [], record.run
    if set(spectra["run"]) - {run}:
        return [f"spectra of {sorted(set(spectra['run']))} where {run} was wanted"]
    shapes = {matrix["name"]: min(matrix["shape"]) for matrix in record.matrices}
    groups = dict(list(spectra.groupby("matrix")))
    problems += [f"{run}: no spectrum of {name}" for name in sorted(set(shapes) - set(groups))]
    problems += [
        f"{run}: spectrum of {name}, which the record does not name" for name in sorted(set(groups) - set(shapes))
    ]
    for name in sorted(set(shapes) & set(groups)):
        rows = groups[name].sort_values("index")
        if list(rows["index"]) != list(range(1, shapes[name] + 1)):
            problems.append(f"{run}: {len(rows)} rows of {name}; wanted the indices 1 to {shapes[name]}")
        if (np.diff(rows["singular_value"].to_numpy()) > 0).any():
            problems.append(f"{run}: singular values of {name} do not fall")
        cosines = rows[["max_cosine", "null_max_cosine"]].to_numpy()
        if not ((cosines >= 0) & (cosines <= 1)).all():
            problems.append(f"{run}: cosines of {name} outside [0, 1]")
    return problems


def _records_under(folder: Path) -> list[tuple[Path, RunRecord]]:
    found = []
    for path in sorted(folder.rglob("*.json")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue  # the checkpoints of a run under way, and temporary files
        try:
            text = path.read_text(encoding="utf-8")
            if _has_run(text):
                found.append((path, RunRecord.from_json(text)))
        except (InputError, UnicodeDecodeError) as error:
            raise InputError(f"{path.relative_to(folder)}: {error}") from error
    return found


def _has_run(text: str) -> bool:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON ({error}); wanted a record as `intruder run` writes it") from error
    return isinstance(values, dict) and "run" in values


def _record_order(record: RunRecord) -> tuple:
    config = record.config
    method = METHODS.index(config["method"])
    return (config["preset"], config["task"], method, config["rank"] or 0, config["seed"], config["learning_rate"])


def _folder(folder: str | Path) -> Path:
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"no folder {str(folder)!r}; wanted a folder of records as `intruder run --out` writes them")
    return path


def _read_spectra(path: Path) -> pd.DataFrame:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(
            f"{path.name} cannot be read as Parquet ({error}); wanted spectra that `intruder run` wrote"
        ) from error
    if table.column_names != list(SPECTRA_COLUMNS):
        raise InputError(f"{path.name} has the columns {table.column_names}; wanted {list(SPECTRA_COLUMNS)}")
    return table.to_pandas()


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
