"""Time to mitigate one layer of 1024 x 1024: `mitigate_layer` beside PEFT's `reduce_intruder_dimension`, in one run.

    OMP_NUM_THREADS=2 python tests/benchmarks/mitigate_peft.py [--repeats 5]

PEFT counts, edits and cuts back to the rank; it does not count again. Ours is timed on the same job (`same_job`:
count, edit, cut back to the rank), and with the recount, exact (`grow`) and of the same rank (`keep`). Warm: the basis
of the base has been made before. Cold: nothing has. The median of the repeats counts; ratios of processor time, which
other work on the machine disturbs less, stand beside those of wall time.
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
from intruder.edit import grow, keep, low_rank_norm, plan
from intruder.leading import basis_for, examine
from intruder.mitigate_layer import Layer, Settings, mitigate_layer
from intruder.spectrum import LowRank


def median_seconds(call, repeats: int) -> tuple[float, float]:
    """(wall, processor) seconds, the median of each; the first call is not counted."""
    call()
    wall, processor = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    return statistics.median(wall), statistics.median(processor)


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


def same_job(layer: Layer, settings: Settings, store=None) -> LowRank:
    """What PEFT does, by our parts: examine, edit, cut back to the rank; no recount."""
    update, rank = layer.update, layer.update.B.shape[1]
    found = examine(layer.pretrained, update, settings.k, settings.epsilon, basis_for(layer.pretrained, store))
    step = plan(found.vectors, found.intruder, low_rank_norm(update), settings.scale, settings.k, settings.which)
    return update if step is None else keep(grow(update, step.added), rank)[0]


def run(side: int = 1024, rank: int = 16, repeats: int = 5) -> dict:
    """Seconds of each, and the ratios."""
    generator = torch.Generator().manual_seed(0)
    W0 = weight((side, side), generator)
    B, A = factors((side, side), rank, generator)
    layer, settings = Layer("layers.0.linear", W0, LowRank(B, A, 1.0)), Settings(0.75, "all")
    kept = Settings(0.75, "all", rank="keep")
    theirs = median_seconds(peft_call(W0, B, A), repeats)
    with tempfile.TemporaryDirectory() as folder:
        store = BasisStore(folder)
        facts = mitigate_layer(layer, settings, store).facts
        ours = {
            "warm_same_job": lambda: same_job(layer, settings, store),
            "warm_with_recount": lambda: mitigate_layer(layer, settings, store),
            "warm_with_recount_keep": lambda: mitigate_layer(layer, kept, store),
            "cold_same_job": lambda: same_job(layer, settings),
            "cold_with_recount": lambda: mitigate_layer(layer, settings),
        }
        times = {name: median_seconds(call, repeats) for name, call in ours.items()}
    result = {"side": side, "rank": rank, "intruders": [facts["before"], facts["after"]]}
    result |= {"threads": os.environ.get("OMP_NUM_THREADS"), "peft_seconds": round(theirs[0], 4)}
    for name, (wall, processor) in times.items():
        result[name] = {
            "seconds": round(wall, 4),
            "ratio": round(theirs[0] / wall, 1),
            "processor_ratio": round(theirs[1] / processor, 1),
        }
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    print(json.dumps(run(**vars(parser.parse_args())), indent=1))
