"""Time to audit many adapters of one MiniLM base, the cache warm, beside the paper's procedure, in one run.

    OMP_NUM_THREADS=2 python tests/benchmarks/audit_adapters.py [--base DIR] [--adapters 50] [--rivals 1]

Makes LoRA adapters of rank 1 to 64, mixed, on every attention and feed-forward matrix, as PEFT saves them: on the
encoder in `--base` (all-MiniLM-L6-v2, 36 matrices), or without one on a random encoder of its shapes. One adapter is
audited to fill the cache. Timed is then what a user types, a process of its own with its start-up:

    intruder audit BASE ADAPTER ADAPTER ... --out DIR --cache CACHE

and on `--rivals` of the adapters the paper's procedure: two full decompositions of each matrix in float32, the product
of all left vectors, the count; base and adapter are in memory. Both counts are compared. Target: 50 adapters in 30 s.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peft
import torch
import transformers

from intruder.weights import pair_sources

RANKS = (1, 2, 4, 8, 16, 32, 64)
MINILM = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 1000,
}


def write_base(folder: Path) -> None:
    """A random encoder of MiniLM's shapes; every matrix has a head of growing singular values, as trained ones do."""
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**MINILM))
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            if parameter.ndim == 2:
                U, S, Vh = torch.linalg.svd(parameter, full_matrices=False)
                parameter.copy_((U * S * (1 + 2 * torch.arange(1, len(S) + 1) ** -0.5)) @ Vh)
    model.save_pretrained(folder)


def write_adapters(base: Path, folder: Path, count: int) -> list[Path]:
    """`count` adapters saved by PEFT; B A has about the norm of half the base, a third of its directions strong."""
    model = transformers.AutoModel.from_pretrained(base)
    norms = {id(p): torch.linalg.matrix_norm(p, 2) for p in model.encoder.parameters() if p.ndim == 2}
    adapters = []
    for number in range(count):
        rank = RANKS[number % len(RANKS)]
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["query", "key", "value", "dense"])
        config.exclude_modules = ["pooler.dense"]
        wrapped = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for module in wrapped.modules():
                if getattr(module, "lora_A", None):
                    A, B, weight = module.lora_A["default"].weight, module.lora_B["default"].weight, module.weight
                    strength = 0.6 * norms[id(weight)] * torch.linspace(1, 0.2, rank)
                    A.copy_(torch.randn(A.shape, generator=generator) / A.shape[1] ** 0.5)
                    B.copy_(torch.randn(B.shape, generator=generator) / B.shape[0] ** 0.5 * strength)
        adapters.append(folder / f"adapter-{number:02d}-r{rank}")
        wrapped.save_pretrained(adapters[-1])
        model = wrapped.unload()
    return adapters


def paper(base: Path, adapter: Path, k: int = 10, epsilon: float = 0.5) -> tuple[float, float, int]:
    """(wall seconds, processor seconds, count) of Algorithm 1 as published, reading not timed."""
    wall, processor, count = 0.0, 0.0, 0
    for source in pair_sources(base, adapter):
        pair = source.load()
        start = time.perf_counter(), time.process_time()
        U0 = torch.linalg.svd(pair.pretrained, full_matrices=False).U
        U = torch.linalg.svd(pair.tuned, full_matrices=False).U
        count += int(((U0.T @ U).abs().amax(0)[:k] < epsilon).sum())
        wall, processor = wall + time.perf_counter() - start[0], processor + time.process_time() - start[1]
    return wall, processor, count


def audit(base: Path, adapters: list[Path], out: Path, cache: Path) -> tuple[float, float]:
    """(wall seconds, processor seconds) of the command."""
    command = [sys.executable, "-m", "intruder", "audit", str(base), *map(str, adapters)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*command, "--out", str(out), "--cache", str(cache)], check=True, stdout=subprocess.DEVNULL)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, processor


def run(base: Path | None, count: int, rivals: int, folder: Path) -> dict:
    """Make what is missing, audit, and return the measurements."""
    if base is None:
        base = folder / "base"
        write_base(base)
    adapters = write_adapters(base, folder, count)
    cold = audit(base, adapters[:1], folder / "one", folder / "cache")
    wall, processor = audit(base, adapters, folder / "all", folder / "cache")
    totals = [model["total"] for model in json.loads((folder / "all" / "summary.json").read_text())["models"]]
    chosen = [number * max(count // max(rivals, 1), 1) for number in range(rivals)]
    theirs = [paper(base, adapters[number]) for number in chosen]
    result = {
        "adapters": count,
        "matrices": len(pair_sources(base, adapters[0])),
        "threads": torch.get_num_threads(),
        "first_audit_seconds": round(cold[0], 1),
        "wall_seconds": round(wall, 1),
        "processor_seconds": round(processor, 1),
    }
    if theirs:
        result |= {
            "paper_seconds_each": round(sum(rival[0] for rival in theirs) / rivals, 2),
            "ratio": round(sum(rival[0] for rival in theirs) / rivals * count / wall, 1),
            "processor_ratio": round(sum(rival[1] for rival in theirs) / rivals * count / processor, 1),
            "same_counts": [rival[2] for rival in theirs] == [totals[number] for number in chosen],
        }
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--rivals", type=int, default=1)
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(run(options.base, options.adapters, options.rivals, Path(temporary)), indent=1))
