"""Where files of stored prefixes lie, on a disk or a filesystem of fsspec, and how one gets there whole or not."""

from __future__ import annotations

import contextlib
import posixpath
import struct
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec  # huggingface_hub depends on it, and Transformers on that
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from . import prefix_file

__all__ = ["PrefixFolder"]

# An object appears there whole or not at all, and renaming would copy it.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "r2"}
ABANDONED_S = 24 * 3600  # temporary files of writers that died are removed after a day
WHERE = "flash_mla.PrefixStore"


class PrefixFolder:
    """A folder of files; paths are those of its filesystem, "/" between the parts.

    Args:
        uri: local path or URI.
        storage_options: for the filesystem.
    Raises: ValueError: an unknown kind of URI. ImportError: the filesystem's package is missing.
    """

    def __init__(self, uri: str, storage_options: dict[str, Any]) -> None:
        try:
            self.fs, root = fsspec.core.url_to_fs(uri, **storage_options)
        except ImportError as error:
            known = known_implementations.get(uri.split("://")[0], {})
            package = known.get("class", "fsspec").split(".")[0]
            needs = f"pip install {package}" if package != "fsspec" else str(error)
            raise ImportError(f"{WHERE}: {uri!r} needs a package that is not installed: {needs}") from error
        except ValueError as error:
            raise ValueError(
                f"{WHERE}: uri must be a folder or a URI that fsspec knows, got {uri!r} ({error})"
            ) from error
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.root = str(root).rstrip("/")

    def uri(self, path: str) -> str:
        """How a user would call a path."""
        return path if self.is_local else str(self.fs.unstrip_protocol(path))

    def paths(self, folder: str) -> list[str]:
        """Paths in a folder; none if it does not exist."""
        self.fs.invalidate_cache(folder)
        try:
            return [str(path) for path in self.fs.ls(folder, detail=False)]
        except FileNotFoundError:
            return []

    def files(self) -> list[tuple[str, int]]:
        """Path and size in bytes of all files."""
        self.fs.invalidate_cache()
        found: dict[str, Any] = self.fs.find(self.root, detail=True)
        return [(path, info["size"]) for path, info in found.items()]

    def is_whole(self, path: str, num_bytes: int) -> bool:
        """Whether there is a file of the size that one with `num_bytes` of tensors has; a cut-off one has not."""
        self.fs.invalidate_cache(posixpath.dirname(path))
        try:
            with self.fs.open(path, "rb") as file:
                start = file.read(8)
            return len(start) == 8 and int(self.fs.size(path)) == 8 + struct.unpack("<Q", start)[0] + num_bytes
        except FileNotFoundError:
            return False

    def read_header(self, path: str) -> dict[str, Any]:
        """As `prefix_file.read_header`."""
        with self.fs.open(path, "rb") as file:
            return prefix_file.read_header(file, f"{WHERE}: {self.uri(path)}")

    def read(self, path: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """As `prefix_file.read`."""
        name = f"{WHERE}: {self.uri(path)}"
        if self.is_local:
            return prefix_file.read(Path(path), name)
        with tempfile.TemporaryDirectory() as local:
            file = Path(local, "prefix.safetensors")
            self.fs.get_file(path, str(file))
            return prefix_file.read(file, name)

    def write(self, path: str, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Under another name first: a crash leaves nothing that can be found, and of several writers the last stays."""
        if self.is_local:
            self._write_here(Path(path), header, tensors)
            return
        with tempfile.TemporaryDirectory() as local:
            file = Path(local, "prefix.safetensors")
            prefix_file.write(file, header, tensors)
            self.fs.makedirs(posixpath.dirname(path), exist_ok=True)
            protocols = (self.fs.protocol,) if isinstance(self.fs.protocol, str) else self.fs.protocol
            if OBJECT_STORES.intersection(protocols):
                self.fs.put_file(str(file), path)
                return
            remote = posixpath.join(posixpath.dirname(path), _unique_name())
            try:
                self.fs.put_file(str(file), remote)
                self.fs.mv(remote, path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    self.fs.rm_file(remote)
                raise

    def _write_here(self, path: Path, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        # In the same folder: a rename is atomic within one filesystem only.
        temporary = path.with_name(_unique_name())
        try:
            prefix_file.write(temporary, header, tensors)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self, path: str) -> None:
        """Remove a file."""
        self.fs.rm_file(path)


def _unique_name() -> str:
    return f".{uuid.uuid4().hex}.tmp"


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # another writer's, just renamed or removed
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                path.unlink()
