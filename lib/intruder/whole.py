"""Files and folders that are whole or not there: written under another name, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from .errors import InputError


def write_files(folder: str | Path, writers: Mapping[str, Callable[[Path], object]]) -> list[Path]:
    """Write every file by `writers[name](path)` beside its place, then rename all in this order; the paths written.

    If any of them cannot be written (a full disk, say), none appears under its name and InputError says why.
    """
    folder = Path(folder)
    partial = {name: folder / f".{name}.{os.getpid()}.partial" for name in writers}
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name, write in writers.items():
                write(partial[name])
            for name, path in partial.items():
                os.replace(path, folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return [folder / name for name in writers]


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `folder` when the block ends, and disappears if it fails.

    Raises InputError if `folder` exists and is not an empty folder, before the block, and for a disk that is full.
    """
    folder = Path(folder)
    refuse_existing(folder)
    partial = folder.absolute().with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        with writing(folder):
            partial.mkdir(parents=True)
            yield partial
            if folder.is_dir():
                folder.rmdir()
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(folder: str | Path) -> None:
    """InputError if there is something at `folder` that writing would mix with or overwrite."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; wanted a new one: choose another with --out")


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn what the system says about a full or read-only disk into one InputError that names the place."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # safetensors reports a failed write by its own class, whose module is not loaded here.
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot write {place} ({reason}); wanted a folder with enough room") from error
        raise
