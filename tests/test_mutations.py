"""The tests notice the mistakes that re-implementations of the count make."""

import pytest

from mutations import MUTATIONS, copy_package, package_in_use, run_tests


def test_the_unchanged_copy_passes(tmp_path):
    """The tests chosen for the mutations pass on a copy of the package, and it is the copy that they test."""
    folder = copy_package(tmp_path)
    assert package_in_use(folder) == tmp_path / "intruder"
    done = run_tests(folder, tuple(dict.fromkeys(test for mutation in MUTATIONS for test in mutation.tests)))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mistake_is_noticed(tmp_path, mutation):
    """With the mistake in place every chosen test runs and fails; none passes and none breaks before it asserts."""
    done = run_tests(copy_package(tmp_path, mutation), mutation.tests)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{len(mutation.tests)} failed in"), done.stdout
    assert done.stdout.count("AssertionError") >= len(mutation.tests), done.stdout
