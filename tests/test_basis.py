"""The store of bases: found by content, bounded, atomic, and a damaged file is made anew."""

import os

import pytest
import torch

from intruder import basis as module
from intruder.basis import Basis, BasisStore, StoredBasis, content_key, inside, outside
from intruder.errors import InputError


def matrix(seed: int, rows: int = 12, columns: int = 9) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def files(folder):
    return sorted(folder.glob("*.safetensors"))


def test_a_basis_is_a_decomposition():
    """U diag(S) Vh is the matrix, in float64 for small ones."""
    basis = Basis.of(matrix(0))
    assert basis.S.dtype == torch.float64
    torch.testing.assert_close((basis.U * basis.S) @ basis.Vh, matrix(0).double())


def test_the_key_is_the_content():
    """Equal values have one key whatever their strides; another value, shape or dtype has another."""
    W = matrix(0)
    keys = {content_key(other) for other in (W, W.T, W.double(), W + 1, W.reshape(9, 12), W.bfloat16())}
    assert len(keys) == 6
    assert content_key(W.T.contiguous().T) == content_key(W) == content_key(W.clone())


def test_stored_and_read_back(tmp_path):
    """A second store on the same folder reads the file, bit for bit, and decomposes nothing."""
    first = BasisStore(tmp_path / "bases").get(matrix(0))
    store = BasisStore(tmp_path / "bases")
    assert matrix(0) in store and matrix(1) not in store
    stamp = files(tmp_path / "bases")[0].stat().st_ino
    second = store.get(matrix(0))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
    assert files(tmp_path / "bases")[0].stat().st_ino == stamp and store.rebuilt == 0


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "swap"])
def test_a_damaged_file_is_made_anew(tmp_path, damage):
    """A flipped bit, a cut file, an empty one and another matrix's file are noticed and replaced."""
    store = BasisStore(tmp_path)
    expected = store.get(matrix(0))
    path = files(tmp_path)[0]
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-20] ^= 1
    elif damage == "swap":
        BasisStore(tmp_path / "other").get(matrix(1))
        content = bytearray(files(tmp_path / "other")[0].read_bytes())
    path.write_bytes(content[: {"cut": len(content) // 2, "empty": 0}.get(damage, len(content))])
    again = BasisStore(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(expected[:3], again.get(matrix(0))[:3], strict=True))
    assert again.rebuilt == 1
    fresh = BasisStore(tmp_path)
    fresh.get(matrix(0))
    assert fresh.rebuilt == 0


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (9, 9)])
def test_a_large_basis_stays_in_its_file_and_gives_the_same_coordinates(tmp_path, monkeypatch, shape):
    """open() holds nothing in memory above a sixteenth of memory_bytes; parts of two rows add up to the whole."""
    W, X, Y = matrix(0, *shape), matrix(1, shape[0], 4), matrix(2, shape[1], 4)
    store = BasisStore(tmp_path, memory_bytes=16)
    made = store.open(W)
    monkeypatch.setattr(module, "PART_BYTES", 2 * 9 * 8)
    stored = store.open(W)
    assert isinstance(made, Basis) and isinstance(stored, StoredBasis) and not store._memory
    assert isinstance(BasisStore(tmp_path).open(W), Basis)
    assert len(list(stored.parts("U"))) == -(-shape[0] // 2)
    for name, side in (("U", X), ("Vh", Y)):
        full = made.U if name == "U" else made.Vh.mT
        coordinates = inside(stored, name, side)
        torch.testing.assert_close(coordinates, full.mT @ side.double())
        torch.testing.assert_close(outside(stored, name, side, coordinates), side - full @ (full.mT @ side.double()))
        torch.testing.assert_close(inside(made, name, side), coordinates)


def test_a_file_is_checked_again_after_it_changed(tmp_path):
    """The checksum of a file is computed once, and again when its size or time has changed."""
    store = BasisStore(tmp_path, memory_bytes=0)
    expected = store.open(matrix(0))
    assert isinstance(store.open(matrix(0)), StoredBasis)
    path = files(tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, (1, 1))
    again = store.open(matrix(0))
    assert store.rebuilt == 1 and torch.equal(again.U, expected.U)


def test_the_size_is_bounded_and_the_oldest_go_first(tmp_path):
    """Files stay under max_bytes; the basis used longest ago is deleted."""
    store = BasisStore(tmp_path)
    store.get(matrix(0))
    size = files(tmp_path)[0].stat().st_size
    store = BasisStore(tmp_path, max_bytes=3 * size + 4096)
    for seed in range(1, 3):
        store.get(matrix(seed))
    for age, seed in enumerate((1, 0, 2)):
        os.utime(store._path(content_key(matrix(seed))), (age, age))
    store.get(matrix(3))
    left = {path.stem for path in files(tmp_path)}
    assert left == {content_key(matrix(seed)) for seed in (0, 2, 3)}


def test_too_large_or_unwritable_is_used_and_not_kept(tmp_path, monkeypatch):
    """A basis above max_bytes, and one that a full disk refuses, are returned all the same; no partial file is left."""
    small = BasisStore(tmp_path, max_bytes=10)
    torch.testing.assert_close(small.get(matrix(0)).S, Basis.of(matrix(0)).S)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    torch.testing.assert_close(BasisStore(tmp_path).get(matrix(0)).S, Basis.of(matrix(0)).S)
    assert list(tmp_path.iterdir()) == []


def test_bad_stores_are_refused(tmp_path):
    """A file in place of the folder and a negative size name the value and the call."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be a folder"):
        BasisStore(tmp_path / "file")
    with pytest.raises(InputError, match="max_bytes=-1"):
        BasisStore(tmp_path, max_bytes=-1)
