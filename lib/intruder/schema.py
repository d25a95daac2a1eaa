"""The schema of a run's record: its fields, its checks, its JSON. Files and tables are in `records`."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .errors import InputError

SCHEMA = 1
METHODS = ("full", "lora", "head")
STAGES = ("report", "tuning")
METRICS = ("validation_accuracy", "test_accuracy", "majority_accuracy", "pseudo_loss", "base_pseudo_loss")

_RUN = re.compile(r"^(full|head|lora-r([1-9]\d*))(?:\.([a-z0-9][a-z0-9_-]*?))?-(?:s(\d+)|lr(\d[\d.e+-]*))$")
_CONFIG_FIELDS = ("preset", "task", "method", "rank", "alpha", "learning_rate", "steps", "batch_size", "seed", "stage")
_PROVENANCE_FIELDS = (
    "command",
    "commit",
    "dirty",
    "versions",
    "device",
    "threads",
    "started",
    "wall_seconds",
    "model",
    "data",
)
_MATRIX_FIELDS = ("name", "shape", "effective_rank", "update_norm", "pretrained_norm")


@dataclass
class RunRecord:
    """One run: what was configured, where it ran, how it trained, what was measured.

    The fields are the keys of the JSON. Checked on construction: a missing or unknown field, NaN or infinity anywhere,
    a missing seed or commit, a run name that contradicts the config, and a metric that is null without a reason in
    `missing` each raise InputError naming the field. The singular values and cosines of the run stand in a Parquet
    file.
    """

    run: str
    config: dict[str, Any]
    provenance: dict[str, Any]
    training: dict[str, Any]
    metrics: dict[str, float | None]
    missing: dict[str, str] = field(default_factory=dict)
    matrices: list[dict[str, Any]] = field(default_factory=list)
    status: str = "complete"
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        where = f"record {self.run!r}"
        if self.schema != SCHEMA:
            raise InputError(f"{where}: field 'schema' is {self.schema!r}; wanted {SCHEMA}")
        if self.status != "complete":
            raise InputError(
                f"{where}: field 'status' is {self.status!r}; wanted 'complete': only finished runs are records"
            )
        for name, kind in (("config", dict), ("provenance", dict), ("training", dict), ("metrics", dict)):
            if not isinstance(getattr(self, name), kind):
                raise InputError(
                    f"{where}: field {name!r} is {getattr(self, name)!r}; wanted an object with named values"
                )
        _refuse_non_finite(asdict(self), where)
        _require(self.config, _CONFIG_FIELDS, f"{where}: config", nullable=("rank", "alpha"))
        _require(self.provenance, _PROVENANCE_FIELDS, f"{where}: provenance")
        _require(
            self.training, ("steps", "best_step", "trainable", "curve"), f"{where}: training", nullable=("best_step",)
        )
        _require(self.metrics, METRICS, f"{where}: metrics", nullable=METRICS)
        self._check_config(where)
        for name, value in self.metrics.items():
            if value is None and not self.missing.get(name):
                raise InputError(f"{where}: metric {name!r} is null; wanted a number, or the reason in 'missing'")
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise InputError(f"{where}: metric {name!r} is {value!r}; wanted a number or null")
        if not isinstance(self.provenance["commit"], str) or not self.provenance["commit"]:
            raise InputError(f"{where}: field 'provenance.commit' is {self.provenance['commit']!r}; wanted a commit id")
        for matrix in self.matrices:
            _require(matrix, _MATRIX_FIELDS, f"{where}: matrices")

    def _check_config(self, where: str) -> None:
        config = self.config
        if config["method"] not in METHODS:
            raise InputError(
                f"{where}: field 'config.method' is {config['method']!r}; wanted one of {', '.join(METHODS)}"
            )
        if config["stage"] not in STAGES:
            raise InputError(f"{where}: field 'config.stage' is {config['stage']!r}; wanted one of {', '.join(STAGES)}")
        if isinstance(config["seed"], bool) or not isinstance(config["seed"], int):
            raise InputError(f"{where}: field 'config.seed' is {config['seed']!r}; wanted a whole number")
        if (config["method"] == "lora") != (config["rank"] is not None):
            raise InputError(
                f"{where}: field 'config.rank' is {config['rank']!r} with method {config['method']!r}; "
                "wanted a rank for lora and null for the other methods"
            )
        method, rank, seed = parse_run(self.run)
        report = config["stage"] == "report"
        if (method, rank) != (config["method"], config["rank"]) or report != (seed is not None):
            raise InputError(
                f"{where}: the run name contradicts the config; wanted {self.label}-"
                + (f"s{config['seed']}" if report else f"lr{config['learning_rate']:g}")
            )
        if report and seed != config["seed"]:
            raise InputError(f"{where}: field 'config.seed' is {config['seed']}; wanted {seed} as in the run name")

    @property
    def label(self) -> str:
        """The method with its rank and variant, as in run names: full, head, lora-r8, full.rate_3e-4."""
        config = self.config
        method = config["method"] if config["rank"] is None else f"lora-r{config['rank']}"
        return f"{method}.{config['variant']}" if config.get("variant") else method

    def to_json(self) -> str:
        """The record as JSON text, keys in the order of the schema, ending in a line break."""
        values = asdict(self)
        order = ("schema", "run", "status", "config", "provenance", "training", "metrics", "missing", "matrices")
        return json.dumps({name: values[name] for name in order}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunRecord":
        """The record from JSON text; InputError names what is not JSON, an unknown field or a missing one."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"not a record: {error}; wanted the JSON that `intruder run` writes") from error
        if not isinstance(values, dict):
            raise InputError("not a record: wanted one JSON object as `intruder run` writes it")
        names = {item.name for item in fields(cls)}
        _require(values, sorted(names), f"record {values.get('run')!r}")
        unknown = sorted(set(values) - names)
        if unknown:
            raise InputError(
                f"record {values['run']!r}: unknown field {unknown[0]!r}; wanted {', '.join(sorted(names))}"
            )
        return cls(**values)


def parse_run(run: str) -> tuple[str, int | None, int | None]:
    """(method, rank, seed) of a run name such as lora-r8-s0; seed is None for a tuning run such as full-lr0.001."""
    match = _RUN.match(run) if isinstance(run, str) else None
    if not match:
        raise InputError(
            f"run {run!r} is not a run name; wanted for example full-s0, lora-r8-s0, head-s0 or full-lr0.001"
        )
    label, rank, _, seed, _ = match.groups()
    return label.split("-")[0], int(rank) if rank else None, int(seed) if seed else None


def _require(values: dict, names: Iterable[str], where: str, nullable: tuple[str, ...] = ()) -> None:
    if not isinstance(values, dict):
        raise InputError(f"{where} is {values!r}; wanted an object with named values")
    for name in names:
        if name not in values:
            raise InputError(f"{where}: field {name!r} is missing")
        if values[name] is None and name not in nullable:
            raise InputError(f"{where}: field {name!r} is null; wanted a value")


def _refuse_non_finite(value: Any, where: str, path: str = "") -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_non_finite(item, where, f"{path}.{name}" if path else str(name))
    elif isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            _refuse_non_finite(item, where, f"{path}[{position}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(
            f"{where}: field {path!r} is {value}; wanted a finite number, or null with the reason in 'missing'"
        )
