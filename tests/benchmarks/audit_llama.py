"""Time and peak memory of `intruder audit` on some layers of Llama-2-7B's shapes, and what 32 layers would take.

    OMP_NUM_THREADS=2 python tests/benchmarks/audit_llama.py [--layers 4] [--folder DIR]

The audit is a process of its own, so its peak resident memory is the library's, not the generator's. The time for 32
layers is extrapolated in proportion; start-up is not. Targets on 2 cores: 12 minutes and 3 GiB.
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

from llama_shape import write


def run(folder: Path, layers: int, hidden: int = 4096, inner: int = 11008) -> dict:
    """Generate what is missing, audit it, and return the measurements."""
    if not (folder / "base").exists():
        write(folder, layers, hidden, inner)
    out = folder / f"audit-{time.time_ns()}"
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "intruder", "audit", str(folder / "base"), str(folder / "adapter"), "--out", str(out)],
        check=True,
    )
    wall = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = used.ru_maxrss * 1024
    result = json.loads((out / "audit.json").read_text())
    return {
        "layers": layers,
        "matrices": len(result["matrices"]),
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "seconds": result["seconds"],
        "routes": result["routes"],
        "total": result["total"],
        "minutes_for_32_layers": round(result["seconds"] / layers * 32 / 60, 2),
        "peak_gib": round(peak / 2**30, 2),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(run(options.folder or Path(temporary) / "llama", options.layers), indent=1))
