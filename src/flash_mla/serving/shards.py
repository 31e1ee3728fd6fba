"""A folder of Parquet files that appear whole or not at all, on a disk or a filesystem of fsspec; and what it is of."""

from __future__ import annotations

import json
import posixpath
import uuid
from collections.abc import Iterable
from typing import Any

import fsspec  # huggingface_hub depends on it, and Transformers on that
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["Shards"]

SETTINGS = "_settings.json"  # Spark and pyarrow read no file whose name begins with "_" or "."


class Shards:
    """Files by name in a folder, which need not exist. May be pickled.

    Args:
        path: folder or URI; a local path becomes absolute.
    """

    def __init__(self, path: str) -> None:
        self.fs, root = fsspec.core.url_to_fs(path)
        self.root = str(root).rstrip("/")

    def open(self, settings: dict[str, Any]) -> set[str]:
        """Names of the shards that are there; the first call of a folder notes what it is of.

        What a writer that was killed left behind is removed.
        Args:
            settings: JSON values.
        Raises: ValueError: the folder is of other settings, or not a folder of shards.
        """
        self.fs.invalidate_cache()
        try:
            there = {posixpath.basename(path) for path in self.fs.ls(self.root, detail=False)}
        except FileNotFoundError:
            there = set()
        abandoned = {name for name in there if name.startswith(".") and name.endswith(".tmp")}
        if SETTINGS in there:
            known = json.loads(self.fs.cat_file(self._path(SETTINGS)))
            other = sorted(name for name in {*known, *settings} if known.get(name) != settings.get(name))
            if other:
                was, now = ({name: of.get(name) for name in other} for of in (known, settings))
                raise ValueError(f"flash_mla.serving.spark: {self.root} was made with {was}, this job has {now}")
        elif there - abandoned:
            raise ValueError(
                f"flash_mla.serving.spark: path must be an empty folder or one that a job has written, {self.root} "
                f"has no {SETTINGS} and holds {min(there - abandoned)}"
            )
        else:
            self._put(SETTINGS, json.dumps(settings, indent=1).encode())
        self.remove(abandoned)
        return {name for name in there if name.startswith("shard-") and name.endswith(".parquet")}

    def write(self, name: str, table: pa.Table) -> None:
        """Put a table there."""
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        self._put(name, buffer.getvalue().to_pybytes())

    def remove(self, names: Iterable[str]) -> None:
        """Remove files."""
        for name in names:
            self.fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return posixpath.join(self.root, name)

    def _put(self, name: str, content: bytes) -> None:
        """Under another name first, in the same folder: a rename there is atomic; of several writers the last stays."""
        self.fs.makedirs(self.root, exist_ok=True)
        temporary = self._path(f".{uuid.uuid4().hex}.tmp")
        self.fs.pipe_file(temporary, content)
        self.fs.mv(temporary, self._path(name))
