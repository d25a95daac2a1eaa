"""Time and memory of `compare` beside the paper's procedure, ratios measured in one run.

    OMP_NUM_THREADS=2 python tests/benchmarks/compare_routes.py [--shapes 4096x4096 4096x11008 11008x4096] [--repeats 3]
                                                                [--no-reference]

The paper's procedure: two full thin decompositions in float32, the product of all left vectors, the maximum of each of
the k rows. W0 is a random bulk with a power-law head of 128 directions; the update has rank 16. `certified` starts from
nothing; `cached` is timed warm: `cached_file` with a store that reads the basis from its file by parts (what a store
does with large ones by default), `cached_store` with one that holds it in memory (the content hash of W0 is in the time
of both), `cached_basis` with the basis in hand, as when many adapters of one base are compared. `--no-reference` leaves
the paper's procedure out, which takes minutes.
Where certified leaves a vector to the dense route, that decomposition is in its time, and `left to dense` says so.
Memory: the peak of a fresh process during the call, above what it held before W0, in units of W0.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from intruder import BasisStore, LowRank, compare

RANK, HEAD = 16, 128


def pair(shape: tuple[int, int], seed: int = 0, strength: float = 4.0) -> tuple[torch.Tensor, LowRank]:
    """(W0, update): bulk with its edge at 1, head 6 i^-0.7, random update of norm about `strength`."""
    m, p = shape
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(side, HEAD, generator=generator)).Q for side in shape)
    W0 = torch.randn(m, p, generator=generator).div_(m**0.5 + p**0.5)
    W0.addmm_(U * (6 * torch.arange(1, HEAD + 1) ** -0.7), V.T)
    B = torch.randn(m, RANK, generator=generator) / m**0.5 * torch.linspace(1, 0.2, RANK)
    return W0, LowRank(B, torch.randn(RANK, p, generator=generator) / p**0.5, strength)


def paper(W0: torch.Tensor, update: LowRank, k: int = 10, epsilon: float = 0.5) -> int:
    """Algorithm 1 as published: SVD of both, all cosines, count."""
    U0 = torch.linalg.svd(W0, full_matrices=False).U
    U = torch.linalg.svd(W0 + update.scale * (update.B @ update.A), full_matrices=False).U
    return int(((U0.T @ U).abs().amax(0)[:k] < epsilon).sum())


def seconds(call, repeats: int) -> tuple[float, float, object]:
    """Median wall time, median processor time (of all threads; what to compare on a busy machine), the last result."""
    wall, processor = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        result = call()
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    return statistics.median(wall), statistics.median(processor), result


def peak(shape: tuple[int, int], method: str, folder: str) -> float:
    """Peak resident memory of one call in a fresh process, in matrices, W0 itself included."""
    code = (
        "import sys; from compare_routes import *\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        f"W0, update = pair({shape})\n"
        "def high():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return {line.split(':')[0]: int(line.split()[1]) for line in lines if line.startswith('Vm')}\n"
        "small = pair((256, 256)); compare(*small, method='certified'); compare(*small, method='cached')\n"
        f"store = BasisStore({folder!r})\n"
        "before = high()['VmRSS']; open('/proc/self/clear_refs', 'w').write('5')\n"
        f"compare(W0, update, method={method!r}, basis=store if {method!r} == 'cached' else None)\n"
        "print((high()['VmHWM'] - before) * 1024 / (W0.numel() * 4) + 1)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return float(run.stdout.split()[-1])


def measured_routes(W0: torch.Tensor, update: LowRank, epsilon: float, repeats: int, store: BasisStore) -> dict:
    """What `seconds` says of each route, by name; the basis is made between certified and cached."""

    def timed(method: str, basis=None):
        return seconds(lambda: compare(W0, update, 10, epsilon, method, basis), repeats)

    certified, basis = timed("certified"), store.get(W0)
    return {
        "certified": certified,
        "cached_file": timed("cached", BasisStore(store.folder)),
        "cached_store": timed("cached", store),
        "cached_basis": timed("cached", basis),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x11008", "11008x4096"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epsilon", type=float, default=0.5)
    parser.add_argument("--no-reference", action="store_true", help="without the paper's procedure: no ratios")
    arguments = parser.parse_args()
    for text in arguments.shapes:
        shape = tuple(int(side) for side in text.split("x"))
        W0, update = pair(shape)
        with tempfile.TemporaryDirectory() as folder:
            store = BasisStore(folder, memory_bytes=2**32)
            routes = measured_routes(W0, update, arguments.epsilon, arguments.repeats, store)
            line = {"shape": text, "threads": torch.get_num_threads()}
            if not arguments.no_reference:
                reference = seconds(lambda: paper(W0, update, 10, arguments.epsilon), 1)
                line |= {"paper_seconds": round(reference[0], 2), "paper_processor_seconds": round(reference[1], 2)}
                line["paper_count"] = reference[2]
            for name, measured in routes.items():
                line[f"{name}_seconds"] = round(measured[0], 3)
                line[f"{name}_processor_seconds"] = round(measured[1], 3)
                if not arguments.no_reference:
                    line[f"{name}_ratio"] = round(reference[0] / measured[0], 1)
                    line[f"{name}_processor_ratio"] = round(reference[1] / measured[1], 1)
            line |= {
                "counts": [measured[2].count for measured in routes.values()],
                "left_to_dense": [int((measured[2].route == "dense").sum()) for measured in routes.values()],
                "certified_peak_matrices": round(peak(shape, "certified", folder), 2),
                "cached_peak_matrices": round(peak(shape, "cached", folder), 2),
            }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
