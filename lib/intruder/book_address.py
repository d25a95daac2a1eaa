"""The public address of the repository: it stands in `_config.yml`, and one command sets it everywhere.

The first cells of the chapters and the README must name the address as text, because Colab opens a notebook alone and
GitHub shows a README as it is. They are copies; `set_address` rewrites them, and a test fails where one disagrees.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from .errors import InputError

CONFIG = "_config.yml"
COPIES = ("README.md", "book/**/*.md", "book/**/*.ipynb")
_URL = re.compile(r"https://github\.com/([A-Za-z0-9](?:[A-Za-z0-9-]{0,37}[A-Za-z0-9])?)/([A-Za-z0-9._-]{1,100})")
_LINE = re.compile(r"^(repository:[ \t]*(?:\n[ \t]+.*)*?\n[ \t]+url:[ \t]*)(\S+)", re.MULTILINE)


def current_address(root: str | Path = ".") -> str:
    """The address in `_config.yml` (repository, url); InputError if there is no such file or line under `root`."""
    path = Path(root) / CONFIG
    if not path.is_file():
        raise InputError(f"no {CONFIG} in {str(root)!r}; wanted the top level of the repository: change to it")
    match = _LINE.search(path.read_text(encoding="utf-8"))
    if match is None:
        raise InputError(f"{CONFIG} has no repository.url; wanted a line `  url: https://github.com/OWNER/NAME` in it")
    return match[2]


def set_address(url: str, root: str | Path = ".") -> list[Path]:
    """Make `url` the repository's address in `_config.yml`, the first cells of the chapters, the pages and the README.

    `url` must read https://github.com/OWNER/NAME, as the Colab buttons need it; anything else raises InputError and
    changes nothing. Besides whole addresses, links of the form .../github/OWNER/NAME/... (Colab) are rewritten. Returns
    the files that changed; setting the present address changes none.
    """
    if not _URL.fullmatch(str(url)) or str(url).endswith((".git", ".", "/..")):
        raise InputError(f"address {url!r}; wanted https://github.com/OWNER/NAME, without a closing slash or .git; "
                         "type `intruder address https://github.com/OWNER/NAME`")
    root, old = Path(root), current_address(root)
    old_slug, new_slug = ("/".join(address.rsplit("/", 2)[1:]) for address in (old, url))
    # after the name only what cannot belong to a name: a full stop ends a sentence unless a letter follows it
    pattern = re.compile(rf"(github(?:\.com)?/){re.escape(old_slug)}(?![\w-]|\.\w)")
    changed = []
    for path in address_files(root):
        text = path.read_text(encoding="utf-8")
        new = pattern.sub(rf"\g<1>{new_slug}", text)
        if new != text:
            changed.append((path, new))
    for path, new in changed:
        _write(path, new)
    return [path for path, _ in changed]


def address_files(root: str | Path = ".") -> list[Path]:
    """The files that may hold the address: `_config.yml` first, then every page, chapter and the README."""
    root = Path(root)
    found = [path for pattern in COPIES for path in sorted(root.glob(pattern)) if path.is_file()]
    hidden = [path for path in found if any(part.startswith(".") for part in path.relative_to(root).parts)]
    return [root / CONFIG, *(path for path in found if path not in hidden)]


def _write(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(name, path.stat().st_mode)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
