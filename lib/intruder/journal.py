"""Work that survives a kill: one line on disk per finished piece, shared by the processes of one launch."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .errors import InputError

FOLDER = ".progress"
WAIT = 3600.0  # seconds without any new line after which the other processes are taken to be dead


def launched_as(environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """(rank, world size) of this process from RANK and WORLD_SIZE, as `accelerate launch` and `torchrun` set them."""
    environment = os.environ if environment is None else environment
    rank, world = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise InputError(f"RANK is {rank!r} and WORLD_SIZE is {world!r}; wanted whole numbers, 0 <= RANK < WORLD_SIZE")
    return int(rank), int(world)


def share(costs: Sequence[float], rank: int, world: int) -> list[int]:
    """The indices that process `rank` of `world` does: the dearest first, each to the process with the least so far."""
    load, mine = [0.0] * world, []
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = load.index(min(load))
        load[least] += costs[index]
        if least == rank:
            mine.append(index)
    return sorted(mine)


class Journal:
    """Finished pieces in `out`/.progress: a file of settings, and one file of JSON lines per process and attempt.

    `settings` says what is being made; lines of other settings are never continued. A line is complete or ignored, so
    a process may be killed at any moment. `out` has no file with a final name until `finish` has been called.
    """

    def __init__(self, out: str | Path, settings: dict, rank: int = 0, resume: bool = False):
        self.out, self.folder, self.rank = Path(out), Path(out) / FOLDER, rank
        self.settings, self.created = json.loads(json.dumps(settings)), False
        if rank == 0:
            self._begin(resume)
        else:
            self._await_start()
        self.done: dict[str, dict] = {line["name"]: line for line in self._lines() if "name" in line}
        self.path = self.folder / f"{rank}-{os.getpid()}-{time.time_ns()}.jsonl"

    def add(self, record: dict) -> None:
        """Keep one finished piece; it is on disk when this returns. `record` has a `name` of its own."""
        self._write(record)
        self.done[record["name"]] = record

    def fail(self, message: str) -> None:
        """Tell the process that waits that this one has given up."""
        try:
            self._write({"failed": message, "rank": self.rank, "time": time.time()})
        except InputError:
            pass  # the disk is full: the waiting process will find out for itself

    def wait(self, names: Iterable[str], since: float, patience: float = WAIT) -> dict[str, dict]:
        """All pieces, once every process has written its own; InputError if one failed, or was silent for too long.

        `since` is when this launch began (time.time()): failures of earlier attempts are not held against it.
        """
        wanted, last, seen = set(names), time.monotonic(), -1
        while True:
            lines = list(self._lines())
            self.done |= {line["name"]: line for line in lines if "name" in line}
            for line in lines:
                if "failed" in line and line["rank"] != self.rank and line["time"] >= since:
                    raise InputError(f"process {line['rank']} stopped: {line['failed']}")
            missing = wanted - self.done.keys()
            if not missing:
                return {name: self.done[name] for name in wanted}
            if len(lines) != seen:
                seen, last = len(lines), time.monotonic()
            if time.monotonic() - last > patience:
                raise InputError(
                    f"{len(missing)} pieces, {min(missing)} among them, were not finished by the other "
                    f"processes within {patience:.0f} s; {self._again()}"
                )
            time.sleep(min(0.5, patience / 4))

    def finish(self) -> None:
        """Everything has its final file: the journal is no longer needed."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def abandon(self) -> None:
        """After an error: remove what this process created if nothing was finished, so that no empty folder is left."""
        if self.created and not self.done:
            shutil.rmtree(self.folder, ignore_errors=True)
            if self.out.is_dir() and not any(self.out.iterdir()):
                self.out.rmdir()

    def _begin(self, resume: bool) -> None:
        known = self.folder / "settings.json"
        if resume and known.is_file():
            self._check(known)
            return
        if self.out.exists() and not self.out.is_dir():
            raise InputError(
                f"{self.out} is a file; wanted a folder that does not exist yet: choose another with --out"
            )
        if self.out.is_dir() and any(self.out.iterdir()):
            way = "add --resume to continue it" if known.is_file() else "choose another with --out"
            raise InputError(f"{self.out} exists and is not empty; wanted a new folder: {way}")
        try:
            self.created = not self.out.exists()
            self.folder.mkdir(parents=True)
            partial = self.folder / "settings.partial"
            partial.write_text(json.dumps(self.settings), encoding="utf-8")
            os.replace(partial, known)
        except OSError as error:
            self.done = {}
            self.abandon()
            raise InputError(
                f"cannot write to {self.out} ({error.strerror or error}); wanted a folder with room"
            ) from error

    def _await_start(self, patience: float = 120.0) -> None:
        known, start = self.folder / "settings.json", time.monotonic()
        while not known.is_file():
            if time.monotonic() - start > patience:
                raise InputError(f"the first process has not begun {self.out} within {patience:.0f} s; see its message")
            time.sleep(0.1)
        self._check(known)

    def _check(self, known: Path) -> None:
        try:
            settings = json.loads(known.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{known} cannot be read ({error}); remove {self.out} and begin again") from error
        for key, value in self.settings.items():
            if settings.get(key) != value:
                raise InputError(
                    f"{self.out} was begun with {key}={settings.get(key)!r} and this command has {value!r}; "
                    "wanted the same command: choose another folder with --out"
                )

    def _lines(self) -> Iterable[dict]:
        for path in sorted(self.folder.glob("*.jsonl")):
            for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    continue  # the process was killed while it wrote this line
                if isinstance(line, dict) and ("name" in line or "failed" in line):
                    yield line

    def _write(self, line: dict) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"cannot write to {self.folder} ({error.strerror or error}); {self._again()}") from error

    def _again(self) -> str:
        return f"what is finished is kept: make room and repeat the command with --resume ({len(self.done)} done)"
