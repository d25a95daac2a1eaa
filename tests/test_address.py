"""The public address stands in `_config.yml`; its copies agree, and one command changes them all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from built_book import REPOSITORY

from intruder.book_address import address_files, current_address, set_address
from intruder.errors import InputError

NEW = "https://github.com/a-new-home/the.book_2"
SKIPPED = {".git", ".venv", "_build", "results", "__pycache__", ".pytest_cache", ".hypothesis", "runs", "assets"}


@pytest.fixture
def copy(tmp_path) -> Path:
    """The repository's text files in a temporary folder."""
    def ignore(folder, names):
        return [name for name in names if name in SKIPPED or name.endswith((".egg-info", ".parquet", ".safetensors"))]

    return Path(shutil.copytree(REPOSITORY, tmp_path / "copy", ignore=ignore))


def holders(root: Path, words: str) -> list[str]:
    """Every file under root that contains the words."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*")
                  if path.is_file() and words in path.read_bytes().decode("utf-8", errors="ignore"))


def slug(address: str) -> str:
    return address.removeprefix("https://github.com/")


def test_only_config_readme_and_first_cells_hold_the_address(copy):
    """No test, module, page or file of settings names the address besides the ones the command rewrites."""
    known = {str(path.relative_to(copy)) for path in address_files(copy)}
    found = holders(copy, slug(current_address(copy)))
    assert set(found) <= known
    assert {"_config.yml", "README.md", "book/01_two_ways.ipynb", "book/02_intruder_dimensions.ipynb"} <= set(found)


def test_config_holds_it_once(copy):
    """In `_config.yml` it is repository.url and nothing else; the pages' own address is derived at build time."""
    assert (copy / "_config.yml").read_text(encoding="utf-8").count(slug(current_address(copy))) == 1


def test_setting_changes_every_occurrence(copy):
    """After the command nothing holds the old address, and what held it holds the new one as often."""
    old = current_address(copy)
    before = {name: (copy / name).read_text(encoding="utf-8").count(slug(old)) for name in holders(copy, slug(old))}
    changed = set_address(NEW, copy)
    assert sorted(str(path.relative_to(copy)) for path in changed) == sorted(before)
    assert holders(copy, slug(old)) == []
    assert {name: (copy / name).read_text(encoding="utf-8").count(slug(NEW)) for name in before} == before
    assert current_address(copy) == NEW


def test_setting_is_idempotent_and_reversible(copy):
    """Twice is once, and going back restores every byte."""
    old = current_address(copy)
    original = {path: path.read_bytes() for path in address_files(copy)}
    set_address(NEW, copy)
    assert set_address(NEW, copy) == []
    set_address(old, copy)
    assert {path: path.read_bytes() for path in address_files(copy)} == original


def test_an_address_that_continues_the_old_one_is_set_once(copy):
    """A new address that begins with the old one does not grow with every call; the old one's is not cut short."""
    longer = current_address(copy) + "-2"
    set_address(longer, copy)
    assert set_address(longer, copy) == [] and current_address(copy) == longer
    assert holders(copy, slug(longer) + "-2") == []


@pytest.mark.parametrize("url", [
    "", "github.com/a/b", "http://github.com/a/b", "https://github.com/a", "https://github.com/a/b/",
    "https://github.com/a/b.git", "https://github.com/a/b c",
    "https://github.com/a/b?x=1", "https://gitlab.com/a/b", "https://github.com/-a/b",
    "https://github.com/a/b\nc", "https://github.com/a/..", None, 3,
])
def test_malformed_addresses_are_refused(copy, url):
    """Anything but https://github.com/OWNER/NAME is an InputError that says so, and nothing changes."""
    original = {path: path.read_bytes() for path in address_files(copy)}
    with pytest.raises(InputError, match="https://github.com/OWNER/NAME"):
        set_address(url, copy)
    assert {path: path.read_bytes() for path in address_files(copy)} == original


def test_a_folder_without_config_is_refused(tmp_path):
    """Outside the repository the error says where to go."""
    with pytest.raises(InputError, match="top level"):
        set_address(NEW, tmp_path)
    (tmp_path / "_config.yml").write_text("title: x\n", encoding="utf-8")
    with pytest.raises(InputError, match="repository.url"):
        current_address(tmp_path)
