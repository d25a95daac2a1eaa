"""The command `intruder`: one line an error, exit status 2, never a traceback for what a user typed."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

from .errors import InputError

EXPERIMENTS = Path("lib/experiments")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors read like all the others."""

    def error(self, message: str):
        print(f"intruder: error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    top = Parser(prog="intruder", description="Count intruder dimensions, and make the runs that have them.")
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser)

    add = commands.add_parser("count", help="count the intruder dimensions of one fine-tuned model")
    add.add_argument("base", help="folder of the pre-trained checkpoint (safetensors)")
    add.add_argument("tuned", help="folder of the fine-tuned checkpoint, or of a PEFT LoRA adapter")
    add.add_argument("--k", type=int, default=10, help="leading singular vectors examined in each matrix (default 10)")
    add.add_argument("--epsilon", type=float, default=0.5, help="similarity threshold in (0, 1] (default 0.5)")
    add.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add.set_defaults(act=_count)

    add = commands.add_parser("audit", help="count, weigh and map the intruder dimensions of a model; write a report")
    add.add_argument("base", help="folder or hub id (owner/name@revision) of the pre-trained checkpoint")
    add.add_argument("tuned", nargs="+", help="folder or hub id of the fine-tuned checkpoint, or of a PEFT adapter; "
                     "several share the work on the base, and get a folder each in --out and a summary")
    add.add_argument("--k", type=int, default=10, help="leading singular vectors examined in each matrix (default 10)")
    add.add_argument("--epsilon", type=float, default=0.5, help="similarity threshold in (0, 1] (default 0.5)")
    add.add_argument("--out", default="audit", help="new folder for the JSON, the table and the page (default audit)")
    add.add_argument("--device", help="cpu, cuda or cuda:0 (default: a GPU if there is one)")
    add.add_argument("--resume", action="store_true", help="continue an audit that was stopped, or read a finished one")
    add.add_argument("--include", metavar="REGEX", help="only matrices whose name it finds, e.g. 'layers\\.[0-3]\\.'")
    add.add_argument("--cache", metavar="DIR", help="keep decompositions of the base there for later audits")
    add.add_argument("--cache-gb", type=float, default=20.0, help="largest size of that folder in GB (default 20)")
    add.set_defaults(act=_audit)

    add = commands.add_parser("mitigate", help="scale the intruder dimensions of a PEFT adapter; write a new adapter")
    add.add_argument("base", help="folder or hub id of the pre-trained checkpoint")
    add.add_argument("adapter", help="folder or hub id of the PEFT adapter")
    add.add_argument("--scale", type=float, required=True, metavar="LAMBDA",
                     help="factor on each chosen intruder: 0 removes it, 1 changes nothing")
    add.add_argument("--out", required=True, help="new folder for the adapter and mitigation.json")
    add.add_argument("--which", choices=["top", "all"], default="top",
                     help="the first intruder of each matrix, or all among the leading k (default top)")
    add.add_argument("--control", choices=["neighbour", "norm-matched", "random"],
                     help="edit as much of something else instead")
    add.add_argument("--rank", choices=["keep", "grow"], default="grow",
                     help="grow: exact, rank r + |I|; keep: the best adapter of rank r (default grow)")
    add.add_argument("--k", type=int, default=10, help="leading singular vectors examined in each matrix (default 10)")
    add.add_argument("--epsilon", type=float, default=0.5, help="similarity threshold in (0, 1] (default 0.5)")
    add.add_argument("--rounds", type=int, default=1, help="repeat on the result while intruders are left (default 1)")
    add.add_argument("--cache", metavar="DIR", help="keep decompositions of the base there for later commands")
    add.set_defaults(act=_mitigate)

    add = commands.add_parser("run", help="train and measure one configuration; write its record and spectra")
    add.add_argument("config", help="JSON file with differences from the defaults")
    add.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                     help="values that win over the file's")
    add.add_argument("--out", default="runs", help="folder for the record (default runs)")
    add.set_defaults(act=_run)

    add = commands.add_parser("sweep", help="run everything a sweep file asks for that has no record yet")
    add.add_argument("name", help="a file, or the name of one in lib/experiments")
    add.add_argument("--out", default="runs", help="folder for the records (default runs)")
    add.add_argument("--jobs", type=int, default=os.cpu_count() or 1,
                     help="runs side by side, one thread each (default: all cores)")
    add.add_argument("--model", help="directory or hub id instead of the preset's base")
    add.add_argument("--data", help="folder of local data files instead of the hub")
    add.set_defaults(act=_sweep)

    add = commands.add_parser("pretrain", help="pre-train the nano base model from scratch")
    add.add_argument("preset", choices=["nano"], help="the base model to make")
    add.add_argument("--out", default="runs/nano", help="folder for weights, tokenizer and record (default runs/nano)")
    add.add_argument("--stop-after", type=int, metavar="STEPS", help="stop early and write the first losses only")
    add.add_argument("--sizes", metavar="FILE", help="make the alternatives of this file and judge them instead, one "
                     "record each and no weights, e.g. lib/experiments/nano-sizes.json")
    add.set_defaults(act=_pretrain)

    add = commands.add_parser("records", help="pack or check records")
    add.add_argument("action", choices=["gather", "check"],
                     help="gather: pack --runs into --results; check: list problems")
    add.add_argument("--runs", default="runs", help="folder that `intruder run` or `sweep` wrote (default runs)")
    add.add_argument("--results", default="book/results", help="folder of the committed records (default book/results)")
    add.set_defaults(act=_records)

    add = commands.add_parser("address", help="show or set the public address of the repository, everywhere at once")
    add.add_argument("url", nargs="?",
                     help="for example https://github.com/OWNER/NAME; without it, the present one is shown")
    add.set_defaults(act=_address)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status: 0, or 2 for input that cannot be used."""
    try:
        options = parser().parse_args(arguments)
        return options.act(options) or 0
    except InputError as error:
        print(f"intruder: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ImportError as error:
        what = f"{error.name} is not installed" if isinstance(error, ModuleNotFoundError) else str(error)
        print(f"intruder: error: {what}; wanted `pip install --upgrade \"intruder[train]\"`", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written to
        print(f"intruder: error: {error.filename or 'files'}: {error.strerror or error}; wanted files and folders that "
              "can be read and written", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("intruder: stopped; the same command continues from the last checkpoint", file=sys.stderr)
        return 130


def _command() -> str:
    """The command line as a record keeps it: paths of this machine by their last name only, also in KEY=VALUE."""
    words = []
    for word in sys.argv[1:]:
        key, equals, value = word.rpartition("=")
        words.append(f"{key}{equals}{Path(value).name if Path(value).is_absolute() else value}")
    return shlex.join(["intruder", *words])


def _count(options) -> None:
    from .count import count_checkpoints, format_table
    result = count_checkpoints(options.base, options.tuned, options.k, options.epsilon)
    print(json.dumps(result) if options.json else format_table(result))


def _audit(options) -> None:
    from .audit import audit, audit_each
    from .audit_files import table_of
    if not options.cache_gb > 0:
        raise InputError(f"cache-gb is {options.cache_gb}; wanted more than 0")
    several = len(options.tuned) > 1
    call, tuned = (audit_each, options.tuned) if several else (audit, options.tuned[0])
    result = call(options.base, tuned, options.k, options.epsilon, options.out, options.device, options.resume,
                  options.include, options.cache, int(options.cache_gb * 1e9), _Lines())
    if result is None:
        return
    setting = f"epsilon = {result['epsilon']:g}, k = {result['k']}"
    if several:
        print(f"{table_of(result)}\n{setting}; see {Path(options.out) / 'summary.json'} and the report.html of each model")
        return
    share = f"{result['total']} intruder dimensions among {result['vectors']} vectors"
    print(f"{share} of {len(result['matrices'])} matrices, {setting}; {result['borderline']} borderline; "
          f"see {Path(options.out) / 'report.html'}")


def _mitigate(options) -> None:
    from .mitigate import mitigate_adapter
    result = mitigate_adapter(options.base, options.adapter, options.scale, options.out, options.which, options.control,
                              options.rank, options.k, options.epsilon, options.rounds, cache=options.cache,
                              say=_Lines())
    lost = max((matrix["discarded"] for matrix in result["matrices"]), default=0.0)
    more = f"; up to {100 * lost:.1f} % of an edit discarded to keep the rank" if options.rank == "keep" else ""
    if not result["matrices_edited"]:
        print(f"nothing to edit: {options.out} is a copy of the adapter")
        return
    print(f"{result['total_before']} intruder dimensions before, {result['total_after']} after, "
          f"{result['matrices_edited']} matrices edited{more}; {options.out} loads with PeftModel.from_pretrained")


class _Lines:
    """Progress on standard error: every line on a terminal, elsewhere one in ten seconds."""

    def __init__(self) -> None:
        self.last = float("-inf")

    def __call__(self, line: str) -> None:
        if sys.stderr.isatty() or time.monotonic() - self.last > 10:
            print(line, file=sys.stderr, flush=True)
            self.last = time.monotonic()


def _run(options) -> None:
    from .config import make_config, once, parse_setting, read_config
    values = read_config(options.config) | once(parse_setting(text) for text in options.set)
    config = make_config(values)
    from .run import run_config
    done = run_config(config, options.out, _command())
    if done is not None:
        record = done.record
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in record.metrics.items() if value is not None)
        print(f"{Path(options.out) / record.run}.json: {numbers}")


def _sweep(options) -> None:
    from .sweep import run_sweep
    if options.jobs < 1:
        raise InputError(f"jobs is {options.jobs}; wanted 1 or more")
    path = Path(options.name)
    if not path.suffix:
        path = EXPERIMENTS / f"{options.name}.json"
    if not path.is_file():
        raise InputError(f"no sweep {options.name!r}; wanted a file, or at the top level of the repository one of "
                         f"{', '.join(sweep_names()) or 'lib/experiments, which is not here'}")
    local = {"model": options.model, "data": options.data}
    made = run_sweep(path, options.out, options.jobs, lambda line: print(line, flush=True), **local)
    print(f"{made} runs made; `intruder records gather --runs {options.out}` packs them")


def sweep_names() -> list[str]:
    """The sweeps in lib/experiments, seen from here; files that configure a single run are left out."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.json") if "methods" in json.loads(path.read_text()))


def _pretrain(options) -> None:
    if options.stop_after is not None and options.stop_after < 1:
        raise InputError(f"stop-after is {options.stop_after}; wanted 1 step or more")
    if options.sizes:
        if options.stop_after:
            raise InputError("--stop-after and --sizes were both given; wanted one of them")
        from .base_sizes import compare_sizes
        compare_sizes(options.sizes, options.out, lambda line: print(line, flush=True), _command())
        return
    from .pretrain import pretrain
    record = pretrain(options.out, stop_after=options.stop_after, command=_command())
    print(f"{options.out}/record.json: first losses {record['first_losses'][:3]}, "
          f"held-out {[point['held_out_loss'] for point in record['curve'][-1:]]}")


def _records(options) -> int:
    from .records import check_records, gather
    if options.action == "gather":
        print(f"{len(gather(options.runs, options.results))} files written to {options.results}")
        return 0
    problems = check_records(options.results)
    print("\n".join(problems) or f"{options.results}: every record is whole")
    return 2 if problems else 0


def _address(options) -> None:
    from .book_address import current_address, set_address
    if options.url:
        set_address(options.url)
    print(current_address())


if __name__ == "__main__":
    raise SystemExit(main())
