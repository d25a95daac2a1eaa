"""Journals, shares, time estimates and files that are whole or not there."""

import json
import resource
import time
from contextlib import contextmanager

import pytest

from intruder.errors import InputError
from intruder.estimate import Estimate, in_words
from intruder.journal import Journal, launched_as, share
from intruder.whole import new_folder, write_files


@contextmanager
def full_disk(bytes_left: int = 0):
    """No file may grow beyond `bytes_left`: writing fails with the system's own error, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_finished_pieces_survive_a_kill(tmp_path):
    """A second journal of the same settings finds the lines of the first, and not the line it was killed in."""
    first = Journal(tmp_path / "out", {"k": 3})
    first.add({"name": "a", "count": 1})
    first.add({"name": "b", "count": 2})
    with open(first.path, "a") as file:
        file.write('{"name": "c", "cou')
    again = Journal(tmp_path / "out", {"k": 3}, resume=True)
    assert set(again.done) == {"a", "b"} and again.done["b"]["count"] == 2
    again.add({"name": "c", "count": 4})
    assert set(again.wait("abc", time.time())) == set("abc")


def test_a_journal_of_other_settings_is_not_continued(tmp_path):
    """Another k is refused with both values; without resume so is any folder that is not empty."""
    Journal(tmp_path / "out", {"k": 3}).add({"name": "a"})
    with pytest.raises(InputError, match="k=3 and this command has 4"):
        Journal(tmp_path / "out", {"k": 4}, resume=True)
    with pytest.raises(InputError, match="--resume"):
        Journal(tmp_path / "out", {"k": 3})
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        Journal(tmp_path / "file", {})


def test_an_error_before_anything_is_done_leaves_no_folder(tmp_path):
    """abandon() removes what was created if nothing is finished, and keeps what is finished."""
    journal = Journal(tmp_path / "out", {})
    journal.abandon()
    assert not (tmp_path / "out").exists()
    journal = Journal(tmp_path / "out", {})
    journal.add({"name": "a"})
    journal.abandon()
    assert Journal(tmp_path / "out", {}, resume=True).done.keys() == {"a"}


def test_the_first_process_hears_of_another_that_failed(tmp_path):
    """A failure written by rank 1 ends the wait of rank 0; one from an earlier attempt does not; long silence does."""
    first = Journal(tmp_path / "out", {})
    second = Journal(tmp_path / "out", {}, rank=1)
    second.fail("no room")
    with pytest.raises(InputError, match="process 1 stopped: no room"):
        first.wait(["a"], since=0)
    with pytest.raises(InputError, match="1 pieces, a among them"):
        first.wait(["a"], since=time.time() + 1, patience=0.2)


def test_a_full_disk_is_one_error_and_keeps_what_is_finished(tmp_path):
    """The line that does not fit is not counted as done; the message names --resume."""
    journal = Journal(tmp_path / "out", {})
    journal.add({"name": "a"})
    with full_disk(40), pytest.raises(InputError, match="cannot write .*--resume"):
        journal.add({"name": "b", "values": list(range(100))})
    assert Journal(tmp_path / "out", {}, resume=True).done.keys() == {"a"}
    with full_disk(), pytest.raises(InputError, match="cannot write"):
        Journal(tmp_path / "other", {})
    assert not (tmp_path / "other").exists()


def test_shares_cover_everything_once_and_balance():
    """Every index belongs to one process; with 3 processes no load exceeds the mean by more than the dearest piece."""
    costs = [7.0, 1, 1, 1, 5, 3, 3, 2, 9, 4]
    shares = [share(costs, rank, 3) for rank in range(3)]
    assert sorted(sum(shares, [])) == list(range(10))
    assert max(sum(costs[i] for i in part) for part in shares) <= sum(costs) / 3 + max(costs)
    assert share([1.0], 1, 2) == []


@pytest.mark.parametrize("environment", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1"}, {"WORLD_SIZE": "two"}])
def test_a_launch_that_makes_no_sense_is_refused(environment):
    """RANK must be a whole number below WORLD_SIZE."""
    with pytest.raises(InputError, match="RANK"):
        launched_as(environment)
    assert launched_as({}) == (0, 1) and launched_as({"RANK": "1", "WORLD_SIZE": "4"}) == (1, 4)


def test_the_estimate_says_nothing_before_it_can_and_then_holds_the_truth():
    """None with one matrix done; with equal times the range closes; an unseen shape widens it by two both ways."""
    estimate = Estimate()
    estimate.add((10, 10), 2.0)
    assert estimate.remaining([(10, 10)]) is None
    for _ in range(3):
        estimate.add((10, 10), 2.0)
    assert estimate.remaining([(10, 10)] * 5) == (10.0, 10.0)
    low, high = estimate.remaining([(20, 20)])
    assert (low, high) == (8.0, 32.0)  # eight times the operations, 16 s, within a factor of two
    assert [in_words(s) for s in (3, 89, 100, 6000)] == ["3 s", "89 s", "2 min", "1 h 40 min"]


def test_files_appear_together_or_not_at_all(tmp_path):
    """If the second cannot be written, the first does not stay, and no partial file is left."""
    writers = {"a.json": lambda path: path.write_text("{}"), "b.json": lambda path: path.write_text("x" * 5000)}
    with full_disk(100), pytest.raises(InputError, match="cannot write"):
        write_files(tmp_path, writers)
    assert list(tmp_path.iterdir()) == []
    assert [path.name for path in write_files(tmp_path, writers)] == ["a.json", "b.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {}


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    """An error inside the block leaves nothing; an existing folder with content is refused; an empty one is taken."""
    with pytest.raises(InputError, match="cannot write"), full_disk(10), new_folder(tmp_path / "out") as place:
        (place / "big").write_text("x" * 100)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as place:
        (place / "file").write_text("whole")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]
    with pytest.raises(InputError, match="exists"), new_folder(tmp_path / "out"):
        pass
