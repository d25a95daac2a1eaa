"""Time to mitigate one layer of 1024 x 1024: `mitigate_layer` beside PEFT's `reduce_intruder_dimension`, in one run.

    OMP_NUM_THREADS=2 python tests/benchmarks/mitigate_peft.py [--repeats 5]

Ours is timed without and with a cached basis of the base (warm: the basis has been used before), each time with the
count before, the edit and the recount after, which PEFT does not do. The median of the repeats counts.
"""

import argparse
import json
import os
import statistics
import tempfile
import time

import peft
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension
from llama_shape import factors, weight

from intruder.basis import BasisStore
from intruder.mitigate_layer import Layer, Settings, mitigate_layer
from intruder.spectrum import LowRank


def median_seconds(call, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peft_call(W0: torch.Tensor, B: torch.Tensor, A: torch.Tensor):
    """A call that runs PEFT's function on a fresh model of one such layer; the set-up is not timed."""

    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(W0.shape[1], W0.shape[0], bias=False)

        def forward(self, x):
            return self.linear(x)

    module = One()
    module.linear.weight.data = W0.clone()
    model = peft.get_peft_model(module, peft.LoraConfig(r=B.shape[1], lora_alpha=B.shape[1], target_modules=["linear"]))
    layer = model.base_model.model.linear
    layer.lora_B["default"].weight.data, layer.lora_A["default"].weight.data = B.clone(), A.clone()
    number = iter(range(1000))
    return lambda: reduce_intruder_dimension(model, new_adapter_name=f"reduced{next(number)}", logging_sink=None)


def run(side: int = 1024, rank: int = 16, repeats: int = 5) -> dict:
    """Seconds of each, and the ratios."""
    generator = torch.Generator().manual_seed(0)
    W0 = weight((side, side), generator)
    B, A = factors((side, side), rank, generator)
    layer, settings = Layer("layers.0.linear", W0, LowRank(B, A, 1.0)), Settings(0.75, "all")
    kept = Settings(0.75, "all", rank="keep")
    theirs = median_seconds(peft_call(W0, B, A), repeats)
    cold = median_seconds(lambda: mitigate_layer(layer, settings), repeats)
    with tempfile.TemporaryDirectory() as folder:
        store = BasisStore(folder)
        facts = mitigate_layer(layer, settings, store).facts
        warm = median_seconds(lambda: mitigate_layer(layer, settings, store), repeats)
        warm_kept = median_seconds(lambda: mitigate_layer(layer, kept, store), repeats)
    return {
        "side": side,
        "rank": rank,
        "intruders": facts["before"],
        "peft_seconds": round(theirs, 4),
        "ours_cold": round(cold, 4),
        "ours_warm": round(warm, 4),
        "ours_warm_keep": round(warm_kept, 4),
        "ratio_cold": round(theirs / cold, 1),
        "ratio_warm": round(theirs / warm, 1),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    print(json.dumps(run(**vars(parser.parse_args())), indent=1))
