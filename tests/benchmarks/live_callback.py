"""The share of training time that `IntruderCallback` takes, on a short run of the miniature model.

    OMP_NUM_THREADS=1 python tests/benchmarks/live_callback.py [--every 10 50] [--rank 8] [--steps 300] [--k 10]

For each `--every`, one run with the callback on all 24 adapted matrices: `share` is the time in checks over all time
from the first step on, as the callback measures it; the decomposition of the base at the first step stands apart
(`setup_seconds`). `step_ms` and `check_ms` are the mean times of a step without the callback and of one check. The
share hardly depends on how busy the machine is, since both grow alike.
"""

import argparse
import json

import torch

from intruder.config import make_config
from intruder.live import IntruderCallback
from intruder.run import run_config


class Counting(IntruderCallback):
    """The callback, and how many steps and checks there were."""

    steps = 0

    def __call__(self, step, loss, model):
        self.steps += 1
        super().__call__(step, loss, model)


def run(every: int, rank: int, steps: int, k: int) -> dict:
    """Train once with a check every `every` steps; what it took."""
    callback = Counting(every=every, k=k)
    small = {"train_size": 16 * steps, "validation_size": 100, "test_size": 100, "pseudo_loss_documents": 0}
    run_config(
        make_config(small | {"task": "nli", "method": "lora", "rank": rank, "steps": steps, "evaluations": 1}),
        progress=False,
        on_step=callback,
    )
    frame, counts = callback.frame(), callback.counts()
    elapsed = callback.seconds / callback.share
    return {
        "every": every,
        "steps": callback.steps,
        "checks": len(counts),
        "matrices": frame["matrix"].nunique(),
        "share": round(callback.share, 4),
        "step_ms": round(1e3 * (elapsed - callback.seconds) / callback.steps, 2),
        "check_ms": round(1e3 * callback.seconds / len(counts), 2),
        "setup_seconds": round(callback.setup_seconds, 3),
        "intruders_seen": int(counts["count"].iloc[-1]),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--k", type=int, default=10)
    options = parser.parse_args()
    for every in options.every:
        print(json.dumps(run(every, options.rank, options.steps, options.k)), flush=True)
