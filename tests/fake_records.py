"""Made-up records in the schema of the real ones, for tests of the views. Never written into book/results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from intruder.records import RunRecord, write_record, write_spectra

LAYERS = ("query", "key", "value", "attention.output", "intermediate", "output")


def fake_record(preset: str, task: str, method: str, rank: int | None, seed: int) -> RunRecord:
    """A complete record with plausible numbers that depend on method, rank and seed."""
    rng = np.random.default_rng([seed, rank or 0])
    shapes = {name: [512, 128] if name == "intermediate" else [128, 512] if name == "output" else [128, 128]
              for name in LAYERS}
    size = sum(m * n if method == "full" else (rank or 0) * (m + n) for m, n in shapes.values())
    matrices = [{"name": name, "shape": shape, "effective_rank": 1.0, "update_norm": 1.0, "pretrained_norm": 1.0}
                for name, shape in shapes.items()]
    accuracy = {"head": 0.62, "full": 0.9, "lora": 0.89}[method] + 0.004 * float(rng.standard_normal())
    label = f"{method}-r{rank}" if rank else method
    return RunRecord(
        run=f"{label}-s{seed}",
        config={"preset": preset, "task": task, "method": method, "rank": rank, "alpha": 2 * rank if rank else None,
                "learning_rate": 1e-3, "steps": 100, "batch_size": 32, "seed": seed, "stage": "report"},
        provenance={"command": "none: made up", "commit": "0" * 40, "dirty": False, "versions": {}, "device": "cpu",
                    "threads": 1, "started": "2026-01-01T00:00:00Z", "wall_seconds": 1.0,
                    "model": {"id": "made-up", "sha256": "0" * 64}, "data": {"id": "made-up", "sha256": "0" * 64}},
        training={"steps": 100, "best_step": 80, "trainable": {"adapted": size, "head": 500}, "curve": []},
        metrics={"validation_accuracy": accuracy, "test_accuracy": accuracy, "majority_accuracy": 0.4,
                 "pseudo_loss": 1.2, "base_pseudo_loss": 1.1},
        matrices=[] if method == "head" else matrices)


def fake_spectra(run: str, method: str, rank: int | None, seed: int, layers: int, width: int) -> pd.DataFrame:
    """Spectra whose first vectors match badly for low ranks and well for full fine-tuning; all nulls match badly."""
    rng = np.random.default_rng([seed, rank or 0, layers])
    parts = []
    for matrix in (f"encoder.layer.{layer}.{name}" for layer in range(layers) for name in LAYERS):
        j = np.arange(1, width + 1)
        cosines = np.clip(1 - 0.5 * rng.random(width) * (j / width) ** 0.5, 0, 1)
        if method == "lora":
            worse = rng.random(width) < 0.6 / (1 + np.log2(rank)) * np.exp(-j / (4 + rank))
            cosines[worse] = rng.uniform(0.1, 0.9, worse.sum())
        nulls = np.where(rng.random(width) < 0.08, rng.uniform(0.1, 0.8, width), cosines)
        parts.append(pd.DataFrame({
            "run": run, "matrix": matrix, "index": j.astype("int32"),
            "singular_value": np.geomspace(10, 0.1, width).astype("float32"),
            "max_cosine": cosines.astype("float32"), "null_max_cosine": nulls.astype("float32")}))
    return pd.concat(parts, ignore_index=True)


def write_fake_results(folder: Path, presets: dict | None = None) -> Path:
    """Fill `folder` with records: {preset: (tasks, ranks, seeds, layers, width)}; returns the folder."""
    small = {"nano": (("nli", "sentiment"), (1, 8, 64), 3, 2, 40), "minilm": (("sst2",), (1, 16), 2, 1, 48)}
    for preset, (tasks, ranks, seeds, layers, width) in (presets or small).items():
        for task in tasks:
            spectra = []
            for method, rank in [("head", None), ("full", None), *(("lora", rank) for rank in ranks)]:
                for seed in range(seeds):
                    record = fake_record(preset, task, method, rank, seed)
                    write_record(record, folder / preset / task)
                    if method != "head":
                        spectra.append(fake_spectra(record.run, method, rank, seed, layers, width))
            write_spectra(pd.concat(spectra), folder / preset / task / "spectra.parquet")
    return folder
