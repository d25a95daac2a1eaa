"""The library's ranges admit what Colab has installed, so that the first cell leaves Colab's packages alone."""

from __future__ import annotations

import re
import tomllib

import pytest
from built_book import REPOSITORY
from packaging.requirements import Requirement

# googlecolab/backend-info, as of 2026-08-19; Python 3.13
COLAB = {
    "numpy": "2.1.3", "pandas": "2.2.3", "altair": "5.5.0", "ipywidgets": "7.7.1", "anywidget": "0.9.21",
    "torch": "2.11.0+cu128", "transformers": "5.15.0", "peft": "0.20.0", "accelerate": "1.14.0", "datasets": "4.0.0",
}
PROJECT = tomllib.loads((REPOSITORY / "lib" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RANGES = [Requirement(text) for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"],
                                         *PROJECT["optional-dependencies"]["hub"])]
REQUIREMENTS = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8")
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", REQUIREMENTS, re.MULTILINE))


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")


@pytest.mark.parametrize("requirement", RANGES, ids=str)
def test_colab_version_is_admitted(requirement):
    """pip would leave Colab's version where it is."""
    version = COLAB.get(canonical(requirement.name))
    assert version is None or requirement.specifier.contains(version, prereleases=True)


@pytest.mark.parametrize("requirement", RANGES, ids=str)
def test_pinned_version_is_admitted(requirement):
    """The book's pin lies in the library's range, and there is one."""
    pins = {canonical(name): version for name, version in PINS.items()}
    assert requirement.specifier.contains(pins[canonical(requirement.name)])


def test_python_of_colab_is_admitted():
    """requires-python lets 3.11 to 3.13 in."""
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains("3.13.15")


def test_requirements_end_with_the_library():
    """The last line installs lib/ itself, and every other line is an exact pin or a comment."""
    lines = REQUIREMENTS.split("\n")
    assert lines[-2:] == ["-e ./lib", ""]
    assert all(not line or line.startswith("#") or "==" in line for line in lines[:-2])
