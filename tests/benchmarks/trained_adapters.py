"""Every route on adapters that were really trained: how many verdicts differ from two full decompositions.

    OMP_NUM_THREADS=1 python tests/benchmarks/trained_adapters.py [--ranks 1 8 64] [--minilm DIR --data DIR]

Trains LoRA on the miniature model (and, with folders of all-MiniLM-L6-v2 and of SST-2 as `intruder sweep` takes them,
on that), saves it with PEFT's save_pretrained, reads it back as `intruder audit` does, and asks `compare` by every
route, with the update in factors and merged, at several epsilon. Counted are the vectors each route decided itself, the
verdicts that differ from `dense`, and those that dense calls borderline, where a difference would mean nothing. `count`
(the paper's definition on two decompositions) must agree as well. Exits with 1 if any verdict differs.
"""

import argparse
import json
import tempfile
import warnings
from collections import Counter
from pathlib import Path

from intruder import Basis, compare
from intruder.config import make_config
from intruder.count import count_checkpoints
from intruder.models import model_source
from intruder.run import run_config
from intruder.weights import pair_sources

EPSILONS = (0.1, 0.3, 0.5, 0.7, 0.9)
ROUTES = ("cached", "certified")


def train(folder: Path, preset: str, rank: int, steps: int, model: str | None, data: str | None) -> tuple[Path, Path]:
    """(base, adapter) folders of one short run."""
    kept = {}
    settings = {"preset": preset, "model": model, "data": data, "method": "lora", "rank": rank, "steps": steps}
    settings["task"] = "sentiment" if preset == "nano" else "sst2"
    small = {"train_size": 16 * steps, "validation_size": 100, "test_size": 100, "pseudo_loss_documents": 0}
    rate = {"learning_rate": 3e-3, "evaluations": 1}
    config = make_config({name: value for name, value in (settings | small | rate).items() if value is not None})
    run_config(config, progress=False, on_step=lambda step, loss, trained: kept.update(model=trained))
    place = folder / f"{preset}-r{rank}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept["model"].save_pretrained(place)
    return Path(model_source(preset, model)), place


def check(base: Path, adapter: Path, k: int = 10) -> dict:
    """Verdicts of every route beside those of `dense`, over all matrices and epsilons."""
    totals, counts = Counter(), Counter()
    for source in pair_sources(base, adapter):
        change = source.load_change()
        basis, merged = Basis.of(change.pretrained), change.pair().tuned
        for epsilon in EPSILONS:
            exact = compare(change.pretrained, change.factors, k=k, epsilon=epsilon, method="dense")
            totals["verdicts"] += k
            totals["borderline"] += int(exact.borderline.sum())
            counts[epsilon] += exact.count
            for form, tuned in (("factors", change.factors), ("merged", merged)):
                for route in ROUTES:
                    given = basis if route == "cached" else None
                    found = compare(change.pretrained, tuned, k=k, epsilon=epsilon, method=route, basis=given)
                    totals[f"{route}, {form}: decided itself"] += int((found.route == route).sum())
                    totals[f"{route}, {form}: differ"] += int(
                        ((found.intruder != exact.intruder) & ~exact.borderline).sum()
                    )
    for epsilon in EPSILONS:
        by_definition = count_checkpoints(base, adapter, k=k, epsilon=epsilon)["total"]
        totals["count differs by"] += abs(by_definition - counts[epsilon])
    return {"adapter": adapter.name, "intruders": dict(counts), **totals}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--minilm", metavar="DIR")
    parser.add_argument("--data", metavar="DIR")
    parser.add_argument("--minilm-ranks", type=int, nargs="+", default=[8])
    parser.add_argument("--minilm-steps", type=int, default=60)
    options = parser.parse_args()
    wanted = [("nano", rank, options.steps, None, None) for rank in options.ranks]
    if options.minilm:
        wanted += [("minilm", r, options.minilm_steps, options.minilm, options.data) for r in options.minilm_ranks]
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for case in wanted:
            result = check(*train(Path(folder), *case))
            wrong += sum(value for name, value in result.items() if "differ" in name)
            print(json.dumps(result), flush=True)
    raise SystemExit(1 if wrong else 0)
