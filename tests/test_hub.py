"""Checkpoints named by hub id, with and without a revision: read from the cache, and asked for as they should be."""

import shutil

import huggingface_hub
import pytest

from intruder import InputError
from intruder.hub import PATTERNS, local_folder
from intruder.weights import pair_sources

MAIN, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch, base_dir, tuned_dir, adapter_dir):
    """A cache of the hub, as huggingface_hub lays it out, and no network."""
    for repository, refs in {
        "models--owner--base": {"main": (MAIN, base_dir)},
        "models--owner--tuned": {"main": (MAIN, base_dir), "v2": (OTHER, tuned_dir)},
        "models--owner--adapter": {"main": (MAIN, adapter_dir)},
    }.items():
        for ref, (commit, folder) in refs.items():
            shutil.copytree(folder, tmp_path / repository / "snapshots" / commit)
            (tmp_path / repository / "refs").mkdir(exist_ok=True)
            (tmp_path / repository / "refs" / ref).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_hub_id_is_read_from_the_cache(cache):
    """owner/name gives the snapshot of the main branch; base and adapter both by id give the pairs of the folders."""
    assert local_folder("owner/base") == cache / "models--owner--base" / "snapshots" / MAIN
    assert len(pair_sources("owner/base", "owner/adapter")) == 12


@pytest.mark.parametrize("revision", ["v2", OTHER])
def test_a_revision_chooses_the_snapshot(cache, revision):
    """owner/name@revision, a branch, a tag or a commit, reads that snapshot and not main's."""
    main = {source.name: source.load() for source in pair_sources("owner/base", "owner/tuned")}
    chosen = {source.name: source.load() for source in pair_sources("owner/base", f"owner/tuned@{revision}")}
    assert not any((pair.tuned != pair.pretrained).any() for pair in main.values())
    moved = [name for name, pair in chosen.items() if (pair.tuned != pair.pretrained).any()]
    assert moved == ["encoder.layer.1.attention.self.query"]


def test_what_the_hub_cannot_give_is_one_clear_error(cache):
    """An id or a revision that is not there, and no network: the message names both readings of the text."""
    for text in ("owner/absent", "owner/tuned@v9", "absent"):
        with pytest.raises(InputError, match=f"no folder {text} here, and the hub did not give '{text}'"):
            pair_sources(text, "owner/adapter")


def test_only_safetensors_and_configurations_are_asked_for(monkeypatch, tmp_path):
    """The hub is asked for one repository at one revision, and for no pickle and no code."""
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path))
    assert local_folder("owner/name@refs/pr/1") == tmp_path
    assert asked == [(("owner/name",), {"revision": "refs/pr/1", "allow_patterns": PATTERNS})]
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in PATTERNS)


@pytest.mark.parametrize("text", ["./owner/name", "/owner/name", "../name", "~/name", "owner/../name", "a/b/c"])
def test_a_path_is_never_taken_for_a_hub_id(monkeypatch, text):
    """What reads as a path is looked for here only."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("the hub was asked"))
    with pytest.raises(InputError, match="no folder"):
        pair_sources(text, text)


def test_a_folder_comes_before_the_hub(monkeypatch, tmp_path, base_dir):
    """A local folder of the same name is used, and the hub is not asked."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_dir, tmp_path / "owner" / "base")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("the hub was asked"))
    assert pair_sources("owner/base", "owner/base")
