"""The built book for tests: `make book`'s if it is newer than every source, else built here, strictly and once."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
HTML = REPOSITORY / "_build" / "html"
COMPLETE = HTML / ".complete"  # touched by the Makefile, and below, after a build that succeeded
SUFFIXES = {".py", ".js", ".css", ".ipynb", ".md", ".yml", ".toml", ".json", ".parquet", ".safetensors", ".bib", ".svg"}


def sources() -> list[Path]:
    """Every file that the pages are made from."""
    below = [path for folder in ("book", "lib") for path in (REPOSITORY / folder).rglob("*") if path.suffix in SUFFIXES]
    kept = [path for path in below if not {"build", "_build", ".ipynb_checkpoints"} & set(path.parts[:-1])]
    return [*kept, REPOSITORY / "_config.yml", REPOSITORY / "_toc.yml", REPOSITORY / "requirements.txt"]


@functools.cache
def built_book() -> Path:
    """The folder of the built pages; raises with the end of the build's log if the strict build fails."""
    if not COMPLETE.exists() or COMPLETE.stat().st_mtime < max(path.stat().st_mtime for path in sources()):
        tool = Path(sys.executable).with_name("jupyter-book")
        subprocess.run([tool, "clean", "--all", REPOSITORY], check=True, capture_output=True)
        build = [tool, "build", REPOSITORY, "--all", "-W", "-n", "--keep-going"]
        done = subprocess.run(build, cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError("the strict build of the book failed:\n" + (done.stdout + done.stderr)[-6000:])
        COMPLETE.touch()
    return HTML
