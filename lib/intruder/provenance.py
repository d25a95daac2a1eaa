"""Where and when a number was made: versions, commit, device, threads, time."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "intruder")


def provenance(command: str) -> dict:
    """What a record says of its run: command, commit and dirty flag, versions, device, threads, start.

    Call it when the run starts, so that it names the code that is about to run; `wall_seconds` is added at the end.
    """
    commit, dirty = git_state()
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
    return {"command": command, "commit": commit, "dirty": dirty, "source": source_hash(),
            "versions": {"python": platform.python_version(), **versions}, "device": device,
            "threads": torch.get_num_threads(), "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def git_state() -> tuple[str, bool]:
    """(commit, dirty) of the checkout this package runs from; ('unknown', True) outside one."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True).stdout
    try:
        return git("rev-parse", "HEAD").strip(), bool(git("status", "--porcelain", "--", ".").strip())
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True


def source_hash() -> str:
    """SHA-256 over this package's Python files: the code that ran, whatever the commit says."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def write_json(path: Path, value: dict) -> None:
    """Write `value` as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
