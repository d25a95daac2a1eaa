"""The singular value decomposition of a pre-trained matrix, kept on disk and found again by the matrix's content."""

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from .errors import InputError
from .spectrum import svd, working_precision

FORMAT = "intruder-basis-1"


class Basis(NamedTuple):
    """W0 = U diag(S) Vh, thin, in the working precision (float64 if n <= 1024, else float32), and W0's content hash."""

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    key: str

    @classmethod
    def of(cls, pretrained: torch.Tensor) -> "Basis":
        """Decompose W0, shape (m, p). Raises InputError for what `spectrum.svd` refuses."""
        return cls(*svd(working_precision(pretrained)), content_key(pretrained))

    def to(self, device: torch.device | str) -> "Basis":
        """The same basis on another device."""
        return Basis(self.U.to(device), self.S.to(device), self.Vh.to(device), self.key)


def content_key(matrix: torch.Tensor) -> str:
    """SHA-256, in hexadecimal, of dtype, shape and the values in row-major order: equal matrices, equal keys."""
    tensor = matrix.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}:".encode())
    digest.update(tensor.view(torch.uint8).numpy() if tensor.numel() else b"")
    return digest.hexdigest()


class BasisStore:
    """Bases in a folder, one safetensors file each, named by the matrix's content and bounded in total size.

    `get(pretrained)` returns the basis of W0: from memory (the last ones used, up to `memory_bytes`), from its file,
    or by decomposing and writing the file (atomically: a reader never sees half a file). Every file carries the
    SHA-256 of its tensors; a file that fails it, or cannot be read, is discarded and made anew, and `rebuilt` counts
    that. When the folder exceeds `max_bytes`, the bases used longest ago are deleted first. A basis that alone exceeds
    it, or a disk without room, is returned without being kept.

    Raises InputError if the folder is a file, if max_bytes < 0, or for a matrix that cannot be decomposed.
    """

    def __init__(self, folder: str | Path, max_bytes: int = 20 * 2**30, memory_bytes: int = 2**29):
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise InputError(f"max_bytes={max_bytes!r} was given; wanted a whole number of bytes >= 0")
        self.folder, self.max_bytes, self.memory_bytes, self.rebuilt = Path(folder), max_bytes, memory_bytes, 0
        self._memory: dict[str, Basis] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be a folder of bases ({error.strerror}); wanted a folder or a new path; "
                "call BasisStore(folder)"
            ) from error

    def get(self, pretrained: torch.Tensor) -> Basis:
        """The basis of W0, on W0's device."""
        key = content_key(pretrained)
        basis = self._memory.pop(key, None)
        if basis is None:
            basis = self._read(key, pretrained)
        if basis is None:
            basis = Basis.of(pretrained)
            self._write(basis)
        self._memory[key] = basis  # the last entry is the one used last
        while len(self._memory) > 1 and sum(map(_size, self._memory.values())) > self.memory_bytes:
            del self._memory[next(iter(self._memory))]
        return basis.to(pretrained.device)

    def __contains__(self, pretrained: torch.Tensor) -> bool:
        """Whether a file for this matrix is there; it is not checked."""
        return self._path(content_key(pretrained)).is_file()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _read(self, key: str, pretrained: torch.Tensor) -> Basis | None:
        import safetensors.torch
        from safetensors import safe_open

        path = self._path(key)
        if not path.is_file():
            return None
        try:
            tensors = safetensors.torch.load_file(path)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            basis = Basis(tensors["U"], tensors["S"], tensors["Vh"], key)
            n = min(pretrained.shape)
            shapes = [tuple(tensor.shape) for tensor in basis[:3]]
            expected = [(pretrained.shape[0], n), (n,), (n, pretrained.shape[1])]
            sound = metadata == {"format": FORMAT, "key": key, "sha256": _checksum(basis)} and shapes == expected
        except Exception:  # safetensors raises its own type for a damaged header, torch others: all mean "not usable"
            sound = False
        if not sound:
            self.rebuilt += 1
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the order of deletion is the order of use
        return basis

    def _write(self, basis: Basis) -> None:
        import safetensors.torch

        tensors = {name: getattr(basis, name).cpu().contiguous() for name in ("U", "S", "Vh")}
        size = _size(basis) + 4096
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


def _size(basis: Basis) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in basis[:3])


def _checksum(basis: Basis) -> str:
    keys = [content_key(tensor) for tensor in (basis.U, basis.S, basis.Vh)]
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()
