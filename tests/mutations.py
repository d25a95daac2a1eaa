"""Deliberate mistakes in the library, each with the tests that must notice it. Run by test_mutations.py.

The mistakes are those that published re-implementations make: a threshold that is not strict, no absolute value, right
vectors in place of left ones, only the leading pre-trained vectors as reference, a LoRA update without alpha / r.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "lib" / "intruder"


@dataclass(frozen=True)
class Mutation:
    """Changes of source, (file, old text, new text) each; with all of them in place every one of `tests` must fail."""

    name: str
    changes: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "not strict",
        (("intruders.py", "values[:k] < epsilon", "values[:k] <= epsilon"),),
        ("test_intruders.py::test_a_match_equal_to_epsilon_is_not_an_intruder",),
    ),
    Mutation(
        "no absolute value",
        (("intruders.py", "np.abs(X.T @ Y)", "(X.T @ Y)"),),
        (
            "test_intruders.py::test_the_sign_of_a_singular_vector_does_not_matter",
            "test_intruders.py::test_a_vector_opposite_to_a_pretrained_one_is_not_an_intruder",
        ),
    ),
    Mutation(
        "right vectors",
        (
            (
                "measure.py",
                "max_cosines(before.U.cpu().numpy(), after.U.cpu()",
                "max_cosines(before.Vh.T.cpu().numpy(), after.Vh.T.cpu()",
            ),
            (
                "count.py",
                "max_cosines(before.U.numpy(), after.U[:, :k]",
                "max_cosines(before.Vh.T.numpy(), after.Vh.T[:, :k]",
            ),
        ),
        (
            "test_measure.py::test_left_vectors_are_compared_not_right_ones",
            "test_count.py::test_the_matches_are_those_of_the_left_vectors",
        ),
    ),
    Mutation(
        "only the leading pre-trained vectors",
        (
            ("measure.py", "max_cosines(before.U.cpu()", "max_cosines(before.U[:, :10].cpu()"),
            ("count.py", "max_cosines(before.U.numpy()", "max_cosines(before.U[:, :k].numpy()"),
        ),
        (
            "test_measure.py::test_a_vector_aligned_with_a_mid_spectrum_one_is_not_an_intruder",
            "test_count.py::test_a_vector_aligned_with_a_mid_spectrum_one_is_not_counted",
        ),
    ),
    Mutation(
        "no alpha / r",
        (
            (
                "changes.py",
                "return scale * (B.detach().float() @ A.detach().float())",
                "return B.detach().float() @ A.detach().float()",
            ),
        ),
        ("test_weights.py::test_the_update_of_an_adapter_is_alpha_over_r_times_B_A",),
    ),
)


def copy_package(folder: Path, mutation: Mutation | None = None) -> Path:
    """A copy of the package in `folder`, with the mutation applied; the folder is what goes on PYTHONPATH."""
    shutil.copytree(PACKAGE, folder / "intruder", ignore=shutil.ignore_patterns("assets", "static", "__pycache__"))
    if mutation is not None:
        for name, old, new in mutation.changes:
            path = folder / "intruder" / name
            source = path.read_text(encoding="utf-8")
            if source.count(old) != 1:
                raise ValueError(f"{old!r} stands {source.count(old)} times in {name}; wanted once")
            path.write_text(source.replace(old, new), encoding="utf-8")
    return folder


def run_tests(folder: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess:
    """Run these tests with the copy in `folder` in place of the installed package."""
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(TESTS / "pytest.ini")]
    return subprocess.run(
        [*command, *(str(TESTS / test) for test in tests)], capture_output=True, text=True, env=environment, timeout=300
    )


def package_in_use(folder: Path) -> Path:
    """Where `import intruder` finds the package when `folder` is first on the path."""
    done = subprocess.run(
        [sys.executable, "-c", "import intruder; print(intruder.__file__)"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(folder)},
        timeout=60,
        check=True,
    )
    return Path(done.stdout.strip()).parent
