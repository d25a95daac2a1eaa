"""The labelled examples of a configured run: the miniature language, or a real task from local files or the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import tasks
from .config import RunConfig
from .errors import InputError

SST2_FILES = {"train": "sst2_train.tsv", "validation": "sst2_dev.tsv", "test": "sst2_test.tsv"}
SST2_HUB = "nyu-mll/glue"
HELD_BACK = 1000  # GLUE publishes no test labels: its validation split tests, and these training sentences validate
EVALUATION_SEED = 777  # the validation and test examples are the same for every run, whatever its seed


def load_examples(config: RunConfig) -> tuple[dict[str, list[tasks.Example]], dict]:
    """Examples by split (train, validation, test), and what a record says of them.

    Training examples depend on the run's seed, validation and test examples do not. The miniature tasks are sampled on
    the fly; sst2 is read from `config.data` (a folder with sst2_train.tsv, sst2_dev.tsv and sst2_test.tsv) or else
    from the hub. Raises InputError that names what is missing.
    """
    sizes = {split: getattr(config, f"{split}_size") for split in ("train", "validation", "test")}
    if config.task in tasks.TASKS:
        if None in sizes.values():
            raise InputError(f"train_size, validation_size, test_size are {list(sizes.values())}; the miniature "
                             "language has no end, so wanted numbers, e.g. --set train_size=20000")
        found = {split: tasks.examples(config.task, split, size, config.seed if split == "train" else EVALUATION_SEED)
                 for split, size in sizes.items()}
        return found, {"id": f"miniature language, task {config.task}", "sha256": _digest(found)}
    found, identity = _sst2_local(Path(config.data)) if config.data else _sst2_hub()
    for split, size in sizes.items():
        if size and size < len(found[split]):
            keep = np.random.default_rng([config.seed if split == "train" else EVALUATION_SEED, 3])
            found[split] = [found[split][i] for i in sorted(keep.permutation(len(found[split]))[:size])]
    return found, {"id": identity, "sha256": _digest(found)}


def majority_accuracy(train: Sequence[tasks.Example], test: Sequence[tasks.Example]) -> float:
    """Test accuracy of always answering the commonest training label."""
    labels = [example.label for example in train]
    commonest = max(set(labels), key=labels.count)
    return float(np.mean([example.label == commonest for example in test]))


def _digest(found: dict[str, list[tasks.Example]]) -> str:
    digest = hashlib.sha256()
    for split in sorted(found):
        for example in found[split]:
            digest.update(f"{split}\t{example.text}\t{example.text_pair}\t{example.label}\n".encode())
    return digest.hexdigest()


def _sst2_local(folder: Path) -> tuple[dict, str]:
    if not folder.is_dir():
        raise InputError(f"data is {str(folder)!r}, which is no folder; wanted one with "
                         f"{', '.join(SST2_FILES.values())}, or no data at all to load SST-2 from the hub")
    found = {split: tasks.read_tsv(folder / name, tasks.LABELS["sst2"]) for split, name in SST2_FILES.items()}
    return _disjoint(found), "SST-2 sentences, local files " + ", ".join(SST2_FILES.values())


def _disjoint(found: dict[str, list[tasks.Example]]) -> dict[str, list[tasks.Example]]:
    """The splits without the validation sentences that also train, and the test sentences that train or validate."""
    seen, kept = set(), {}
    for split in ("train", "validation", "test"):
        kept[split] = [example for example in found[split] if example.text not in seen]
        seen |= {example.text for example in found[split]}
        if not kept[split]:
            raise InputError(f"every sentence of the {split} split stands in another split too; wanted new sentences")
    return kept


def _sst2_hub() -> tuple[dict, str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError("SST-2 from the hub needs the package datasets; wanted `pip install \"intruder[hub]\"`, or "
                         "local files with --set data=FOLDER") from error
    try:
        loaded = load_dataset(SST2_HUB, "sst2")
    except Exception as error:  # the hub client raises many kinds; all mean the same to the reader
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot load {SST2_HUB!r} (sst2) from the hub: {reason}; wanted a network, or local files "
                         f"with --set data=FOLDER holding {', '.join(SST2_FILES.values())}") from error
    names = tasks.LABELS["sst2"]
    rows = {split: [tasks.Example(row["sentence"], None, row["label"], names[row["label"]]) for row in loaded[split]]
            for split in ("train", "validation")}
    order = np.random.default_rng([EVALUATION_SEED, 5]).permutation(len(rows["train"]))
    held = set(order[:HELD_BACK].tolist())
    found = {"train": [e for i, e in enumerate(rows["train"]) if i not in held],
             "validation": [e for i, e in enumerate(rows["train"]) if i in held], "test": rows["validation"]}
    return _disjoint(found), f"{SST2_HUB} (sst2)"
