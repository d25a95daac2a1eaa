"""The singular value decomposition of a pre-trained matrix, kept on disk and found again by the matrix's content."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .errors import InputError
from .spectrum import svd, working_precision

FORMAT = "intruder-basis-1"
HEADER_BYTES = 4096  # of a file, about
PART_BYTES = 2**23  # read at a time from a basis that is not held in memory


class Basis(NamedTuple):
    """W0 = U diag(S) Vh, thin, in the working precision (float64 if n <= 1024, else float32), and W0's content hash."""

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    key: str

    @classmethod
    def of(cls, pretrained: torch.Tensor, key: str | None = None) -> "Basis":
        """Decompose W0, shape (m, p); `key` is its content hash, if known. Raises InputError for what `svd` refuses."""
        return cls(*svd(working_precision(pretrained)), content_key(pretrained) if key is None else key)

    def to(self, device: torch.device | str) -> "Basis":
        """The same basis on another device."""
        return Basis(self.U.to(device), self.S.to(device), self.Vh.to(device), self.key)

    def parts(self, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """The rows of U or Vh, as (which rows, the rows)."""
        matrix = getattr(self, name)
        yield slice(0, len(matrix)), matrix


class StoredBasis(NamedTuple):
    """A basis whose U and Vh stay in their file, checked, and are read a few rows at a time; S is on `device`."""

    S: torch.Tensor
    key: str
    path: Path
    places: dict[str, tuple[int, tuple[int, int]]]
    device: torch.device

    def parts(self, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """The rows of U or Vh, as (which rows, the rows). Raises OSError if the file has gone or was cut."""
        offset, (rows, columns) = self.places[name]
        dtype = np.dtype(str(self.S.dtype).removeprefix("torch."))
        step = max(1, PART_BYTES // (columns * dtype.itemsize))
        with open(self.path, "rb") as file:
            file.seek(offset)
            for first in range(0, rows, step):
                count = min(step, rows - first)
                part = np.fromfile(file, dtype, count * columns)
                if part.size < count * columns:
                    raise OSError(f"{self.path} ends in the middle of {name}")
                yield slice(first, first + count), torch.from_numpy(part.reshape(count, columns)).to(self.device)


def inside(basis: Basis | StoredBasis, name: str, X: torch.Tensor) -> torch.Tensor:
    """The coordinates of the columns of X in the basis: U^T X for "U", Vh X for "Vh". X is converted to its dtype."""
    # A few rows times a matrix: twice as fast as the matrix times a few columns.
    rows_of_X = X.mT.to(basis.S)
    if name == "U":
        return sum(rows_of_X[:, rows] @ part for rows, part in basis.parts("U")).mT
    return torch.cat([rows_of_X @ part.mT for _, part in basis.parts("Vh")], 1).mT


def outside(basis: Basis | StoredBasis, name: str, X: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
    """What the basis does not reach of the columns of X: X - U coordinates for "U", X - Vh^T coordinates for "Vh"."""
    X = X.to(basis.S)
    if name == "U":
        return torch.cat([X[rows] - part @ coordinates for rows, part in basis.parts("U")])
    return X - sum(part.mT @ coordinates[rows] for rows, part in basis.parts("Vh"))


def content_key(matrix: torch.Tensor) -> str:
    """SHA-256, in hexadecimal, of dtype, shape and the values in row-major order: equal matrices, equal keys."""
    tensor = matrix.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}:".encode())
    digest.update(tensor.view(torch.uint8).numpy() if tensor.numel() else b"")
    return digest.hexdigest()


class BasisStore:
    """Bases in a folder, one safetensors file each, named by the matrix's content and bounded in total size.

    `get(pretrained)` returns the basis of W0: from memory (the last ones used, up to `memory_bytes`), from its file,
    or by decomposing and writing the file (atomically: a reader never sees half a file). `open(pretrained)`, which
    `compare` calls, does the same but leaves a large one in its file, to be read by parts: one above a sixteenth of
    `memory_bytes` would leave memory to few others. Every file carries the SHA-256 of its tensors; a file that fails
    it, or cannot be read, is discarded and made anew, and `rebuilt` counts that. When the folder exceeds `max_bytes`,
    the bases used longest ago are deleted first. A basis that alone exceeds it, or a disk without room, is returned
    without being kept.

    Raises InputError if the folder is a file, if max_bytes < 0, or for a matrix that cannot be decomposed.
    """

    def __init__(self, folder: str | Path, max_bytes: int = 20 * 2**30, memory_bytes: int = 2**29):
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise InputError(f"max_bytes={max_bytes!r} was given; wanted a whole number of bytes >= 0")
        self.folder, self.max_bytes, self.memory_bytes, self.rebuilt = Path(folder), max_bytes, memory_bytes, 0
        self._memory: dict[str, Basis] = {}
        self._checked: dict[str, tuple[int, int]] = {}  # files whose content was compared with its SHA-256
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be a folder of bases ({error.strerror}); wanted a folder or a new path; "
                "call BasisStore(folder)"
            ) from error

    def get(self, pretrained: torch.Tensor) -> Basis:
        """The basis of W0, on W0's device."""
        return self._get(pretrained, content_key(pretrained))

    def open(self, pretrained: torch.Tensor, key: str | None = None) -> Basis | StoredBasis:
        """The basis of W0, on W0's device; in its file if it is large. `key`: `content_key(pretrained)`, if known."""
        key = content_key(pretrained) if key is None else key
        if key in self._memory or basis_bytes(pretrained.shape) <= self.memory_bytes // 16:
            return self._get(pretrained, key)
        stored = self._stored(key, pretrained)
        if stored is not None:
            return stored
        basis = Basis.of(pretrained, key)
        self._write(basis)
        return basis

    def holds(self, key: str) -> bool:
        """Whether the basis of the matrix with this `content_key` is in memory or has a file, which is not checked."""
        return key in self._memory or self._path(key).is_file()

    def would_keep(self, shape: tuple[int, int]) -> bool:
        """Whether the basis of a matrix of this shape fits under `max_bytes`."""
        return basis_bytes(shape) + HEADER_BYTES <= self.max_bytes

    def __contains__(self, pretrained: torch.Tensor) -> bool:
        """Whether a file for this matrix is there; it is not checked."""
        return self._path(content_key(pretrained)).is_file()

    def _get(self, pretrained: torch.Tensor, key: str) -> Basis:
        basis = self._memory.pop(key, None)
        if basis is None:
            basis = self._read(key, pretrained)
        if basis is None:
            basis = Basis.of(pretrained, key)
            self._write(basis)
        self._memory[key] = basis  # the last entry is the one used last
        while len(self._memory) > 1 and sum(map(_size, self._memory.values())) > self.memory_bytes:
            del self._memory[next(iter(self._memory))]
        return basis.to(pretrained.device)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _read(self, key: str, pretrained: torch.Tensor) -> Basis | None:
        stored = self._stored(key, pretrained)
        if stored is None:
            return None
        U, Vh = (torch.cat([part for _, part in stored.parts(name)]) for name in ("U", "Vh"))
        return Basis(U, stored.S, Vh, key)

    def _stored(self, key: str, pretrained: torch.Tensor) -> StoredBasis | None:
        """The file of this key, sound; None, and no file, if there is none or it is not."""
        path, n = self._path(key), min(pretrained.shape)
        if not path.is_file():
            return None
        shapes = {"U": (pretrained.shape[0], n), "S": (n,), "Vh": (n, pretrained.shape[1])}
        try:
            dtype, places, metadata = _header(path)
            status = path.stat()
            stamp = status.st_size, status.st_mtime_ns
            sound = metadata["format"] == FORMAT and metadata["key"] == key
            sound &= {name: shape for name, (_, shape) in places.items()} == shapes
            if sound and self._checked.get(key) != stamp:
                sound = metadata["sha256"] == _file_checksum(path, dtype, places)
            with open(path, "rb") as file:
                file.seek(places["S"][0])
                S = torch.from_numpy(np.fromfile(file, dtype, n)).to(pretrained.device)
        except (OSError, ValueError, KeyError, TypeError):  # a cut file, a header that is no JSON or lacks an entry
            sound = False
        if not sound:
            self.rebuilt += 1
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the order of deletion is the order of use
            status = path.stat()
            self._checked[key] = status.st_size, status.st_mtime_ns
        return StoredBasis(S, key, path, places, pretrained.device)

    def _write(self, basis: Basis) -> None:
        import safetensors.torch

        tensors = {name: getattr(basis, name).cpu().contiguous() for name in ("U", "S", "Vh")}
        size = _size(basis) + HEADER_BYTES
        if size > self.max_bytes:
            return
        self._make_room(size)
        metadata = {"format": FORMAT, "key": basis.key, "sha256": _checksum(basis)}
        handle, temporary = tempfile.mkstemp(prefix=".basis-", suffix=".partial", dir=self.folder)
        os.close(handle)
        try:
            safetensors.torch.save_file(tensors, temporary, metadata)
            os.replace(temporary, self._path(basis.key))
        except (OSError, safetensors.SafetensorError):
            pass  # a full disk must not stop a count: the basis is used and not kept
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        entries = []
        for path in self.folder.glob("*.safetensors"):
            with contextlib.suppress(OSError):
                status = path.stat()
                entries.append((status.st_mtime_ns, status.st_size, path))
        total = sum(entry[1] for entry in entries)
        for _, bytes_freed, path in sorted(entries, key=lambda entry: entry[0]):
            if total + size <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= bytes_freed


def basis_bytes(shape: tuple[int, int]) -> int:
    """Bytes of U, S and Vh for a matrix of this shape."""
    m, p = shape
    n = min(m, p)
    return (m * n + n + n * p) * (8 if n <= 1024 else 4)


def _size(basis: Basis) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in basis[:3])


def _header(path: Path) -> tuple[np.dtype, dict[str, tuple[int, tuple[int, ...]]], dict[str, str]]:
    """(dtype, {name: (offset in the file, shape)}, metadata) of a safetensors file whose tensors are all one dtype."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= 16 * HEADER_BYTES:
            raise ValueError("no header")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__")
    dtypes = {entry["dtype"] for entry in header.values()}
    dtype = np.dtype({"F32": np.float32, "F64": np.float64}[dtypes.pop()])
    if dtypes:
        raise ValueError("tensors of several dtypes")
    places = {name: (8 + length + entry["data_offsets"][0], tuple(entry["shape"])) for name, entry in header.items()}
    return dtype, places, metadata


def _file_checksum(path: Path, dtype: np.dtype, places: dict[str, tuple[int, tuple[int, ...]]]) -> str:
    """`_checksum` of the tensors in a file, a part at a time."""
    keys = []
    with open(path, "rb") as file:
        for name in ("U", "S", "Vh"):
            offset, shape = places[name]
            digest = hashlib.sha256(f"torch.{dtype.name} {shape}:".encode())
            file.seek(offset)
            left = int(np.prod(shape)) * dtype.itemsize
            while left and (part := file.read(min(left, PART_BYTES))):
                digest.update(part)
                left -= len(part)
            keys.append(digest.hexdigest())
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()


def _checksum(basis: Basis) -> str:
    keys = [content_key(tensor) for tensor in (basis.U, basis.S, basis.Vh)]
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()
